"""The command ``bisect`` on real causes: a pass that damages, int8, float16, fused kernels, torch stages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import onnxruntime as ort
import pytest
from click.testing import Result
from command_line import make_project
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from onnxshrink.cli import app
from onnxshrink.stages import optimize
from onnxshrink.stages.passes import Pass

CONFIG = """\
model: {onnx: model.onnx}
data:
  calibration: {npz: calib.npz}
  evaluation: {npz: test.npz, metric: top1}
stages:
  - {kind: optimize, max_abs_error: 10}
variants:
  fp32: []
  int8: [{kind: quantize_static, types: u8s8, reduce_range: false}]
  fp16: [{kind: to_fp16}]
targets: [{latency_seconds: 0.1}]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A CNN as ONNX, and samples whose labels are its own answers."""
    onnx.save(nets.cnn(), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", **nets.samples_of(nets.cnn(), 32))
    test = nets.samples_of(nets.cnn(), 48, seed=1)
    session = optimize.Session(tmp_path / "model.onnx")
    np.savez(tmp_path / "test.npz", labels=session.run(test)["y"].argmax(1), **test)
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    return tmp_path


def invoke(project: Path, *arguments: str, config: str = "cfg.yaml") -> Result:
    """The command on the project's config."""
    files = [str(project / config), "--runs", str(project / "runs")]
    return CliRunner().invoke(app, ["bisect", *files, *arguments], standalone_mode=False)


def search(project: Path, *arguments: str) -> dict[str, Any]:
    """What ``--json`` prints."""
    result = invoke(project, "--json", *arguments)
    assert result.exception is None, result.exception
    document: dict[str, Any] = json.loads(result.stdout)
    assert result.return_value == (0 if document["search"]["first"] is None else 1)
    for one in filter(None, (document["search"], document["optimizers"])):
        assert len(one["checks"]) <= math.ceil(math.log2(len(one["steps"]))) + 1
    return document


def first(document: dict[str, Any]) -> str | None:
    """The name of the step that was found."""
    found = document["search"]
    name: str | None = None if found["first"] is None else found["steps"][found["first"]]
    return name


def scaling(name: str, factor: float) -> Pass:
    """A pass that damages one weight, and says nothing."""

    def damage(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * factor).astype(np.float32), name))
        return model, []

    return damage


@pytest.mark.parametrize("place", range(7))
def test_a_pass_that_damages_a_weight_is_found_wherever_it_stands(
    project: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """Each place in the list of passes, the last too; the neighbours are left as files that differ by the damage."""
    passes = optimize.PASSES
    monkeypatch.setattr(optimize, "PASSES", (*passes[:place], scaling("w4", 1.1), *passes[place:]))
    document = search(project, "--variant", "int8", "--min-sqnr-db", "60", "--set", "variants.int8=[]")
    assert first(document) == "optimize/damage"
    before, after = (
        next(numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name == "w4")
        for path in (document["files"]["before"], document["files"]["after"])
    )
    np.testing.assert_allclose(after, before * np.float32(1.1), rtol=1e-6)


def test_the_stage_that_quantizes_is_found_and_its_neighbours_are_left(project: Path) -> None:
    """Too strict a limit for int8: the stage is named, the advice has both files, and a run may follow there."""
    document = search(project, "--variant", "int8", "--min-sqnr-db", "60")
    assert first(document) == "int8/quantize_static"
    checks = {check["name"]: check for check in document["search"]["checks"]}
    assert checks["optimize/tidy"]["is_broken"] is False
    assert checks["int8/quantize_static"]["value"] < 60
    assert checks["int8/quantize_static"]["output"] == "y"
    files = document["files"]
    assert not any(node.op_type == "QuantizeLinear" for node in onnx.load(files["before"]).graph.node)
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(files["after"]).graph.node)
    assert document["advice"] == [
        f"onnxshrink explain {files['before']} {files['after']} --data {project / 'test.npz'}"
    ]
    run = CliRunner().invoke(app, ["run", str(project / "cfg.yaml"), "--runs", str(project / "runs"), "-q"])
    assert run.exit_code == 0, run.output


def test_half_precision_is_found(project: Path) -> None:
    """What float16 loses is the stage's doing, not that of the passes before it or the session after it."""
    document = search(project, "--variant", "fp16", "--max-abs-error", "1e-5")
    assert first(document) == "fp16/to_fp16"


def test_nothing_broken_takes_one_check(project: Path) -> None:
    """The session as deployed keeps the limit: exit status 0, one check, no file is left."""
    document = search(project, "--variant", "fp32", "--min-sqnr-db", "60")
    assert first(document) is None
    assert len(document["search"]["checks"]) == 1
    assert not document["files"]
    assert not (project / "runs" / "cfg").exists()


