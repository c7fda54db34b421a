from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.config.base import fingerprint
from onnxshrink.config.load import load_config, validate
from onnxshrink.config.run import RunConfig
from onnxshrink.config.schema import SCHEMA_FILE, schema_text
from onnxshrink.config.stages import Distill, Export, PruneChannels
from onnxshrink.core.errors import ConfigError, ConfigErrors

GOOD = """\
model:
  factory: nets:build
  inputs: {image: {shape: [batch, 1, 8, 8]}}
data:
  train: {npz: d.npz, split: train}
  calibration: {npz: d.npz}
  evaluation: {npz: d.npz, metric: top1}
stages:
  - {kind: distill, teacher: {factory: "nets:build"}, epochs: 8}
  - {kind: prune_channels, pruning_ratio: 0.3}
  - {kind: export}
variants:
  fp32: []
  int8: [{kind: quantize_static}]
gates: {max_accuracy_drop: 0.01, max_size: 60 kB}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d.npz").write_bytes(b"samples")
    (tmp_path / "nets.py").write_text("def build(): ...\n")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "cfg.yaml"
    path.write_text(text)
    return path


def refused(folder: Path, text: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    assert caught.value.exit_code == 2
    return caught.value


IMAGES = """\
model: {onnx: nets.py}
data:
  calibration:
    images: pets
    steps:
      - {resize: 8}
      - normalize: {mean: [0.5], std: [0.5]}
