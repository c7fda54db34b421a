"""The mixed scheme: the node that is worst in 8 bits is found and returned to float, and nothing gets worse by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import numpy_helper

from onnxshrink.calibration.prepare import QUANTIZABLE_OP_TYPES, prepare
from onnxshrink.config.data import DataRoles, NpzData
from onnxshrink.config.stages import QuantizeMixed, QuantizeStatic
from onnxshrink.core.drift import Drift
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.quantize_mixed import quantize_mixed
from onnxshrink.stages.quantize_static import quantize_static
from onnxshrink.stages.sensitivity import node_groups
from onnxshrink.verify.coverage import audit


def planted() -> onnx.ModelProto:
    """The small CNN whose ``conv3`` has huge weights for a channel that is always zero: one scale cannot serve them."""
    model = nets.cnn()
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, index, value in (("w2", 0, 0.0), ("b2", 0, 0.0), ("w3", (slice(None), 0), 100.0)):
        array = numpy_helper.to_array(tensors[name]).copy()
        array[index] = value
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    return model


def context(model: onnx.ModelProto, folder: Path) -> Context:
    """A context with 32 seeded samples, in memory and on disk."""
    reader = nets.ArrayReader(nets.samples_of(model, 32))
    np.savez(folder / "samples.npz", **reader.arrays)
    return replace(nets.context_of(reader, folder), data=DataRoles(calibration=NpzData(npz=folder / "samples.npz")))


def run_stage(
    folder: Path, model: onnx.ModelProto, settings: QuantizeMixed | QuantizeStatic
) -> tuple[dict[str, Any], Path]:
    """The stage's facts, and its file."""
    source, out = nets.artifact_of(model, folder / "source"), folder / "out"
    out.mkdir()
    ctx = context(model, folder)
    if isinstance(settings, QuantizeMixed):
        facts = quantize_mixed(settings, source, out, ctx)
    else:
        facts = quantize_static(settings, source, out, ctx)
    json.dumps(facts, allow_nan=False)
    return facts, out / "model.onnx"


def mixed(**settings: Any) -> QuantizeMixed:
    defaults = {"types": "u8s8", "granularity": "per_tensor", "reduce_range": False, "bias_correction": False}
    return QuantizeMixed.model_validate(defaults | {"max_float_ratio": 1.0} | settings)


def drift_db(model: onnx.ModelProto, path: Path) -> float:
    """SQNR on samples that neither calibration nor the search has seen."""
    test = nets.samples_of(model, 64, seed=9)
    want, got = Session(model.SerializeToString()).run(test)["y"], Session(path).run(test)["y"]
    return Drift("y").update(want, got).sqnr_db


def test_the_planted_node_is_found(tmp_path: Path) -> None:
    """The node that 8 bits ruin is ranked first, is the one that returns to float, and really runs in float."""
    model = planted()
    facts, path = run_stage(tmp_path, model, mixed(min_sqnr_db=25))
    assert facts["sensitivity"][0]["nodes"] == ["conv3", "add3", "pool", "flat"]
    assert facts["returned"] == ["conv3", "add3", "pool", "flat"]
    assert facts["sqnr_db_int8"] < 15
    assert facts["sqnr_db_mixed"] > 25
    assert facts["reached"]
    assert drift_db(model, path) > 25
    in_float = {row.name for row in audit(path).rows if not row.integer_macs}
    assert in_float == {"conv3"}


def test_the_result_is_that_of_its_patch(tmp_path: Path) -> None:
    """Static quantization with the returned nodes excluded writes the same bytes, so the search need not run again."""
    settings = mixed(min_sqnr_db=25, bias_correction=True)
    facts, path = run_stage(tmp_path / "mixed", planted(), settings)
    _, patched = run_stage(tmp_path / "static", planted(), settings.static(tuple(facts["returned"])))
    assert patched.read_bytes() == path.read_bytes()


def test_the_same_again(tmp_path: Path) -> None:
    """The search gives the same bytes and the same facts again."""
    (first, a), (second, b) = (run_stage(tmp_path / name, planted(), mixed(min_sqnr_db=60)) for name in "ab")
    assert (first, a.read_bytes()) == (second, b.read_bytes())


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0])
def test_never_worse_than_int8(tmp_path: Path, granularity: str, ratio: float) -> None:
    """A drift out of reach costs no more work than was allowed, and the result is at least as near as all-int8."""
    settings = mixed(min_sqnr_db=200, granularity=granularity, max_float_ratio=ratio)
    facts, path = run_stage(tmp_path / "mixed", planted(), settings)
    _, int8 = run_stage(tmp_path / "int8", planted(), settings.static(()))
    assert facts["float_ratio"] <= ratio
    assert facts["sqnr_db_mixed"] is None or facts["sqnr_db_mixed"] >= facts["sqnr_db_int8"]
    assert drift_db(planted(), path) > drift_db(planted(), int8) - 0.5
    assert not facts["reached"] or facts["sqnr_db_mixed"] is None


def test_what_is_good_enough_stays_int8(tmp_path: Path) -> None:
    """Where all-int8 reaches the drift, nothing returns to float."""
    facts, path = run_stage(tmp_path, nets.cnn(), mixed(min_sqnr_db=10))
    assert (facts["returned"], facts["float_ratio"], facts["float_nodes"]) == ([], 0, {})
    assert audit(path).ratio == 1.0


def test_excluded_nodes_are_no_candidates(tmp_path: Path) -> None:
    """What the config leaves in float stays so and is not measured."""
    facts, _ = run_stage(tmp_path, planted(), mixed(min_sqnr_db=25, exclude_nodes=["conv3"]))
    assert "conv3" in facts["float_nodes"]
    assert "conv3" not in {name for one in facts["sensitivity"] for name in one["nodes"]}


def test_nothing_to_quantize_is_declined(tmp_path: Path) -> None:
    """A model without quantizable nodes comes out as it went in."""
    node = onnx.helper.make_node("Erf", ["x"], ["y"])
    facts, path = run_stage(tmp_path, nets.model_of([node], {"x": ["N", 4]}, {"y": ["N", 4]}, {}), mixed())
    assert "no node" in facts["declined"]
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Erf"]


@pytest.mark.parametrize("model", [nets.cnn(), nets.attention(mark=-100.0)])
def test_groups_are_a_partition(model: onnx.ModelProto) -> None:
    """Every quantizable node that is not excluded is in one group, and a product begins each."""
    prepared = prepare(model, where="test")
    groups = node_groups(prepared, QUANTIZABLE_OP_TYPES, {"conv2", "query"})
    expected = [n.name for n in prepared.graph.node if n.op_type in QUANTIZABLE_OP_TYPES]
    assert sorted(name for group in groups for name in group) == sorted(set(expected) - {"conv2", "query"})
    kinds = {node.name: node.op_type for node in prepared.graph.node}
    products = [kinds[name] for group in groups for name in group[1:]]
    assert not {"Conv", "Gemm", "MatMul"} & set(products)
