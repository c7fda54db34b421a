"""The mixed scheme: each node gets what serves it best, and the whole is never worse than one scheme for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from known_times import KnownTimes
from onnx import helper, numpy_helper

from onnxshrink.calibration.prepare import QUANTIZABLE_OP_TYPES, prepare
from onnxshrink.config.data import DataRoles, NpzData
from onnxshrink.config.stages import QuantizeMixed, QuantizeStatic
from onnxshrink.core.drift import Drift
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.core.tensors import Array, Batch
from onnxshrink.runtime.profile import Kernels
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


def uneven(samples: dict[str, Any]) -> dict[str, Any]:
    """The samples, those of the input ``s`` each larger or smaller than the last by orders of magnitude."""
    if "s" not in samples:
        return samples
    sizes = np.float32(10) ** (np.arange(len(samples["s"])) % 7 - 3)
    return samples | {"s": samples["s"] * sizes[:, None].astype(np.float32)}


def two_branches() -> onnx.ModelProto:
    """An image through two Convs, and a vector of any size through a MatMul whose result is made one long.

    No fixed range can serve the vector, and each one's own range does.
    """
    rng = np.random.default_rng(3)

    def weight(*shape: int) -> Any:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c2"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("MatMul", ["s", "w3"], ["t"], name="product"),
        helper.make_node("LpNormalization", ["t"], ["n"], name="unit", axis=-1, p=2),
        helper.make_node("Concat", ["f", "n"], ["y"], name="both", axis=-1),
    ]
    weights = {"w1": weight(16, 3, 3, 3), "w2": weight(16, 16, 3, 3), "w3": weight(64, 16)}
    return nets.model_of(nodes, {"x": ["N", 3, 8, 8], "s": ["N", 64]}, {"y": ["N", 32]}, weights)


def context(model: onnx.ModelProto, folder: Path) -> Context:
    """A context with 32 seeded samples, in memory and on disk."""
    reader = nets.ArrayReader(uneven(nets.samples_of(model, 32)))
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
        facts = quantize_mixed(settings, source, out, ctx, stopwatch=KnownTimes())
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


def singly(model: onnx.ModelProto, path: Path) -> float:
    """SQNR on samples that neither calibration nor the search has seen, one at a time."""
    drift = Drift("y")
    test = uneven(nets.samples_of(model, 28, seed=9))
    want, got = Session(model.SerializeToString()), Session(path)
    for place in range(28):
        sample = {name: array[place : place + 1] for name, array in test.items()}
        drift = drift.update(want.run(sample)["y"], got.run(sample)["y"])
    return drift.sqnr_db


def test_the_planted_node_is_found(tmp_path: Path) -> None:
    """The node that 8 bits ruin is ranked first, is the one that returns to float, and really runs in float."""
    model = planted()
    facts, path = run_stage(tmp_path, model, mixed(min_sqnr_db=25, max_float_ratio=0.9))
    assert facts["sensitivity"][0]["nodes"] == ["conv3", "add3", "pool", "flat"]
    assert facts["base"] == "static"
    assert facts["assigned"] == dict.fromkeys(["conv3", "add3", "pool", "flat"], "float")
    assert facts["sqnr_db_base"] < 15
    assert facts["sqnr_db_mixed"] > 25
    assert facts["reached"]
    assert drift_db(model, path) > 25
    in_float = {row.name for row in audit(path).rows if not row.integer_macs}
    assert in_float == {"conv3"}


def test_each_node_gets_what_serves_it(tmp_path: Path) -> None:
    """Convs stay static, the product over vectors of any size becomes dynamic, and both run in integer kernels."""
    facts, path = run_stage(tmp_path, two_branches(), mixed(min_sqnr_db=25, max_float_ratio=0.1))
    assert facts["base"] == "static"
    assert facts["assigned"] == {"product": "dynamic", "both": "float"}
    assert facts["sqnr_db_base"] < 15
    assert facts["reached"]
    assert singly(two_branches(), path) > 25
    assert audit(path).ratio == 1.0
    assert {row.op_type for row in audit(path).rows} >= {"QLinearConv"}
    assert "DynamicQuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize(("scheme", "op_type"), [("dynamic", "MatMulInteger"), ("weights", "MatMulNBits")])
def test_schemes_that_are_left_out_are_not_used(tmp_path: Path, scheme: str, op_type: str) -> None:
    """With one scheme beside static that one takes the product, in the form that ONNX Runtime has a kernel for."""
    settings = mixed(min_sqnr_db=25, schemes=["static", scheme], max_float_ratio=0.1)
    facts, path = run_stage(tmp_path, two_branches(), settings)
    assert facts["assigned"] == {"product": scheme, "both": "float"}
    assert op_type in {node.op_type for node in onnx.load(path).graph.node}
    assert {one["scheme"] for one in facts["sensitivity"]} == {scheme}


@pytest.mark.parametrize("schemes", [["static", "float"], ["static", "dynamic"], ["static", "weights", "float"]])
def test_overrides_reproduce_the_bytes(tmp_path: Path, schemes: list[str]) -> None:
    """One scheme and overrides write what the search found, without measuring; so do overrides of every node."""
    settings = mixed(min_sqnr_db=25, schemes=schemes, max_float_ratio=0.3, bias_correction=True)
    facts, path = run_stage(tmp_path / "found", two_branches(), settings)
    assert facts["assigned"]
    short = settings.model_copy(update={"schemes": (facts["base"],), "overrides": facts["assigned"]})
    again, same = run_stage(tmp_path / "short", two_branches(), short)
    assert same.read_bytes() == path.read_bytes()
    assert "sensitivity" not in again
    full = dict.fromkeys(["conv1", "relu1", "conv2", "pool", "flat", "product", "both"], "static") | facts["assigned"]
    again, same = run_stage(tmp_path / "full", two_branches(), settings.model_copy(update={"overrides": full}))
    assert same.read_bytes() == path.read_bytes()
    assert "sensitivity" not in again


@pytest.mark.parametrize("other", ["static", "dynamic", "weights", "float"])
@pytest.mark.parametrize("scheme", ["static", "dynamic", "weights", "float"])
def test_nodes_that_share_weights_become_different_things(tmp_path: Path, scheme: str, other: str) -> None:
    """Whatever two nodes with the same weights become, each really is that, and the outputs are near."""
    model, fixed = nets.tied(), {"tied1": scheme, "tied2": other}
    _, path = run_stage(tmp_path, model, mixed(schemes=["static"], overrides=fixed))
    rows = {row.name: row.op_type for row in audit(path).rows}
    weights = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    nodes = {node.name.removesuffix("_quant"): node for node in onnx.load(path).graph.node}
    for name, asked in fixed.items():
        node = nodes[name]
        form = {"MatMulInteger": "dynamic", "MatMulNBits": "weights"}.get(node.op_type)
        is_float = weights.get(node.input[1]) == onnx.TensorProto.FLOAT
        assert (form or ("float" if is_float else "static")) == asked
    assert len(rows) == 4
    assert singly(model, path) > 25


@pytest.mark.parametrize("schemes", [["dynamic", "float"], ["static", "dynamic", "weights", "float"]])
def test_overrides_reproduce_shared_weights(tmp_path: Path, schemes: list[str]) -> None:
    """What the search found for nodes with the same weights comes out again of one scheme and overrides."""
    settings = mixed(min_sqnr_db=200, schemes=schemes, max_float_ratio=0.3)
    facts, path = run_stage(tmp_path / "found", nets.tied(), settings)
    assert len({one["scheme"] for one in facts["sensitivity"]}) > len(schemes) - 2
    short = settings.model_copy(update={"schemes": (facts["base"],), "overrides": facts["assigned"]})
    _, same = run_stage(tmp_path / "short", nets.tied(), short)
    assert same.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("settings", [{"compact": True}, {"format": "qoperator"}, {"granularity": "per_channel"}])
def test_other_settings_of_static_quantization_hold(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Compact files, the operator format and a scale per channel mix as well, as near as was asked for."""
    facts, path = run_stage(tmp_path, two_branches(), mixed(min_sqnr_db=25, max_float_ratio=0.1, **settings))
    assert facts["assigned"]["product"] in {"dynamic", "weights"}
    assert facts["reached"]
    assert singly(two_branches(), path) > 25
    assert audit(path).ratio == pytest.approx(1.0, abs=0.1)