def test_a_drop_of_accuracy_is_found(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the model's own labels a weight turned over costs accuracy, and the pass that did it is named."""
    passes = (*optimize.PASSES[:3], scaling("w4", -1.0), *optimize.PASSES[3:])
    monkeypatch.setattr(optimize, "PASSES", passes)
    document = search(project, "--variant", "fp32", "--max-accuracy-drop", "0.1")
    assert first(document) == "optimize/damage"
    values = {check["name"]: check["value"] for check in document["search"]["checks"]}
    assert values["optimize/damage"] > 0.1
    assert values["optimize/slim"] == 0.0


def test_a_second_search_measures_only_what_is_new(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store keeps stages and checks, whatever the limit: the same steps are not measured again."""
    search(project, "--variant", "int8", "--min-sqnr-db", "60")

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("onnxshrink.search.limits.measure_deviations", refuse)
    again = search(project, "--variant", "int8", "--min-sqnr-db", "55")
    assert first(again) == "int8/quantize_static"


def offset_model() -> onnx.ModelProto:
    """Conv and BatchNormalization whose large offsets cancel: node by node float32 loses what a folded node keeps."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", "scale", "zero", "mean", "variance"], ["n"], name="norm"),
        helper.make_node("Relu", ["n"], ["y"], name="relu"),
    ]
    weights = {
        "w": np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32) / 1000,
        "b": np.full(8, 1000, np.float32), "mean": np.full(8, 1000, np.float32), "scale": np.ones(8, np.float32),
        "zero": np.zeros(8, np.float32), "variance": np.full(8, 1e-5, np.float32),
    }  # fmt: skip
    return nets.model_of(nodes, {"x": ["N", 3, 16, 16]}, {"y": ["N", 8, 14, 14]}, weights)


def test_the_optimizer_that_changes_the_numbers_is_found(tmp_path: Path) -> None:
    """One file against itself: the level that folds is found, then the optimizer, and the session without it keeps it.

    A session of the user's own, with the setting that is advised, says the same.
    """
    path = tmp_path / "model.onnx"
    onnx.save(offset_model(), path)
    arrays = nets.samples_of(offset_model(), 16)
    np.savez(tmp_path / "x.npz", **arrays)
    arguments = ["bisect", str(path), str(path), "--data", str(tmp_path / "x.npz"), "--min-sqnr-db", "60"]
    result = CliRunner().invoke(app, [*arguments, "--json"], standalone_mode=False)
    assert result.return_value == 1, result.output
    document = json.loads(result.stdout)
    assert first(document) == "session at basic"
    found = document["optimizers"]
    culprit = found["steps"][found["first"]]
    assert culprit == "Level1_RuleBasedTransformer"
    assert document["without"]["is_broken"] is False
    assert f'disabled_optimizers=["{culprit}"]' in document["advice"][0]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain, folded, without = (
        ort.InferenceSession(path, *settings, providers=["CPUExecutionProvider"], disabled_optimizers=names).run(
            None, arrays
        )[0]
        for settings, names in (((options,), None), ((), None), ((), [culprit]))
    )
    np.testing.assert_array_equal(without, plain)
    assert 10 * np.log10((plain**2).sum() / ((plain - folded) ** 2).sum()) < 60
    shown = CliRunner().invoke(app, arguments).stdout
    assert f"{culprit} did it; the session without it alone keeps it" in " ".join(shown.split())


def test_a_config_without_stages_is_searched_from_the_session_on(tmp_path: Path) -> None:
    """The first step may be the session's own; the target's level is the last that is looked at."""
    onnx.save(offset_model(), tmp_path / "model.onnx")
    np.savez(tmp_path / "x.npz", **nets.samples_of(offset_model(), 16))
    text = "model: {onnx: model.onnx}\ndata: {calibration: {npz: x.npz}}\ntargets: [{optimization: extended}]\n"
    (tmp_path / "cfg.yaml").write_text(text)
    document = search(tmp_path, "--min-sqnr-db", "60")
    assert document["search"]["steps"] == ["session at basic", "session at extended"]
    assert document["search"]["first"] == 0
    assert document["without"]["is_broken"] is False
    kept = search(tmp_path, "--min-sqnr-db", "60", "--set", "targets[0].optimization=disabled")
    assert kept["search"]["steps"] == ["session at disabled"]
    assert first(kept) is None


@pytest.mark.parametrize(
    ("arguments", "change", "what"),
    [
        (["--variant", "int4", "--min-sqnr-db", "9"], None, "there is no variant 'int4'"),
        (["--min-sqnr-db", "9"], None, "several variants"),
        (["--variant", "int8"], None, "no limit"),
        (
            ["--variant", "fp32", "--max-accuracy-drop", "0", "--set", "data.evaluation.metric=null"],
            None,
            "nothing to measure accuracy with",
        ),
        (
            ["--variant", "fp32", "--max-abs-error", "0"],
            lambda _: "model: {onnx: model.onnx}\nvariants: {fp32: [{kind: optimize}]}\n",
            "nothing to measure drift on",
        ),
    ],
)
def test_a_search_that_cannot_be_is_refused(
    project: Path, arguments: list[str], change: Callable[[str], str] | None, what: str
) -> None:
    """Before any work: an unknown or missing variant, no limit, no data."""
    if change is not None:
        (project / "cfg.yaml").write_text(change(CONFIG))
    result = invoke(project, *arguments)
    assert what in str(result.exception)
    assert not (project / "runs" / ".store").exists()


@pytest.mark.slow
def test_a_torch_run_is_searched_from_the_network_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drift is measured from the last network; accuracy from the teacher, through what was cut and trained again."""
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    document = search(tmp_path, "--variant", "int8", "--min-sqnr-db", "60")
    assert document["reference"] == "torch after finetune"
    assert document["search"]["steps"][0] == "export"
    assert first(document) == "int8/quantize_static"
    document = search(tmp_path, "--variant", "int8", "--max-abs-error", "0")
    assert first(document) == "export"
    assert set(document["files"]) == {"after"}
    document = search(tmp_path, "--variant", "int8", "--max-accuracy-drop", "-1")
    assert document["reference"] == "teacher"
    assert document["search"]["steps"][:3] == ["distill", "prune_channels, finetune", "export"]
    assert first(document) == "distill"
