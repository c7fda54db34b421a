"""package_ort: files for devices that give the model's own numbers, and what they need there."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models as nets
import pytest
from onnx import helper, numpy_helper
from onnxruntime.tools import convert_onnx_models_to_ort as theirs

from onnxshrink.config.load import validate
from onnxshrink.config.stages import PackageOrt, QuantizeStatic
from onnxshrink.core.artifact import Artifact, Facts, digest_folder
from onnxshrink.core.errors import ConfigError, ParityError
from onnxshrink.runtime.graph import graphs_of
from onnxshrink.runtime.ort_format import OrtConversion, open_ort, required_operators
from onnxshrink.runtime.session import Session
from onnxshrink.stages import package_ort as stage
from onnxshrink.stages.instruction_sets import instruction_sets
from onnxshrink.stages.package_ort import package_ort
from onnxshrink.stages.quantize_static import quantize_static


def run_stage(folder: Path, source: Artifact, **settings: Any) -> Facts:
    (folder / "out").mkdir()
    return package_ort(PackageOrt(**settings), source, folder / "out", nets.context_of(nets.ArrayReader({}), folder))


def quantized(folder: Path, **settings: Any) -> Artifact:
    """The small network in 8 bits."""
    model = nets.cnn()
    source, out = nets.artifact_of(model, folder / "float"), folder / "int8"
    out.mkdir()
    context = nets.context_of(nets.ArrayReader(nets.samples_of(model, 32)), folder / "quantize")
    quantize_static(QuantizeStatic(**settings), source, out, context)
    return Artifact("onnx", out, digest_folder(out))


def contents(path: Path) -> dict[str, Any]:
    """What ONNX Runtime's own reader finds in an ``.ort`` file: nodes in order, and every weight's bytes."""
    from ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    graph = InferenceSession.GetRootAsInferenceSession(path.read_bytes(), 0).Model().Graph()
    nodes = [graph.Nodes(at) for at in range(graph.NodesLength())]
    weights = [graph.Initializers(at) for at in range(graph.InitializersLength())]
    names = [
        (node.Domain(), node.OpType(), *map(node.Inputs, range(node.InputsLength())), b"to", node.Outputs(0))
        for node in nodes
    ]
    return {
        "nodes": sorted(names),
        "weights": {tensor.Name(): (tensor.DataType(), tensor.RawDataAsNumpy().tobytes()) for tensor in weights},
        "noted": graph.RuntimeOptimizations() is not None,
    }


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_the_files_give_the_models_own_numbers(tmp_path: Path, kind: str) -> None:
    """On samples that the stage has not seen, both styles give the deployed model's outputs; the model is untouched."""
    source = quantized(tmp_path) if kind == "int8" else nets.artifact_of(nets.cnn(), tmp_path / "source")
    facts = run_stage(tmp_path, source)
    out, samples = tmp_path / "out", nets.samples_of(nets.cnn(), 5, seed=7)
    assert (out / "model.onnx").read_bytes() == source.model_path.read_bytes()
    want = Session(source.model_path).run(samples)["y"]
    for style, found in facts["files"].items():
        got = open_ort(out / found["file"], replay=style == "runtime").run(samples)["y"]
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert found["bytes"] == (out / found["file"]).stat().st_size
        assert found["max_error_from_deployed"] < 1e-5
    assert list(facts["files"]) == ["fixed", "runtime"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # their reader leaves files open
@pytest.mark.parametrize("level", ["basic", "extended"])
def test_the_files_are_those_of_onnx_runtimes_own_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: Any
) -> None:
    """Equal nodes and weights, and an equal list of operators and types; the order of some tables is by chance."""
    source = quantized(tmp_path)
    run_stage(tmp_path, source, level=level)
    monkeypatch.setenv("ORT_CONVERT_ONNX_MODELS_TO_ORT_OPTIMIZATION_LEVEL", level)
    model = tmp_path / "theirs" / "model.onnx"
    model.parent.mkdir()
    model.write_bytes(source.model_path.read_bytes())
    with contextlib.redirect_stdout(io.StringIO()):
        theirs.convert_onnx_models_to_ort(
            model, optimization_styles=list(theirs.OptimizationStyle), enable_type_reduction=True
        )
    for ours, suffix in (("model.ort", ""), ("model.with_runtime_opt.ort", ".with_runtime_opt")):
        assert contents(tmp_path / "out" / ours) == contents(model.with_suffix(f".{level}{suffix}.ort"))
    assert contents(tmp_path / "out/model.with_runtime_opt.ort")["noted"] == (level == "extended")
    lists = [path.read_text() for path in model.parent.glob(f"*.{level}*.config")]
    expected = {key for text in lists for key in required_operators(text)}
    assert len(lists) == 2
    assert set(required_operators((tmp_path / "out/required_operators_and_types.config").read_text())) == expected