def test_the_search_leaves_overrides_alone(tmp_path: Path) -> None:
    """A node that the config fixes is in no group and becomes what the config says."""
    settings = mixed(min_sqnr_db=25, max_float_ratio=0.1, overrides={"product": "weights", "conv1": "float"})
    facts, path = run_stage(tmp_path, two_branches(), settings)
    ops = {node.name: node.op_type for node in onnx.load(path).graph.node}
    assert ops["product"] == "MatMulNBits"
    assert {row.name for row in audit(path).rows if not row.integer_macs} == {"conv1", "product"}
    assert not {"product", "conv1"} & {name for one in facts["sensitivity"] for name in one["nodes"]}


def test_the_facts_say_why_a_node_is_in_float(tmp_path: Path) -> None:
    """By an override, by the search or by exclude_nodes; what became dynamic or weights is not in float."""
    settings = mixed(min_sqnr_db=15, max_float_ratio=0.1, overrides={"conv1": "float"}, exclude_nodes=["pool"])
    facts, _ = run_stage(tmp_path, two_branches(), settings)
    assert facts["assigned"] == {"product": "dynamic", "both": "float"}
    assert facts["float_nodes"] == {
        "conv1": "float in overrides",
        "pool": "excluded in the config",
        "both": "float in the mixture",
    }