"""


@pytest.mark.parametrize(
    ("old", "new", "what", "where", "fix"),
    [
        ("{resize: 8}", "{resise: 8}", "unknown step 'resise'", "6  data.calibration.steps[0]", "mean 'resize'?"),
        ("mean: [0.5]", "meen: [0.5]", "unknown option 'meen'", "steps[1].normalize.meen", "mean 'mean'?"),
        ("{resize: 8}", "{resize: big}", "'big'", "6  data.calibration.steps[0].resize", ""),
        ("{resize: 8}", "crop", "the value is wrong", "6  data.calibration.steps[0]", ""),
        ("images: pets", "images: pest", "'pest'", "4  data.calibration.images", "relative paths"),
        ("images: pets", "images: pets\n    labels: folder", "folder", "5  data.calibration.labels", "relative paths"),
        ("{resize: 8}", "{flip: 0.5}", "acts at random", "6  data.calibration.steps[0]", "crop in place of"),
        ("{resize: 8}", "{resize: 8}\n      - normalize: {mean: [0.5], std: [0.5]}", "is not the last step", "3", ""),
    ],
)
def test_wrong_images_are_refused_like_the_rest(
    folder: Path, old: str, new: str, what: str, where: str, fix: str
) -> None:
    """Steps are named in a list; a mistake in one is told where it stands."""
    (folder / "pets").mkdir()
    load_config(write(folder, IMAGES))
    error = refused(folder, IMAGES.replace(old, new))
    errors = error.errors if isinstance(error, ConfigErrors) else (error,)
    assert [e for e in errors if what in str(e) and where in (e.where or "") and fix in (e.fix or "")], str(error)


def test_a_good_config_loads_with_its_defaults(folder: Path) -> None:
    """The common case needs a dozen lines; the rest has defaults, and the run is named after the file."""
    config = load_config(write(folder, GOOD))
    assert config.name == "cfg"
    assert config.gates.max_size == 60_000
    assert config.select == "smallest"
    assert isinstance(config.stages[0], Distill)
    assert config.stages[0].epochs == 8
    assert config.data.train is not None
    assert [name for name, _ in config.branches()] == ["fp32", "int8"]


@pytest.mark.parametrize(
    ("old", "new", "line", "path", "fix"),
    [
        ("pruning_ratio: 0.3", "prunning_ratio: 0.3", 10, "stages[1]", "did you mean 'pruning_ratio'?"),
        ("kind: quantize_static", "kind: quantise_static", 14, "variants.int8[0]", "did you mean 'quantize_static'?"),
        ("max_size: 60 kB", "max_sise: 60 kB", 15, "gates.max_sise", "did you mean 'max_size'?"),
        ("shape: [batch", "shap: [batch", 3, "model.inputs.image.shap", "did you mean 'shape'?"),
        ("split: train", "splitt: train", 5, "data.train.splitt", "did you mean 'split'?"),
        ("gates:", "gate:", 15, "gate", "did you mean 'gates'?"),
        ("metric: top1", "metric: topp1", 7, "data.evaluation.metric", "did you mean 'top1'?"),
    ],
)
def test_a_typo_is_refused_with_its_line_and_a_suggestion(
    folder: Path, old: str, new: str, line: int, path: str, fix: str
) -> None:
    """No option is ever ignored: the message names file, line, path and the likely spelling."""
    error = refused(folder, GOOD.replace(old, new))
    errors = error.errors if isinstance(error, ConfigErrors) else (error,)
    match = [e for e in errors if e.fix == fix]
    assert match, str(error)
    assert match[0].where is not None
    assert match[0].where.startswith(f"cfg.yaml:{line}  {path}")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("epochs: 8", "epochs: many", "a whole number"),
        ("epochs: 8", "epochs: 2.5", "a whole number"),
        ("epochs: 8", "epochs: 0", "greater than 0"),
        ("pruning_ratio: 0.3", "pruning_ratio: 1.5", "less than 1"),
        ("{kind: prune_channels, pruning_ratio: 0.3}", "{kind: prune_channels}", "there is no target"),
        ("npz: d.npz, split", "npz: missing.npz, split", "there is nothing at"),
        ("factory: nets:build", "factory: nets.build", "package.module:callable"),
        ("pruning_ratio: 0.3", "pruning_ratio: some", "want   a number"),
        ("max_size: 60 kB", "max_size: huge", "text such as 60 kB"),
        ("max_size: 60 kB", "max_size: 60 kilos", "text such as 60 kB"),
        ("max_accuracy_drop: 0.01", "max_accuracy_drop: .nan", "a finite number"),
        ("max_accuracy_drop: 0.01", "max_accuracy_drop: true", "a number"),
        ("fp32: []", "fp32:", "want   a list: [ … ]"),
        ("fp32: []", "3: []", "text, in quotes where it looks like a number"),
        ("kind: quantize_static", "kind: quantize_static, reduce_range: maybe", "true or false"),
        ("- {kind: export}", "- export", "options: {name: value}"),
        ("shape: [batch, 1, 8, 8]", "shape: 8", "a list: [ … ]"),
        ("gates: {max_accuracy_drop: 0.01, max_size: 60 kB}", "gates:", "there is no value"),
        ("gates:", "targets: []\ngates:", "at least 1"),
        ("- {kind: export}", "- kind: export\n    kind: export", "not valid YAML"),
    ],
)
def test_a_wrong_value_is_refused(folder: Path, old: str, new: str, says: str) -> None:
    """Wrong types, ranges, missing files and duplicate keys are told before any work."""
    told = str(refused(folder, GOOD.replace(old, new)))
    assert says in told
    assert not re.search("tuple|dictionary|instance of|parse|valid (string|integer)", told)


@pytest.mark.parametrize(
    ("old", "new", "what", "where"),
    [
        ("  - {kind: export}\n", "", "'fp32' ends as a torch model", "variants.fp32"),
        ("- {kind: export}\n", "- {kind: optimize}\n", "takes an onnx model and is given a torch", "stages[2]"),
        (
            "- {kind: export}\n",
            "- {kind: export}\n  - {kind: finetune}\n",
            "'finetune' takes a torch model and is given an onnx model",
            "cfg.yaml:12  stages[3]",
        ),
        ("  calibration: {npz: d.npz}\n", "", "'quantize_static' needs data.calibration", "variants.int8[0]"),
        (", metric: top1", "", "nothing to measure accuracy with", "gates.max_accuracy_drop"),
        ("  int8:", "  ../int8:", "cannot name a folder", "variants"),
        ("gates:", "targets: [{provider: cpu}, {provider: cpu}]\ngates:", "two targets are the same", "targets"),
    ],
)
def test_what_does_not_fit_together_is_refused(folder: Path, old: str, new: str, what: str, where: str) -> None:
    """A chain of stages that cannot run, or a gate that nothing can measure, is found before any work."""
    error = refused(folder, GOOD.replace(old, new))
    assert what in error.what
    assert where in (error.where or "")


def test_a_wrong_item_is_told_once(folder: Path) -> None:
    """A list is not also called too short because its only item is wrong."""
    error = refused(folder, GOOD.replace("gates:", "targets: [cpu]\ngates:"))
    assert not isinstance(error, ConfigErrors)
    assert (error.where, error.got) == ("cfg.yaml:15  targets[0]", "'cpu'")


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    """Two typos cost one round trip, not two."""
    error = refused(folder, GOOD.replace("epochs: 8", "epochz: 8").replace("max_size", "max_sise"))
    assert isinstance(error, ConfigErrors)
    assert len(error.errors) == 2
    assert "'epochz'" in str(error)
    assert "'max_sise'" in str(error)


def test_a_misspelt_option_is_not_called_missing_as_well(folder: Path) -> None:
    """One mistake, one message."""
    error = refused(folder, GOOD.replace("pruning_ratio: 0.3", "prunning_ratio: 0.3"))
    assert not isinstance(error, ConfigErrors)
    assert error.fix == "did you mean 'pruning_ratio'?"


def test_the_fix_of_a_misplaced_stage_can_be_followed(folder: Path) -> None:
    """Behind the export that is there, before an export that is not, or another source altogether."""
    swapped = GOOD.replace("  - {kind: export}\n", "  - {kind: optimize}\n  - {kind: export}\n")
    assert refused(folder, swapped).fix == "move it behind {kind: export}"
    (folder / "m.onnx").write_bytes(b"x")
    onnx_source = "model: {onnx: m.onnx}\ndata: {train: {npz: d.npz}}\nstages: [{kind: finetune}]\n"
    assert "torch network as the source" in str(refused(folder, onnx_source).fix)


def test_the_schema_asks_for_what_the_code_asks_for() -> None:
    """An editor refuses a stage without a kind, as the command line does."""
    import json

    stages = json.loads(schema_text())["$defs"]
    assert all("kind" in stages[name]["required"] for name in ("Distill", "Export", "QuantizeStatic"))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [", "a: 1\na: 2\n", "\tx: 1\n"])
def test_a_file_that_is_no_config_is_refused(folder: Path, text: str) -> None:
    """Empty files, lists, broken YAML and duplicate keys name the file."""
    assert "cfg.yaml" in str(refused(folder, text).where)


def test_overrides_reach_every_level(folder: Path) -> None:
    """``--set`` replaces list items, nested keys and whole branches, and adds keys that were not there."""
    overrides = ("stages[0].epochs=2", "gates.strict=true", "variants={only: []}", "seed=3", "data.train.max_samples=5")
    config = load_config(write(folder, GOOD), overrides)
    assert isinstance(config.stages[0], Distill)
    assert (config.stages[0].epochs, config.gates.strict, list(config.variants), config.seed) == (2, True, ["only"], 3)
    assert config.data.train is not None
    assert config.data.train.max_samples == 5


@pytest.mark.parametrize(
    "override",
    ["stages[9].epochs=2", "stages.epochs=1", "epochs", "=3", "name.x=1", "stages[0].epoch=2", "stages[-1]=3"],
)
def test_an_override_that_leads_nowhere_is_refused(folder: Path, override: str) -> None:
    """A misspelt ``--set`` is never ignored."""
    refused(folder, GOOD, override)


def test_numbers_are_read_as_yaml_1_2_has_them(folder: Path) -> None:
    """``1e-3`` is a number and ``no`` is a word, which the older YAML has the other way round."""
    config = load_config(write(folder, GOOD.replace("epochs: 8", "learning_rate: 1e-3")))
    assert isinstance(config.stages[0], Distill)
    assert config.stages[0].learning_rate == 1e-3


def test_an_onnx_source_needs_no_torch_options(folder: Path) -> None:
    """The kind of source follows from its keys, and its typos are told in its own words."""
    (folder / "m.onnx").write_bytes(b"x")
    config = load_config(write(folder, "model: {onnx: m.onnx}\n"))
    assert config.model.gives == "onnx"
    assert "want   onnx" in str(refused(folder, "model: {onnx: m.onnx, inputs: {}}\n"))


def test_fingerprints_follow_content_not_path(folder: Path) -> None:
    """The same bytes elsewhere give the same key; changed bytes or changed code under the same path do not."""

    def key() -> dict[str, Any]:
        return fingerprint(load_config(folder / "cfg.yaml").model_copy(update={"name": "x"}))

    def loaded() -> dict[str, Any]:
        from onnxshrink.core.importing import search_path

        with search_path(folder):
            return key()

    write(folder, GOOD)
    first = loaded()
    (folder / "copy.npz").write_bytes(b"samples")
    write(folder, GOOD.replace("d.npz", "copy.npz"))
    assert loaded() == first
    (folder / "copy.npz").write_bytes(b"other samples")
    assert loaded() != first
    write(folder, GOOD)
    (folder / "nets.py").write_text("def build(): return 1\n")
    assert loaded() != first


def test_the_schema_in_the_repository_is_true() -> None:
    """Editors complete against the file that the code would print."""
    assert SCHEMA_FILE.read_text() == schema_text(), (
        "run: python -m onnxshrink schema > onnxshrink/config/run.schema.json"
    )


def test_configs_are_frozen(folder: Path) -> None:
    """Nothing changes a config after it was checked."""
    config = load_config(write(folder, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from(["model", "data", "stages", "variants", "targets", "gates", "select", "seed", "name", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
    )
)
def test_any_values_give_a_config_or_a_clear_error(document: dict[str, Any]) -> None:
    """Whatever is written, the answer is a config or a ConfigError, never a traceback."""
    try:
        config = validate(document, base=Path())
    except ConfigError as e:
        assert e.what
    else:
        assert isinstance(config, RunConfig)


def test_stage_settings_say_what_flows() -> None:
    """Export is where torch ends and ONNX begins."""
    assert (PruneChannels.takes, PruneChannels.gives) == ("torch", "torch")
    assert (Export.takes, Export.gives) == ("torch", "onnx")
