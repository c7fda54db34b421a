"""The optimize stage: every pass is judged by its numbers, and the facts say what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization import quantize_static as ort_quantize_static

from onnxshrink.config.data import DataRoles, NpzData
from onnxshrink.config.stages import Optimize
from onnxshrink.core.artifact import Artifact
from onnxshrink.core.errors import ModelError, ParityError
from onnxshrink.core.events import Silent
from onnxshrink.runtime.graph import input_specs, is_quantized, output_specs, save_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages import optimize as stage
from onnxshrink.stages.context import Context
from onnxshrink.stages.optimize import optimize
from onnxshrink.stages.passes import Pass


def context(npz: Path | None = None) -> Context:
    """A context with or without calibration data."""

    def no(*_: object) -> Artifact:
        raise NotImplementedError

    data = DataRoles(calibration=NpzData(npz=npz)) if npz else DataRoles()
    return Context("optimize", data, 0, Silent(), open=no, derive=no)


def run(folder: Path, model: onnx.ModelProto, npz: Path | None = None, **settings: Any) -> tuple[dict[str, Any], Path]:
    """The stage's facts, and the file it wrote."""
    source = nets.artifact_of(model, folder / "source")
    out = folder / "out"
    out.mkdir()
    facts = optimize(Optimize(**settings), source, out, context(npz))
    json.dumps(facts, allow_nan=False)
    return facts, out / "model.onnx"


def network(*, pooled: bool = True) -> onnx.ModelProto:
    """Conv, batch norm, Relu, mean over space, MatMul and Add, as an exporter could write them."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "w": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "axes": np.array([2, 3]),
        "m": rng.standard_normal((8, 4)).astype(np.float32),
        "b": rng.standard_normal(4).astype(np.float32),
    } | {name: rng.uniform(0.5, 2, 8).astype(np.float32) for name in ("gamma", "beta", "mean", "var")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"], name="bn"),
        helper.make_node("Relu", ["n"], ["r"], name="relu"),
        helper.make_node("ReduceMean", ["r", "axes"], ["p"], name="mean", keepdims=0),
        helper.make_node("MatMul", ["p", "m"], ["mm"], name="matmul"),
        helper.make_node("Add", ["mm", "b"], ["y"]),
    ]
    outputs: dict[str, list[int | str]] = {"y": ["N", 4]} | ({"p": ["N", 8]} if pooled else {})
    return nets.model_of(nodes, {"x": ["N", 3, 8, 8]}, outputs, weights, opset=18)


def outcomes(facts: dict[str, Any]) -> dict[str, str]:
    """Pass to outcome."""
    return {fact["name"]: fact["outcome"] for fact in facts["passes"]}


def test_a_float_network_becomes_what_onnxruntime_can_quantize(tmp_path: Path) -> None:
    """Batch norm folded, pooling by its name, a Gemm for the layer; interface, opset and numbers as before."""
    before = network(pooled=False)
    facts, path = run(tmp_path, before)
    model = onnx.load(path)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert (input_specs(model), output_specs(model)) == (input_specs(before), output_specs(before))
    assert model.opset_import == before.opset_import
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    x = np.random.default_rng(5).standard_normal((6, 3, 8, 8)).astype(np.float32)
    want = Session(before.SerializeToString()).run({"x": x})["y"]
    np.testing.assert_allclose(Session(path).run({"x": x})["y"], want, rtol=1e-4, atol=1e-5)
    assert facts["batch_norms_left"] == {}


def test_what_was_optimized_runs_in_integers_from_end_to_end(tmp_path: Path) -> None:
    """ONNX Runtime quantizes every node of it; before, batch norm, pooling and the bias stay islands in float."""

    class Calibration:
        def __init__(self) -> None:
            self.batches = iter([{"x": np.random.default_rng(1).standard_normal((8, 3, 8, 8)).astype(np.float32)}])

        def get_next(self) -> object:
            return next(self.batches, None)

    quantized, deployed = tmp_path / "quantized.onnx", tmp_path / "deployed.onnx"
    _, path = run(tmp_path, network(pooled=False))
    ort_quantize_static(path, quantized, Calibration(), per_channel=True)
    Session(quantized, optimization="extended", save_optimized=deployed)
    assert [node.op_type for node in onnx.load(deployed).graph.node] == [
        "QuantizeLinear",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "Flatten",
        "QGemm",
        "DequantizeLinear",
    ]


def test_outputs_in_the_middle_keep_their_names_and_order(tmp_path: Path) -> None:
    """A pass may not move an output that another pass would like to fold away."""
    before = network()
    _, path = run(tmp_path, before)
    assert output_specs(onnx.load(path)) == output_specs(before)
    assert [spec.name for spec in output_specs(before)] == ["y", "p"]


def test_the_facts_add_up(tmp_path: Path) -> None:
    """The changes of the passes and the record of names sum to the model's, and the bytes are the file's."""
    facts, path = run(tmp_path, network())
    assert facts["bytes"] == path.stat().st_size
    for key in ("nodes", "bytes"):
        chain = [facts[f"{key}_before"], *(fact[key] for fact in facts["passes"])]
        assert [fact[f"{key}_before"] for fact in facts["passes"]] == chain[:-1]
        assert facts[key] == chain[-1] + (facts["record_bytes"] if key == "bytes" else 0)
    total = sum(change for fact in facts["passes"] for change in fact["ops"].values())
    assert total == facts["nodes"] - facts["nodes_before"]
    assert facts["ops"]["BatchNormalization"] == -1


def test_real_samples_are_used_where_there_are_any(tmp_path: Path) -> None:
    """The first 32 of the calibration data; the facts name the file."""
    npz = tmp_path / "calibration.npz"
    np.savez(npz, x=np.random.default_rng(0).standard_normal((50, 3, 8, 8)).astype(np.float32))
    facts, _ = run(tmp_path, network(), npz)
    assert facts["samples"] == 32
    assert "calibration.npz" in facts["samples_from"]


def test_without_samples_seeded_values_are_used_and_the_facts_say_so(tmp_path: Path) -> None:
    """At two batch sizes."""
    facts, _ = run(tmp_path, network())
    assert facts["samples_from"] == "seeded random values"
    assert facts["samples"] == 9


def lies(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A pass that doubles the floating weights."""
    for weight in model.graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
    return model, []