def test_overrides_that_cannot_be_are_refused(tmp_path: Path) -> None:
    """A name that is not there is an error with a suggestion, a scheme that the node has not one with its choices."""
    with pytest.raises(ConfigError, match="no node 'prodcut'") as caught:
        run_stage(tmp_path / "a", two_branches(), mixed(overrides={"prodcut": "dynamic"}))
    assert "'product'" in str(caught.value.fix)
    assert "overrides" in str(caught.value.where)
    with pytest.raises(ConfigError, match="'conv1' cannot become dynamic") as caught:
        run_stage(tmp_path / "b", two_branches(), mixed(overrides={"conv1": "dynamic"}))
    assert caught.value.want == "float, static"


@pytest.mark.parametrize(("target", "limit"), [(5, 0.1), (25, 0.1), (38, 0.1), (60, 0.1), (25, 1.0), (200, 1.0)])
def test_never_worse_than_a_single_scheme(tmp_path: Path, target: float, limit: float) -> None:
    """Whatever is asked: no allowed single scheme reaches the drift in less time, or is nearer if none does."""
    facts, _ = run_stage(tmp_path, two_branches(), mixed(min_sqnr_db=target, max_float_ratio=limit))
    db = np.inf if facts["sqnr_db_mixed"] is None else facts["sqnr_db_mixed"]
    assert facts["reached"] == (db >= target)
    assert set(facts["singles"]) == {"static", "dynamic", "weights", "float"}
    for one in facts["singles"].values():
        if one["float_ratio"] > limit:
            continue
        single_db = np.inf if one["sqnr_db"] is None else one["sqnr_db"]
        if facts["reached"]:
            assert single_db < target or one["time_ratio"][0] >= facts["time_ratio"][0]
        else:
            assert single_db <= db


def test_a_scheme_alone_wins_where_a_mixture_is_no_faster(tmp_path: Path) -> None:
    """Where static reaches the drift everywhere and everything else is slower, it is taken, and the facts say so."""
    facts, _ = run_stage(tmp_path, nets.cnn(), mixed(min_sqnr_db=10))
    assert (facts["base"], facts["assigned"], facts["decision"]) == ("static", {}, "static alone is fastest")


def test_the_result_is_that_of_its_patch(tmp_path: Path) -> None:
    """Static quantization with the returned nodes excluded writes the same bytes, so the search need not run again."""
    settings = mixed(min_sqnr_db=25, max_float_ratio=0.9, bias_correction=True)
    facts, path = run_stage(tmp_path / "mixed", planted(), settings)
    _, patched = run_stage(tmp_path / "static", planted(), settings.static(tuple(facts["assigned"])))
    assert patched.read_bytes() == path.read_bytes()


def test_the_same_again(tmp_path: Path) -> None:
    """With the same times the search gives the same bytes and the same facts again."""
    (first, a), (second, b) = (run_stage(tmp_path / name, planted(), mixed(min_sqnr_db=60)) for name in "ab")
    assert (first, a.read_bytes()) == (second, b.read_bytes())


@pytest.mark.parametrize(("granularity", "ratio"), [("per_tensor", 0.05), ("per_channel", 0.5)])
def test_never_worse_than_int8(tmp_path: Path, granularity: str, ratio: float) -> None:
    """A drift out of reach costs no more work than was allowed, and the result is at least as near as all-int8."""
    settings = mixed(min_sqnr_db=200, granularity=granularity, max_float_ratio=ratio)
    facts, path = run_stage(tmp_path / "mixed", planted(), settings)
    _, int8 = run_stage(tmp_path / "int8", planted(), settings.static(()))
    assert facts["float_ratio"] <= ratio
    assert facts["sqnr_db_mixed"] >= facts["sqnr_db_base"]
    assert drift_db(planted(), path) > drift_db(planted(), int8) - 0.5
    assert not facts["reached"]