def test_the_required_operators_are_those_of_the_graph(tmp_path: Path) -> None:
    """The list names what a walk over the optimized graph finds, and with both styles what the basic graph has too."""
    source = quantized(tmp_path)
    facts = run_stage(tmp_path, source, styles=("fixed",), type_reduction=False)
    graph = OrtConversion().graph(source.model_path, "fixed")
    walked = {(node.domain or "ai.onnx", node.op_type) for part in graphs_of(graph.graph) for node in part.node}
    found = required_operators((tmp_path / "out" / facts["required"]).read_text())
    assert set(found) == walked
    assert ("ai.onnx", "QLinearConv") in found
    assert facts["required"] == "required_operators.config"
    (tmp_path / "both").mkdir()
    both = run_stage(tmp_path / "both", source)
    assert {"ai.onnx:Conv:11", "ai.onnx:QLinearConv:10"} <= set(both["operators"])


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    """Nodes, weights and sizes are the same again, and no path of this machine gets into the list of operators."""
    found = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        facts = run_stage(folder, nets.artifact_of(nets.cnn(), folder / "source"))
        required = (folder / "out/required_operators_and_types.config").read_text()
        assert str(tmp_path) not in required
        found.append((facts, required, [contents(folder / "out" / file["file"]) for file in facts["files"].values()]))
    assert found[0] == found[1]


def test_other_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose weights are not the model's is an error that names the file, the output and the distance."""
    other = nets.cnn()
    bias = next(tensor for tensor in other.graph.initializer if tensor.name == "b4")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.5), "b4"))
    wrong = nets.artifact_of(other, tmp_path / "wrong").model_path
    write = OrtConversion.write

    def write_wrong(self: OrtConversion, _: Path, out: Path, style: Any) -> None:
        write(self, wrong, out, style)

    monkeypatch.setattr(OrtConversion, "write", write_wrong)
    with pytest.raises(ParityError) as error:
        run_stage(tmp_path, nets.artifact_of(nets.cnn(), tmp_path / "source"))
    assert "'y' of model.ort" in error.value.what
    distance = float(str(error.value.got).split("= ")[1].split()[0])
    assert 0.1 < distance <= 0.5
    assert "level" in str(error.value.fix)


def test_a_bit_is_a_difference(tmp_path: Path) -> None:
    """The comparison has no tolerance: the last bit of one output is enough."""
    model = nets.cnn()
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "b4")
    values = numpy_helper.to_array(bias).copy()
    first = nets.artifact_of(model, tmp_path / "first")
    values[0] += np.spacing(np.abs(values[0])) * 4
    bias.CopyFrom(numpy_helper.from_array(values, "b4"))
    second = nets.artifact_of(model, tmp_path / "second")
    sessions = [Session(artifact.model_path) for artifact in (first, second)]
    evidence = stage.evidence_of(sessions[0], nets.context_of(nets.ArrayReader({}), tmp_path))
    stage._require_equal(sessions[0], sessions[0], evidence, where="test")
    with pytest.raises(ParityError, match="'y'"):
        stage._require_equal(*sessions, evidence, where="test")


@pytest.mark.parametrize(
    ("types", "platform", "pair"), [("u8s8", "any", "u8s8"), ("s8s8", "any", "u8s8"), ("s8s8", "arm", "s8s8")]
)
def test_products_have_the_types_of_the_platform(tmp_path: Path, types: Any, platform: Any, pair: str) -> None:
    """Signed activations stay signed for arm alone."""
    facts = run_stage(tmp_path, quantized(tmp_path, types=types, isa="x86_vnni"), platform=platform)
    products = facts["files"]["fixed"]["instruction_sets"]["integer_products"]
    assert max(products, key=products.get) == pair
    assert facts["files"]["fixed"]["instruction_sets"]["host_specific_nodes"] == 0


def test_seven_bits_cannot_saturate(tmp_path: Path) -> None:
    """With 8-bit weights some products may, with 7-bit weights none, and a float model has none."""
    found = {}
    for name, reduce_range in (("full", False), ("reduced", True)):
        (tmp_path / name).mkdir()
        source = quantized(tmp_path / name, reduce_range=reduce_range, types="u8s8")
        found[name] = instruction_sets(OrtConversion().graph(source.model_path, "fixed"))
    assert found["full"]["integer_products"] == found["reduced"]["integer_products"] == {"u8s8": 4}
    assert found["full"]["may_saturate"] > 0 == found["reduced"]["may_saturate"]
    assert "VNNI" in found["full"]["x86"]
    assert "exact on any x86-64" in found["reduced"]["x86"]
    assert instruction_sets(nets.cnn())["integer_products"] == {}


def test_a_host_specific_layout_is_told() -> None:
    """One node in the blocked layout ties the file to its processor."""
    model = nets.cnn()
    model.graph.node.append(helper.make_node("Conv", ["x", "w1"], ["other"], domain="com.microsoft.nchwc"))
    assert instruction_sets(model)["host_specific_nodes"] == 1
    assert "written on" in instruction_sets(model)["minimum"]


def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    """A level that ties a file to this machine is none to choose, and nothing may come behind the package."""
    model = nets.artifact_of(nets.cnn(), tmp_path / "model").model_path
    config: dict[str, Any] = {"model": {"onnx": str(model)}}
    with pytest.raises(ConfigError, match="level"):
        validate(config | {"variants": {"a": [{"kind": "package_ort", "level": "all"}]}}, base=tmp_path)
    with pytest.raises(ConfigError, match="'optimize' changes the model") as error:
        validate(config | {"variants": {"a": [{"kind": "package_ort"}, {"kind": "optimize"}]}}, base=tmp_path)
    assert "variants.a[1]" in str(error.value.where)
    validate(config | {"variants": {"a": [{"kind": "package_ort", "platform": "arm"}]}}, base=tmp_path)
