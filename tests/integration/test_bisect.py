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
from onnxshrink.core.artifact import Artifact
from onnxshrink.core.errors import ModelError, ProviderError
from onnxshrink.runtime.session import Session
from onnxshrink.stages import optimize
from onnxshrink.stages.passes import Pass
from onnxshrink.verify.checkpoints import Runtime

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


def advised(document: dict[str, Any]) -> tuple[list[str], Result]:
    """The arguments of the command that is advised, and what it does."""
    (line,) = document["advice"]
    program, *arguments = line.split()
    assert program == "onnxshrink"
    return arguments, CliRunner().invoke(app, arguments, standalone_mode=False)


def test_the_advised_command_works_on_one_split_of_the_data(project: Path) -> None:
    """Samples that a plain archive does not hold as they are lie beside the models, at most as many as it reads."""
    arrays = dict(np.load(project / "test.npz"))
    names = np.array(["train"] * 8 + ["test"] * 40)
    np.savez(project / "test.npz", split=names, **arrays)
    split = ("--set", "data.evaluation.split=test")
    document = search(project, "--variant", "int8", "--min-sqnr-db", "60", *split)
    arguments, result = advised(document)
    assert result.exception is None, result.exception
    samples = np.load(arguments[-1])
    np.testing.assert_array_equal(samples["x"], arrays["x"][8:40])


def test_fewer_samples_of_calibration_alone_change_no_model(project: Path) -> None:
    """Where drift is measured on the calibration samples, as few as asked for; ranges still follow from all."""
    text = (project / "cfg.yaml").read_text().replace("  evaluation: {npz: test.npz, metric: top1}\n", "")
    (project / "cfg.yaml").write_text(text)
    whole = search(project, "--variant", "int8", "--min-sqnr-db", "60")
    made = Path(whole["files"]["after"]).read_bytes()
    few = search(project, "--variant", "int8", "--min-sqnr-db", "60", "--max-samples", "4")
    assert first(whole) == first(few) == "int8/quantize_static"
    assert Path(few["files"]["after"]).read_bytes() == made
    assert few["search"]["checks"][0]["value"] != whole["search"]["checks"][0]["value"]


@pytest.mark.parametrize("limit", [("--min-sqnr-db", "20"), ("--max-accuracy-drop", "0.5")])
def test_a_stage_that_cannot_make_its_model_is_the_step_that_broke(
    project: Path, monkeypatch: pytest.MonkeyPatch, limit: tuple[str, str]
) -> None:
    """Exit status 1 with the reason, in JSON and in the table; the model before it is left."""

    def refuse(*_: object) -> None:
        raise ModelError("this network has a node of no known kind")

    monkeypatch.setattr("onnxshrink.stages.quantize_static.quantize_static", refuse)
    document = search(project, "--variant", "int8", *limit)
    assert first(document) == "int8/quantize_static"
    assert document["search"]["steps"][-1] == "int8/quantize_static"
    assert document["search"]["checks"][0]["note"] == "no model: this network has a node of no known kind"
    assert set(document["files"]) == {"before"}
    shown = " ".join(invoke(project, "--variant", "int8", *limit).stdout.split())
    assert "int8/quantize_static broke the limit: no model: this network has a node of no known kind" in shown


def unloadable(path: Path) -> onnx.ModelProto:
    """A model that onnx.checker accepts, with an operator of a domain that ONNX Runtime does not know."""
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "Clip")
    node.op_type, node.domain = "Frobnicate", "acme"
    model.opset_import.append(helper.make_opsetid("acme", 1))
    return model


NO_SESSION = "no session: ONNX Runtime has no operator acme:Frobnicate"


@pytest.mark.parametrize("limit", [("--min-sqnr-db", "20"), ("--max-accuracy-drop", "0.5")])
def test_a_stage_whose_model_does_not_load_is_the_step_that_broke(
    project: Path, monkeypatch: pytest.MonkeyPatch, limit: tuple[str, str]
) -> None:
    """It is the first of all that do not load; both models are left, and no command that would have to run them."""

    def frobnicate(_: Any, source: Artifact, out: Path, __: Any) -> dict[str, Any]:
        onnx.save(unloadable(source.model_path), out / "model.onnx")
        return {}

    monkeypatch.setattr("onnxshrink.stages.to_fp16.to_fp16", frobnicate)
    document = search(project, "--variant", "fp16", *limit)
    assert first(document) == "fp16/to_fp16"
    assert document["search"]["steps"][-1] == "session at all"
    assert {check["note"] for check in document["search"]["checks"] if check["is_broken"]} == {NO_SESSION}
    assert not any(check["runs"] for check in document["search"]["checks"] if check["is_broken"])
    assert set(document["files"]) == {"before", "after"}
    assert document["advice"] == []
    shown = " ".join(invoke(project, "--variant", "fp16", *limit).stdout.split())
    assert f"fp16/to_fp16 broke the limit: {NO_SESSION}." in shown


