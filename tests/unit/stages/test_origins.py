"""The user excludes nodes by the names in the user's own file, whatever was fused since."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import helper

from onnxshrink.config.data import DataRoles
from onnxshrink.config.stages import Optimize, QuantizeStatic
from onnxshrink.core.artifact import Artifact, digest_folder
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.events import Silent
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.optimize import optimize
from onnxshrink.stages.origins import origins, record_origins
from onnxshrink.stages.quantize_static import quantize_static


def exported(*, opset: int = 17) -> onnx.ModelProto:
    """Conv and batch norm, then two linear layers as torch exports them, the second beside shape arithmetic."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "m1": rng.standard_normal((8, 8)).astype(np.float32),
        "m2": rng.standard_normal((8, 4)).astype(np.float32),
        "b1": rng.standard_normal(8).astype(np.float32),
        "b2": rng.standard_normal(4).astype(np.float32),
        "flat": np.array([0, -1]),
        "one": np.array(1),
    } | {name: rng.uniform(0.5, 2, 8).astype(np.float32) for name in ("gamma", "beta", "mean", "var")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="/conv/Conv"),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"], name="/bn/BatchNorm"),
        helper.make_node("Relu", ["n"], ["r"], name="/relu/Relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="/pool"),
        helper.make_node("Mul", ["flat", "one"], ["shape"], name="/shape/Mul"),
        helper.make_node("Reshape", ["p", "shape"], ["f"], name="/Reshape"),
        helper.make_node("MatMul", ["f", "m1"], ["mm1"], name="/fc1/MatMul"),
        helper.make_node("Add", ["mm1", "b1"], ["a1"], name="/fc1/Add"),
        helper.make_node("Relu", ["a1"], ["r1"], name="/fc1/Relu"),
        helper.make_node("MatMul", ["r1", "m2"], ["mm2"], name="/fc2/MatMul"),
        helper.make_node("Add", ["mm2", "b2"], ["y"], name="/fc2/Add"),
    ]
    return nets.model_of(nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 4]}, weights, opset=opset)


def optimized(folder: Path, model: onnx.ModelProto) -> Artifact:
    """The model after the stage."""
    source = nets.artifact_of(model, folder / "source")
    out = folder / "optimized"
    out.mkdir()
    context = nets.context_of(nets.ArrayReader({}), folder)
    optimize(Optimize(), source, out, Context("optimize", DataRoles(), 0, Silent(), context.open, context.derive))
    return Artifact("onnx", out, digest_folder(out))


def excluding(folder: Path, source: Artifact, *names: str) -> dict[str, str]:
    """Nodes that quantization leaves in float because of the config, and why."""
    out = folder / "int8"
    out.mkdir()
    reader = nets.ArrayReader(nets.samples_of(exported(), 16))
    facts = quantize_static(QuantizeStatic(exclude_nodes=names), source, out, nets.context_of(reader, folder))
    return {node: reason for node, reason in facts["float_nodes"].items() if reason.startswith("excluded")}


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("name", ["/fc1/MatMul", "/fc1/Add"])
def test_either_name_of_what_was_fused_excludes_the_fused_node(tmp_path: Path, name: str, opset: int) -> None:
    """MatMul and Add became one Gemm of a third name; the user's names still mean it, and nothing else."""
    source = optimized(tmp_path, exported(opset=opset))
    gemm = next(node for node in onnx.load(source.model_path).graph.node if "a1" in node.output)
    assert gemm.op_type == "Gemm"
    assert name != gemm.name
    assert excluding(tmp_path, source, name) == {gemm.name: f"excluded in the config as {name!r}"}


def test_a_folded_batch_norm_is_its_convolution(tmp_path: Path) -> None:
    """Whoever excludes the batch norm means the Conv that it was folded into."""
    source = optimized(tmp_path, exported())
    conv = next(node.name for node in onnx.load(source.model_path).graph.node if node.op_type == "Conv")
    assert set(excluding(tmp_path, source, "/bn/BatchNorm")) == {conv}


def test_names_of_the_optimized_graph_still_work(tmp_path: Path) -> None:
    """A name that is in the optimized file is taken as it is."""
    source = optimized(tmp_path, exported())
    conv = next(node.name for node in onnx.load(source.model_path).graph.node if node.op_type == "Conv")
    assert excluding(tmp_path, source, conv) == {conv: "excluded in the config"}


def test_a_fused_name_is_suggested_for_a_typo(tmp_path: Path) -> None:
    """The suggestion is the name in the user's file, not the node of another layer that looks like it."""
    source = optimized(tmp_path, exported())
    with pytest.raises(ConfigError) as caught:
        excluding(tmp_path, source, "/fc1/MatMull")
    assert caught.value.fix == "did you mean '/fc1/MatMul'?"


def test_what_was_folded_into_a_constant_is_nowhere(tmp_path: Path) -> None:
    """Shape arithmetic that became a constant is recorded at no node."""
    assert "/shape/Mul" not in origins(onnx.load(optimized(tmp_path, exported()).model_path))


def test_records_survive_a_second_optimization() -> None:
    """What a node stood for before is carried to the node that stands for it now."""
    before, between, after = exported(), exported(), exported()
    for model, name in ((between, "fused"), (after, "fused again")):
        del model.graph.node[7]
        model.graph.node[6].CopyFrom(helper.make_node("Gemm", ["f", "m1", "b1"], ["a1"], name=name))
    record_origins(before, between)
    record_origins(between, after)
    assert origins(after) == {"/fc1/MatMul": ["fused again"], "/fc1/Add": ["fused again"], "fused": ["fused again"]}


def test_records_change_no_number_and_pass_the_checker(tmp_path: Path) -> None:
    """ONNX Runtime and the checker take the file, and its size grows by no more than the names."""
    path = optimized(tmp_path, exported()).model_path
    onnx.checker.check_model(str(path), full_check=True)
    x = nets.samples_of(exported(), 4)
    want = Session(exported().SerializeToString()).run(x)["y"]
    np.testing.assert_allclose(Session(path).run(x)["y"], want, rtol=1e-4, atol=1e-5)
