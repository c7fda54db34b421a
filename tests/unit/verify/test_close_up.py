"""What a quantized model seen from near promises: what `explain` says, in bounds, and never at the run's expense."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import helper, numpy_helper

from onnxshrink.config.data import NpzData
from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.stages.quantize_static import quantize_static
from onnxshrink.verify import close_up
from onnxshrink.verify.close_up import MAX_NODES, node_details
from onnxshrink.verify.explain import explain_models

MACS = 1e6


@pytest.fixture
def pair(tmp_path: Path) -> tuple[onnx.ModelProto, onnx.ModelProto, NpzData]:
    """A float model, the same in 8 bits, and 24 samples."""
    model = nets.cnn()
    source = nets.artifact_of(model, tmp_path / "source")
    (tmp_path / "out").mkdir()
    context = nets.context_of(nets.ArrayReader(nets.samples_of(model, 8)), tmp_path)
    quantize_static(QuantizeStatic(granularity="per_tensor"), source, tmp_path / "out", context)
    np.savez(tmp_path / "x.npz", **nets.samples_of(model, 24))
    return model, onnx.load(tmp_path / "out/model.onnx"), NpzData(npz=tmp_path / "x.npz")


def test_nodes_are_those_of_explain(pair: tuple[onnx.ModelProto, onnx.ModelProto, NpzData]) -> None:
    """The same nodes in the same order with the same decibels, their place in the float graph, on eight samples."""
    reference, model, data = pair
    found = node_details(reference, model, data, MACS, 1000)
    want = explain_models(reference, model, data.model_copy(update={"max_samples": 8}))
    assert (found["samples"], found["measured"]) == (8, len(want.nodes))
    assert [one["node"] for one in found["nodes"]] == [one.node for one in want.nodes]
    for one, other in zip(found["nodes"], want.nodes, strict=True):
        assert one["local_sqnr_db"] == pytest.approx(other.local_sqnr_db, abs=0.006)
        assert reference.graph.node[one["place"]].name == one["node"]
        assert ("text" in one) == (other.finding.cause != "none")
    assert sum(one["noise_ratio"] for one in found["nodes"]) == pytest.approx(1.0, abs=1e-3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert node_details(reference, model, data, MACS, 1000) == found


@pytest.mark.parametrize(
    ("macs", "size", "reason"),
    [(None, 1000, "not known"), (4e9, 1000, "too long"), (MACS, 1 << 30, "1,073,741,824 bytes")],
)
def test_what_costs_too_much_is_declined(
    pair: tuple[onnx.ModelProto, onnx.ModelProto, NpzData], macs: float | None, size: int, reason: str
) -> None:
    """The reason and the command that does look; nothing is run."""
    reference, model, data = pair
    declined = node_details(reference, model, data, macs, size)["declined"]
    assert reason in declined
    assert "onnxshrink explain" in declined


def test_costly_models_get_fewer_samples(pair: tuple[onnx.ModelProto, onnx.ModelProto, NpzData]) -> None:
    """Nodes times multiply-accumulates times samples stay within the bound."""
    reference, model, data = pair
    assert node_details(reference, model, data, close_up.MAX_MACS / 9 / 2.5, 1000)["samples"] == 2


def test_a_graph_that_cannot_be_looked_at_costs_nothing_but_the_picture(
    pair: tuple[onnx.ModelProto, onnx.ModelProto, NpzData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong is the reason."""

    def broken(*_: object) -> None:
        raise KeyError("tensor")

    monkeypatch.setattr(close_up, "explain_models", broken)
    assert node_details(*pair, MACS, 1000) == {"declined": "KeyError: 'tensor'"}


def test_a_long_chain_is_cut_to_its_worst_nodes(tmp_path: Path) -> None:
    """Of 60 products 40 are kept, in a report of less than 20 kB."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": np.linalg.qr(rng.standard_normal((8, 8)))[0].astype(np.float32) for i in range(60)}
    nodes = [helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"t{i + 1}"], name=f"m{i}") for i in range(60)]
    model = nets.model_of(nodes, {"t0": ["N", 8]}, {"t60": ["N", 8]}, weights)
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    for tensor in rounded.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(np.rint(numpy_helper.to_array(tensor) * 64) / np.float32(64), tensor.name)
        )
    np.savez(tmp_path / "x.npz", t0=rng.standard_normal((8, 8)).astype(np.float32))
    found = node_details(model, rounded, NpzData(npz=tmp_path / "x.npz"), 60 * 64, 1000)
    assert (found["measured"], len(found["nodes"])) == (60, MAX_NODES)
    assert len(json.dumps(found)) < 20_000