def fails(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A pass that has a mistake, after it has spoilt its model."""
    del model.graph.node[:]
    message = "list index out of range"
    raise IndexError(message)


def breaks(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A pass that loses a node."""
    del model.graph.node[0]
    return model, []


def renames(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A pass that calls the output otherwise."""
    model.graph.node[-1].output[0] = "z"
    model.graph.output[0].name = "z"
    return model, []


def leaves(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A pass that writes a node only ONNX Runtime knows."""
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "QuickGelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model, []


def raises_opset(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A pass that writes another opset."""
    model.opset_import[0].version = 19
    return model, []


def swells(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A pass that folds something small into something large."""
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(10_000, np.float32), "zeros"))
    return model, []


def relabels(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A pass that loses the name of the batch axis and forgets the second output."""
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "unk__1"
    model.graph.node[0].name = "renamed"
    del model.graph.output[1]
    return model, []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lies, "the outputs differ by"),
        (fails, "IndexError: list index out of range (after fold_constants)"),
        (breaks, "Nodes in a graph must be topologically sorted"),
        (renames, "ONNX Runtime cannot load the model"),
        (leaves, "com.microsoft"),
        (raises_opset, "changes the opset from 18 to 19"),
        (swells, "grows the model"),
    ],
)
def test_a_pass_that_cannot_be_believed_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: Pass, reason: str
) -> None:
    """Whatever it did wrong: the facts tell, the passes after it go on, and the model is right."""
    passes: Sequence[Pass] = (*stage.PASSES[:2], bad, *stage.PASSES[2:])
    monkeypatch.setattr(stage, "PASSES", passes)
    facts, path = run(tmp_path, network())
    fact = facts["passes"][2]
    assert fact["outcome"] == "declined"
    assert reason in fact["reason"] or bad is renames
    assert fact["ops"] == {}
    assert fact["bytes"] == fact["bytes_before"]
    assert {node.op_type for node in onnx.load(path).graph.node} >= {"Gemm", "GlobalAveragePool"}
    assert facts["max_error"] <= facts["max_abs_error"]


def test_a_pass_need_not_care_for_the_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and outputs are the stage's input's, whatever a pass makes of their names, axes and number."""
    monkeypatch.setattr(stage, "PASSES", (relabels,))
    before = network()
    facts, path = run(tmp_path, before)
    assert outcomes(facts) == {"relabels": "changed"}
    model = onnx.load(path)
    assert (input_specs(model), output_specs(model)) == (input_specs(before), output_specs(before))


def test_an_optimized_model_is_not_made_worse(tmp_path: Path) -> None:
    """Optimizing twice adds no node and loses no digit: no pass undoes another's work."""
    _, path = run(tmp_path / "first", network())
    facts, _ = run(tmp_path / "second", onnx.load(path))
    assert facts["nodes"] == facts["nodes_before"]
    assert set(facts["ops"]) <= {"Flatten", "Reshape"}
    assert facts["max_error"] == 0.0


def test_what_was_written_is_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last comparison is with the file: a model that is spoilt on its way there is refused."""
    monkeypatch.setattr(stage, "save_model", lambda model, out: save_model(lies(model)[0], out))
    with pytest.raises(ParityError, match="after fold_constants, ") as error:
        run(tmp_path, network())
    assert error.value.where == "optimize, on seeded random values"


def test_a_model_that_random_values_do_not_fit_asks_for_samples(tmp_path: Path) -> None:
    """An index that is out of range for zeros and ones: the fix is to give data."""
    node = helper.make_node("Gather", ["w", "i"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
        [numpy_helper.from_array(np.zeros(1, np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(ModelError, match="nothing can be compared") as error:
        run(tmp_path, model)
    assert error.value.fix == "give real samples: data.calibration"


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_a_quantized_model_keeps_its_integer_kernels(tmp_path: Path, form: QuantFormat) -> None:
    """Only what is safe is done, and the facts say why the rest is not."""

    class Calibration:
        def __init__(self) -> None:
            self.batches = iter([nets.samples_of(nets.cnn(), 4)])

        def get_next(self) -> object:
            return next(self.batches, None)

    source, quantized = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    onnx.save(nets.cnn(), source)
    ort_quantize_static(source, quantized, Calibration(), quant_format=form)
    before = onnx.load(quantized)
    facts, path = run(tmp_path, before)
    assert is_quantized(before)
    after = onnx.load(path)
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]
    assert outcomes(facts)["fold_constants"] == "declined"
    assert facts["max_error"] == 0.0
    assert facts["bytes"] <= facts["bytes_before"]


def test_a_batch_norm_that_stays_is_named_with_the_reason(tmp_path: Path) -> None:
    """It will be an island in float: the user should know which and why."""
    weights: dict[str, Any] = {name: np.ones(3, np.float32) for name in ("gamma", "beta", "mean", "var")}
    norm = helper.make_node("BatchNormalization", ["x", "gamma", "beta", "mean", "var"], ["n"], name="bn")
    nodes = [norm, helper.make_node("Relu", ["n"], ["y"], name="relu")]
    facts, _ = run(tmp_path, nets.model_of(nodes, {"x": ["N", 3, 4, 4]}, {"y": ["N", 3, 4, 4]}, weights))
    assert facts["batch_norms_left"] == {"bn": "it follows an input, which has no weights to fold it into"}


def test_external_data_comes_inside(tmp_path: Path) -> None:
    """A model whose weights lie beside it is read whole and written as one file."""
    folder = tmp_path / "source"
    folder.mkdir()
    onnx.save(network(), folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    out = tmp_path / "out"
    out.mkdir()
    source = Artifact("onnx", folder, hashlib.sha256().hexdigest())  # type: ignore[arg-type]
    optimize(Optimize(), source, out, context())
    assert [path.name for path in out.iterdir()] == ["model.onnx"]
    Session(out / "model.onnx")


_PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_optimize import network, run
_, path = run(Path(sys.argv[2]), network())
sys.stdout.buffer.write(path.read_bytes())
"""


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    """Sets and dicts of other libraries iterate otherwise in another process; the file is the same."""
    results = []
    for seed in ("0", "4711"):
        command = [sys.executable, "-c", _PROGRAM, str(Path(__file__).parent), str(tmp_path / seed)]
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(nets.__file__).parent)}
        results.append(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    assert results[0] == results[1]
    assert onnx.load_from_string(results[0]).graph.node


def test_the_stage_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """None of the optimizers prints or logs."""
    run(tmp_path, network())
    assert capfd.readouterr() == ("", "")


def scaled() -> onnx.ModelProto:
    """A scalar and a table come first, then samples ``x[N,3]``: ``y = x * scale + mean of table``."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["s"]),
        helper.make_node("ReduceMean", ["table"], ["m"], axes=[0], keepdims=0),
        helper.make_node("Add", ["s", "m"], ["y"]),
    ]
    return nets.model_of(nodes, {"scale": [], "table": [1000, 3], "x": ["N", 3]}, {"y": ["N", 3]}, {})


def test_what_holds_no_samples_is_not_counted(tmp_path: Path) -> None:
    """A scalar input has no samples, and a table of 1,000 rows is no 1,000 samples."""
    arrays = {"scale": np.float32(2), "table": np.ones((1000, 3), np.float32), "x": np.ones((20, 3), np.float32)}
    np.savez(tmp_path / "data.npz", **arrays)
    assert run(tmp_path / "real", scaled(), tmp_path / "data.npz")[0]["samples"] == 20
    assert run(tmp_path / "random", scaled())[0]["samples"] == 9


def test_a_model_of_ir_version_3_is_optimized(tmp_path: Path) -> None:
    """Weights that old exporters list as inputs are weights: the network gets what a later one gets."""
    model = network()
    later, _ = run(tmp_path / "later", model)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.ir_version = 3
    facts, path = run(tmp_path / "old", model)
    assert [(fact["name"], fact["outcome"]) for fact in facts["passes"]] == [
        (fact["name"], fact["outcome"]) for fact in later["passes"]
    ]
    assert facts["ops"] == later["ops"] != {}
    assert [value.name for value in onnx.load(path).graph.input] == ["x"]