def test_a_candidate_that_does_not_load_is_broken_and_a_reference_is_a_mistake(project: Path) -> None:
    """Exit status 1 and the graph as the step that broke; 2 where nothing can be measured against."""
    good, bad, junk = project / "model.onnx", project / "bad.onnx", project / "junk.onnx"
    onnx.save(unloadable(good), bad)
    junk.write_bytes(good.read_bytes()[:500])
    options = ["--data", str(project / "test.npz"), "--min-sqnr-db", "20", "--json"]
    for candidate, why in ((bad, NO_SESSION), (junk, "no model: the file cannot be read")):
        found = CliRunner().invoke(app, ["bisect", str(good), str(candidate), *options], standalone_mode=False)
        assert found.return_value == 1, found.exception
        document = json.loads(found.stdout)
        assert first(document) == "graph"
        assert document["search"]["checks"][-1]["note"].startswith(why)
        assert document["advice"] == []
    for candidate in (good, bad):
        refused = CliRunner().invoke(app, ["bisect", str(bad), str(candidate), *options], standalone_mode=False)
        assert isinstance(refused.exception, ModelError)
        assert refused.exception.exit_code == 2


def fixed_to_one(path: Path) -> onnx.ModelProto:
    """A model that loads, and whose answer takes the shape of one sample: ONNX Runtime fails on a batch of more."""
    model = onnx.load(path)
    output = model.graph.output[0]
    node = next(node for node in model.graph.node if output.name in node.output)
    node.output[0] = "before"
    n_classes = output.type.tensor_type.shape.dim[-1].dim_value
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, n_classes]), "one"))
    model.graph.node.append(helper.make_node("Reshape", ["before", "one"], [output.name], name="stuck"))
    return model


@pytest.mark.parametrize("limit", [("--min-sqnr-db", "20"), ("--max-accuracy-drop", "0.5")])
def test_a_stage_whose_model_fails_while_it_runs_is_the_step_that_broke(
    project: Path, monkeypatch: pytest.MonkeyPatch, limit: tuple[str, str]
) -> None:
    """As one whose model does not load: exit status 1, the step and the reason, and both models are left."""

    def fix_to_one(_: Any, source: Artifact, out: Path, __: Any) -> dict[str, Any]:
        onnx.save(fixed_to_one(source.model_path), out / "model.onnx")
        return {}

    monkeypatch.setattr("onnxshrink.stages.to_fp16.to_fp16", fix_to_one)
    document = search(project, "--variant", "fp16", *limit)
    assert first(document) == "fp16/to_fp16"
    notes = {check["note"] for check in document["search"]["checks"] if check["is_broken"]}
    assert all(note.startswith("no answer: ONNX Runtime cannot run the model: ") for note in notes), notes
    assert set(document["files"]) == {"before", "after"}
    assert document["advice"] == []
    assert "fp16/to_fp16 broke the limit: no answer: " in invoke(project, "--variant", "fp16", *limit).stdout


@pytest.mark.parametrize("limit", [("--min-sqnr-db", "20"), ("--max-accuracy-drop", "0.5")])
def test_a_candidate_that_fails_while_it_runs_is_broken_and_a_reference_is_a_mistake(
    project: Path, limit: tuple[str, str]
) -> None:
    """Exit status 1 and the graph as the step that broke; 2 where the reference has no answer to measure against."""
    good, bad = project / "model.onnx", project / "bad.onnx"
    onnx.save(fixed_to_one(good), bad)
    options = ["--data", str(project / "test.npz"), *limit, "--json"]
    found = CliRunner().invoke(app, ["bisect", str(good), str(bad), *options], standalone_mode=False)
    assert found.return_value == 1, found.exception
    assert first(json.loads(found.stdout)) == "graph"
    for candidate in (good, bad):
        refused = CliRunner().invoke(app, ["bisect", str(bad), str(candidate), *options], standalone_mode=False)
        assert isinstance(refused.exception, ModelError)
        assert "cannot run the model" in refused.exception.what
        assert refused.exception.exit_code == 2


def test_a_level_at_which_the_model_does_not_load_is_found(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph itself is sound: the level is named, the one below it advised, and no optimizer accused."""
    open_ = Runtime.open

    def refuse(runtime: Runtime, model: Artifact, **like: Any) -> Session:
        if runtime.optimization in {"extended", "all"}:
            raise ModelError("ONNX Runtime has no kernel on this provider for FusedConv")
        return open_(runtime, model, **like)

    monkeypatch.setattr(Runtime, "open", refuse)
    document = search(project, "--variant", "fp32", "--min-sqnr-db", "20")
    assert first(document) == "session at extended"
    assert document["optimizers"] is None
    assert document["advice"] == [
        "options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_BASIC, and time it again"
    ]


def test_options_that_mean_nothing_are_refused(project: Path) -> None:
    """Those of two models for a config, and the other way round; nothing is passed over in silence."""
    result = invoke(project, "--variant", "int8", "--min-sqnr-db", "20", "--threads", "2", "--metric", "top5")
    assert "--metric and --threads mean nothing for a config" in str(result.exception)
    model, data = str(project / "model.onnx"), str(project / "test.npz")
    arguments = ["bisect", model, model, "--data", data, "--min-sqnr-db", "20"]
    result = CliRunner().invoke(app, [*arguments, "--set", "seed=1"], standalone_mode=False)
    assert "--set means nothing for two models" in str(result.exception)


def test_two_models_are_searched_on_the_provider_that_is_asked_for(project: Path) -> None:
    """Two threads on the CPU are a target; a provider that is not there is told."""
    model, data = str(project / "model.onnx"), str(project / "test.npz")
    arguments = ["bisect", model, model, "--data", data, "--min-sqnr-db", "60"]
    found = CliRunner().invoke(app, [*arguments, "--threads", "2", "--json"], standalone_mode=False)
    assert found.return_value == 0, found.exception
    refused = CliRunner().invoke(app, [*arguments, "--provider", "nowhere"], standalone_mode=False)
    assert isinstance(refused.exception, ProviderError), refused.exception


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