@pytest.mark.slow
def test_by_the_clock(tmp_path: Path) -> None:
    """With times that are really measured the drift is reached, and every ratio lies within its interval."""
    source, out = nets.artifact_of(planted(), tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    facts = quantize_mixed(mixed(min_sqnr_db=25, max_float_ratio=0.9), source, out, context(planted(), tmp_path))
    json.dumps(facts, allow_nan=False)
    assert facts["reached"]
    assert drift_db(planted(), out / "model.onnx") > 25
    for ratio, lo, hi in (facts["time_ratio"], *(one["time_ratio"] for one in facts["singles"].values())):
        assert 0 < lo <= ratio <= hi
    assert any(one["time_ratio"] for one in facts["sensitivity"])


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


def test_nothing_that_takes_the_scheme_is_declined(tmp_path: Path) -> None:
    """Where no node can become what was asked for, nothing is quantized, and that is said."""
    facts, path = run_stage(tmp_path, planted(), mixed(schemes=["dynamic"], overrides={"head": "float"}))
    assert facts["declined"] == "no node is left that could become dynamic"
    assert facts["nodes"] == {"float": sum(facts["nodes"].values())}
    assert not {node.op_type for node in onnx.load(path).graph.node} & {"DequantizeLinear", "MatMulInteger"}


def test_a_drift_out_of_reach_is_a_warning(tmp_path: Path) -> None:
    """Both figures and the limit are in a line for the report, and none where the drift is reached."""
    facts, _ = run_stage(tmp_path / "far", planted(), mixed(min_sqnr_db=200, max_float_ratio=0.05))
    (text,) = facts["warnings"]
    assert "of 200 dB" in text
    assert "at most 5%" in text
    facts, _ = run_stage(tmp_path / "near", planted(), mixed(min_sqnr_db=5))
    assert facts["warnings"] == []


def test_float_everywhere_is_a_warning(tmp_path: Path) -> None:
    """Where float is the only scheme that reaches the drift, that nothing became smaller is said."""
    facts, _ = run_stage(tmp_path, planted(), mixed(min_sqnr_db=200))
    assert facts["nodes"] == {"float": sum(facts["nodes"].values())}
    assert facts["warnings"] == [f"all nodes stay in float: {facts['decision']}"]


@pytest.mark.parametrize(("isa", "top"), [("x86_vnni", 127), ("x86_avx2", 64)])
def test_dynamic_nodes_do_not_saturate(tmp_path: Path, isa: str, top: int) -> None:
    """For a processor whose 8-bit products saturate the weights of dynamic nodes have 7 bits."""
    settings = mixed(schemes=["dynamic"], isa=isa, reduce_range="auto")
    _, path = run_stage(tmp_path, nets.tied(), settings)
    weights = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name.endswith("_quantized")]
    assert max(int(np.abs(value.astype(np.int32)).max()) for value in weights) == top


class NothingRuns(KnownTimes):
    """A machine on which no model runs."""

    def kernels(self, model: bytes, batches: Sequence[Batch], *, name: str) -> tuple[list[dict[str, Array]], Kernels]:  # noqa: ARG002
        """As of a model that ONNX Runtime cannot load."""
        raise ModelError("no kernel", where=name)


def test_no_scheme_that_runs_is_an_error(tmp_path: Path) -> None:
    """Where the model cannot run with any of the schemes, the message names them and what to do."""
    model = nets.tied()
    source, ctx = nets.artifact_of(model, tmp_path / "source"), context(model, tmp_path)
    with pytest.raises(ModelError, match="none of the schemes: static, dynamic") as caught:
        quantize_mixed(mixed(schemes=["static", "dynamic"]), source, tmp_path, ctx, stopwatch=NothingRuns())
    assert "float" in str(caught.value.fix)


def test_masked_attention_is_mixed(tmp_path: Path) -> None:
    """Where a mask keeps nodes from static quantization, the rest still has its choices, and nothing is lost."""
    model = nets.attention()
    facts, path = run_stage(tmp_path, model, mixed(min_sqnr_db=30, max_float_ratio=1.0))
    assert facts["reached"]
    assert singly(model, path) > 27
    assert {"query", "key", "value"} <= {name for one in facts["sensitivity"] for name in one["nodes"]}


@pytest.mark.parametrize("model", [nets.cnn(), nets.attention(mark=-100.0)])
def test_groups_are_a_partition(model: onnx.ModelProto) -> None:
    """Every quantizable node that is not excluded is in one group, and a product begins each."""
    prepared = prepare(model, where="test")
    expected = {n.name for n in prepared.graph.node if n.op_type in QUANTIZABLE_OP_TYPES} - {"conv2", "query"}
    groups = node_groups(prepared, expected)
    assert sorted(name for group in groups for name in group) == sorted(expected)
    kinds = {node.name: node.op_type for node in prepared.graph.node}
    products = [kinds[name] for group in groups for name in group[1:]]
    assert not {"Conv", "Gemm", "MatMul"} & set(products)
