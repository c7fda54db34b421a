"""Integer coverage: counted by hand on small graphs as ONNX Runtime runs them, and every cause of a float island."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic
from onnxruntime.quantization import quantize_static as ort_quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from onnxshrink.config.gates import Target
from onnxshrink.config.stages import Optimize, QuantizeStatic
from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import Batch
from onnxshrink.runtime.isa import detect_isa
from onnxshrink.stages.optimize import optimize
from onnxshrink.stages.quantize_static import quantize_static
from onnxshrink.verify.causes import Cause
from onnxshrink.verify.coverage import Coverage, audit, measure_work
from onnxshrink.verify.islands import Island
from onnxshrink.verify.macs import row_of
from onnxshrink.verify.segments import MAX_SEGMENTS, Segment, coarser, segment_details

Weights = dict[str, NDArray[np.generic]]

on_x86 = pytest.mark.skipif(detect_isa() == "arm64", reason="what x86 cannot run in integers")
node = helper.make_node


def weight(*shape: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(len(shape))
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def conv(source: str, result: str, name: str, weights: str = "w") -> onnx.NodeProto:
    return node("Conv", [source, weights], [result], name=name, pads=[1, 1, 1, 1])


def residual() -> onnx.ModelProto:
    """Two residual blocks: each ReLU feeds a branch and the skip beside it."""
    nodes = [conv("x", "c0", "stem", "w0"), node("Relu", ["c0"], ["r0"], name="relu0")]
    for i in (1, 2):
        nodes += [
            conv(f"r{i - 1}", f"a{i}", f"block{i}_first"),
            node("Relu", [f"a{i}"], [f"b{i}"], name=f"inner{i}"),
            conv(f"b{i}", f"c{i}", f"block{i}_second"),
            node("Add", [f"c{i}", f"r{i - 1}"], [f"s{i}"], name=f"add{i}"),
            node("Relu", [f"s{i}"], [f"r{i}"], name=f"relu{i}"),
        ]
    nodes += [
        node("GlobalAveragePool", ["r2"], ["p"], name="pool"),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("Gemm", ["f", "wh", "bh"], ["y"], name="head", transB=1),
    ]
    weights: Weights = {"w0": weight(8, 3, 3, 3), "w": weight(8, 8, 3, 3), "wh": weight(10, 8), "bh": weight(10)}
    return nets.model_of(nodes, {"x": ["N", 3, 16, 16]}, {"y": ["N", 10]}, weights)


def between(*nodes: onnx.NodeProto, out: str = "h", **weights: NDArray[np.generic]) -> onnx.ModelProto:
    """``nodes`` from ``a`` to ``h`` between two convolutions of 8 channels."""
    weights = {"w": weight(8, 8, 3, 3), **weights}
    chain = [conv("x", "a", "first"), *nodes, node("Conv", [out, "w"], ["y"], name="last", auto_pad="SAME_UPPER")]
    return nets.model_of(chain, {"x": ["N", 8, 8, 8]}, {"y": ["N", 8, "H", "W"]}, dict(weights))


def quantized(model: onnx.ModelProto, folder: Path, **settings: Any) -> Path:
    """The model, quantized by our stage."""
    source = nets.artifact_of(model, folder / "source")
    out = folder / "out"
    out.mkdir()
    context = nets.context_of(nets.ArrayReader(nets.samples_of(model, 8)), folder)
    quantize_static(QuantizeStatic(**settings), source, out, context)
    return out / "model.onnx"


class OrtReader(CalibrationDataReader):  # type: ignore[misc]
    """Samples as ONNX Runtime's own tool wants them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.batches = iter(nets.ArrayReader(nets.samples_of(model, 4)))

    def get_next(self) -> Batch | None:
        """The next batch, or None at the end."""
        return next(self.batches, None)


def by_ort(model: onnx.ModelProto, folder: Path, **settings: Any) -> Path:
    """The model, quantized by ONNX Runtime's own tool."""
    onnx.save(model, folder / "float.onnx")
    ort_quantize_static(folder / "float.onnx", folder / "model.onnx", OrtReader(model), **settings)
    return folder / "model.onnx"


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def kinds(coverage: Coverage) -> list[str]:
    return [cause.kind for island in coverage.islands for cause in island.causes]


BLOCK = 8 * 16 * 16 * 8 * 9
STEM = 8 * 16 * 16 * 3 * 9
HEAD = 10 * 8


def test_macs_are_those_of_a_hand_count(tmp_path: Path) -> None:
    """A convolution counts C_out·H·W·C_in·9, a Gemm C_out·C_in; all of a float model is one island, not quantized."""
    found = audit(saved(residual(), tmp_path))
    assert {row.name: row.macs for row in found.rows} == {
        "stem": STEM, "block1_first": BLOCK, "block1_second": BLOCK, "block2_first": BLOCK, "block2_second": BLOCK,
        "head": HEAD,
    }  # fmt: skip
    assert (found.ratio, found.macs, kinds(found)) == (0.0, 4 * BLOCK + STEM + HEAD, ["not quantized"])


@on_x86
def test_a_residual_network_runs_in_integers_only_as_the_resolver_chooses(tmp_path: Path) -> None:
    """With s8s8 less than half of a residual CNN is integer, and the audit says why; `auto` has all of it."""
    signed = audit(quantized(residual(), tmp_path / "signed", types="s8s8"))
    assert signed.ratio == 2 * BLOCK / (4 * BLOCK + STEM + HEAD) + HEAD / (4 * BLOCK + STEM + HEAD)
    assert signed.ratio < 0.5
    assert set(kinds(signed)) == {"signed activations"}
    worst = signed.islands[0]
    assert (worst.main_node, worst.macs) == ("block1_first", BLOCK)
    assert "'r0' is signed (int8) and has 2 readers" in worst.cause
    assert "u8s8" in worst.change
    chosen = audit(quantized(residual(), tmp_path / "auto"))
    assert (chosen.ratio, chosen.islands, chosen.note) == (1.0, (), None)
    assert chosen.macs == signed.macs


BATCH_NORM: Weights = {name: np.ones(8, np.float32) for name in ("scale", "bias", "mean", "var")}
CAUSES: dict[str, tuple[onnx.ModelProto, str, int]] = {
    "batch_norm": (
        between(node("BatchNormalization", ["a", *BATCH_NORM], ["h"], name="middle"), **BATCH_NORM),
        "batch normalization", 0,
    ),
    "hard_swish": (between(node("HardSwish", ["a"], ["h"], name="middle")), "HardSwish", 0),
    "conv_transpose": (
        between(
            node("ConvTranspose", ["a", "t"], ["h"], name="middle", strides=[2, 2]), t=weight(8, 4, 2, 2),
            w2=weight(8, 4, 3, 3),
        ),
        "ConvTranspose", 8 * 8 * 8 * 4 * 2 * 2,
    ),
    "reduce_mean": (
        between(node("ReduceMean", ["a"], ["h"], name="middle", axes=[2, 3], keepdims=1)), "ReduceMean", 0,
    ),
    "layer_norm": (
        between(node("LayerNormalization", ["a", "g"], ["h"], name="middle"), g=np.ones(8, np.float32)),
        "layer normalization", 0,
    ),
    "erf": (between(node("Erf", ["a"], ["h"], name="middle")), "no kernel: Erf", 0),
}  # fmt: skip
# The last convolution of the transposed one has 4 channels to read.
for _node in CAUSES["conv_transpose"][0].graph.node:
    if _node.name == "last":
        _node.input[1] = "w2"


@on_x86
@pytest.mark.parametrize("case", CAUSES)
def test_an_operator_without_an_integer_kernel_is_named(case: str, tmp_path: Path) -> None:
    """An operator between two integer convolutions is one float island, named with its cause and a change."""
    model, kind, macs = CAUSES[case]
    found = audit(quantized(model, tmp_path))
    (island,) = found.islands
    assert [cause.kind for cause in island.causes] == [kind]
    assert island.macs == macs
    assert island.change
    integer = {row.name: row.integer_macs for row in found.rows}
    assert integer["first"] == 8 * 8 * 8 * 8 * 9
    assert integer["last"] > 0


def test_an_island_names_its_products_first(tmp_path: Path) -> None:
    """An excluded convolution before an operator without a kernel: one island, the convolution's cause before."""
    model = between(node("Erf", ["a"], ["h"], name="erf"))
    found = audit(quantized(model, tmp_path, exclude_nodes=["first"], format="qoperator"))
    (island,) = found.islands
    assert island.nodes == ("first", "erf")
    assert (island.main_node, island.macs) == ("first", 8 * 8 * 8 * 8 * 9)
    assert [cause.kind for cause in island.causes] == ["not quantized", "no kernel: Erf"]


def test_pooling_as_reduce_mean_is_told_to_optimize(tmp_path: Path) -> None:
    """The change it names works: after the optimize stage the same network has no island."""
    model = CAUSES["reduce_mean"][0]
    found = audit(quantized(model, tmp_path / "before"))
    assert "GlobalAveragePool" in found.islands[0].change
    source = nets.artifact_of(model, tmp_path / "source")
    (tmp_path / "optimized").mkdir()
    optimize(Optimize(), source, tmp_path / "optimized", nets.context_of(nets.ArrayReader({}), tmp_path))
    better = audit(quantized(onnx.load(tmp_path / "optimized" / "model.onnx"), tmp_path / "after"))
    assert (better.ratio, better.islands) == (1.0, ())


@pytest.mark.parametrize("level", ["disabled", "basic"])
def test_a_session_below_extended_is_named(level: Any, tmp_path: Path) -> None:
    """The file is fine, and the session is at fault: nothing is integer, and the change is a level."""
    path = quantized(residual(), tmp_path)
    found = audit(path, optimization=level)
    assert found.ratio == 0.0
    assert set(kinds(found)) == {"session below EXTENDED"}
    assert "ORT_ENABLE_EXTENDED" in found.islands[0].change
    if detect_isa() != "arm64":
        assert audit(path, optimization="extended").ratio == 1.0


def test_sixteen_bits_are_named(tmp_path: Path) -> None:
    """16-bit activations have no integer kernel on the CPU."""
    path = by_ort(residual(), tmp_path, activation_type=QuantType.QUInt16, weight_type=QuantType.QInt8)
    found = audit(path)
    assert (found.ratio, set(kinds(found))) == (0.0, {"16-bit activations"})


def test_excluded_nodes_are_named(tmp_path: Path) -> None:
    """What was left out is one island; its cause names the node and what of it is not quantized."""
    found = audit(quantized(nets.attention(mark=-100.0), tmp_path, types="u8s8", exclude_nodes=["query", "scores"]))
    island = found.islands[0]
    assert (set(island.nodes), island.causes[0].kind) == ({"query", "scores"}, "not quantized")
    assert island.macs == 6 * 8 * 8 + 6 * 6 * 8
    assert "'query' was left out" in island.cause


def test_dynamic_products_are_integer_and_their_surroundings_are_not(tmp_path: Path) -> None:
    """Dynamic quantization takes the products with weights: 3 · 6·8·8 of the MACs; those of two activations stay."""
    onnx.save(nets.attention(mark=-100.0), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "model.onnx")
    found = audit(tmp_path / "model.onnx")
    assert found.ratio == pytest.approx(3 * 6 * 8 * 8 / (3 * 6 * 8 * 8 + 2 * 6 * 6 * 8))
    assert found.islands[0].causes[0].kind == "dynamic quantization"


def products() -> onnx.ModelProto:
    nodes = [node("MatMul", ["x", "a"], ["h"], name="one"), node("MatMul", ["h", "b"], ["y"], name="two")]
    return nets.model_of(nodes, {"x": ["N", 4, 64]}, {"y": ["N", 4, 32]}, {"a": weight(64, 64), "b": weight(64, 32)})


def test_weight_only_counts_as_float(tmp_path: Path) -> None:
    """4-bit blocks save bytes and compute on float activations: 0, and the cause says so."""
    quantizer = MatMulNBitsQuantizer(products(), block_size=32, is_symmetric=True)
    quantizer.process()
    found = audit(saved(quantizer.model.model, tmp_path))
    assert (found.ratio, found.macs) == (0.0, 4 * 64 * 64 + 4 * 64 * 32)
    assert kinds(found) == ["weight-only"]


def test_dequantized_weights_are_weight_only(tmp_path: Path) -> None:
    """An int8 weight behind DequantizeLinear, with a float activation, is weight-only too."""
    nodes = [
        node("DequantizeLinear", ["q", "s"], ["w"], name="dq"),
        node("Conv", ["x", "w"], ["y"], name="conv"),
    ]
    weights: Weights = {"q": np.ones((8, 3, 1, 1), np.int8), "s": np.array(0.1, np.float32)}
    found = audit(saved(nets.model_of(nodes, {"x": ["N", 3, 4, 4]}, {"y": ["N", 8, 4, 4]}, weights), tmp_path))
    assert (found.ratio, kinds(found), found.macs) == (0.0, ["weight-only"], 8 * 4 * 4 * 3)


def test_cuda_is_named_without_a_gpu(tmp_path: Path) -> None:
    """A target that is not there is an error, not a guess."""
    from onnxruntime import get_available_providers

    from onnxshrink.core.errors import ProviderError

    if "CUDAExecutionProvider" in get_available_providers():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ProviderError, match="cuda"):
        audit(saved(residual(), tmp_path), Target(provider="cuda"))


@pytest.mark.parametrize(
    ("made", "shapes", "macs"),
    [
        (node("Conv", ["x", "w"], ["y"], group=4), {"x": (1, 8, 4, 4), "w": (8, 2, 3, 3), "y": (1, 8, 2, 2)}, 576),
        (node("ConvTranspose", ["x", "w"], ["y"]), {"x": (1, 3, 4, 4), "w": (3, 5, 2, 2), "y": (1, 5, 5, 5)}, 960),
        (node("MatMul", ["x", "w"], ["y"]), {"x": (2, 3, 4, 5), "w": (5, 6), "y": (2, 3, 4, 6)}, 720),
        (node("Gemm", ["x", "w"], ["y"], transA=1), {"x": (7, 4), "w": (7, 3), "y": (4, 3)}, 84),
        (
            node("Einsum", ["x", "w"], ["y"], equation="bij, jk -> bik"),
            {"x": (2, 3, 4), "w": (4, 5), "y": (2, 3, 5)},
            120,
        ),
        (
            node("Einsum", ["x", "w"], ["y"], equation="...ij,...jk"),
            {"x": (6, 3, 4), "w": (6, 4, 5), "y": (6, 3, 5)},
            360,
        ),
        (
            node("LSTM", ["x", "w", "r"], ["y"]),
            {"x": (9, 2, 3), "w": (1, 16, 3), "r": (1, 16, 4), "y": (9, 1, 2, 4)},
            2016,
        ),
        (
            node("Attention", ["x", "w"], ["y"], domain="com.microsoft", num_heads=2),
            {"x": (1, 5, 4), "w": (4, 12), "y": (1, 5, 4)},
            5 * 4 * 12 + 2 * 5 * 5 * 4,
        ),
        (
            node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft"),
            {"q": (1, 5, 4), "k": (1, 7, 4), "v": (1, 7, 6), "y": (1, 5, 6)},
            5 * 7 * 4 + 5 * 7 * 6,
        ),
    ],
)  # fmt: skip
def test_macs_of_each_operator(made: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], macs: int) -> None:
    """Each formula agrees with the sum written out by hand."""
    assert row_of(made, shapes).macs == macs


def test_quantized_attention_is_integer_in_its_projection() -> None:
    """QAttention projects in integers and attends in float: 5·4·12 of 5·4·12 + 2·5·5·4."""
    made = node("QAttention", ["x", "w"], ["y"], domain="com.microsoft", num_heads=2)
    row = row_of(made, {"x": (1, 5, 4), "w": (4, 12), "y": (1, 5, 4)})
    assert (row.integer_macs, row.macs) == (240, 440)


def test_macs_follow_the_samples_shape(tmp_path: Path) -> None:
    """A dynamic axis has the length of the sample; without one, lengths are tried."""
    model = nets.model_of(
        [node("MatMul", ["x", "w"], ["y"], name="m")], {"x": ["N", "S", 4]}, {"y": ["N", "S", 5]}, {"w": weight(4, 5)}
    )
    path = saved(model, tmp_path)
    assert audit(path, batch={"x": np.zeros((2, 11, 4), np.float32)}).macs == 2 * 11 * 4 * 5
    assert audit(path).macs == 32 * 4 * 5


def test_a_sample_the_model_does_not_take_is_an_error(tmp_path: Path) -> None:
    """The message is ONNX Runtime's, and says what to give."""
    path = saved(products(), tmp_path)
    with pytest.raises(ModelError) as caught:
        audit(path, batch={"x": np.zeros((1, 4, 63), np.float32)})
    assert caught.value.fix is not None
    metrics, _ = measure_work(path, Target(), {"x": np.zeros((1, 4, 63), np.float32)}, quantized=True)
    assert [(metric.name, metric.value, bool(metric.note)) for metric in metrics] == [
        ("macs", None, True),
        ("integer_coverage", None, True),
    ]


def test_external_data_is_not_read_into_memory_twice(tmp_path: Path) -> None:
    """A model whose weights lie beside it is audited like any other."""
    onnx.save(products(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert audit(tmp_path / "m.onnx").macs == 4 * 64 * 64 + 4 * 64 * 32


def test_a_model_without_products_has_no_ratio(tmp_path: Path) -> None:
    """Nothing to count is no value, with a note; it is neither 0 nor 1."""
    model = nets.model_of([node("Relu", ["x"], ["y"], name="r")], {"x": ["N", 4]}, {"y": ["N", 4]}, {})
    path = saved(model, tmp_path)
    assert audit(path).ratio is None
    (macs, share), _ = measure_work(path, Target(), {"x": np.zeros((1, 4), np.float32)}, quantized=True)
    assert macs.value == 0.0
    assert (share.value, share.note) == (None, "the model has no multiply-accumulates")


def test_integer_arithmetic_on_shapes_is_not_counted(tmp_path: Path) -> None:
    """A product of int64 tensors is no work for a float or an integer kernel."""
    graph = helper.make_graph(
        [node("MatMul", ["x", "w"], ["y"], name="m")],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.INT64, [2, 2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [2, 2])],
        [numpy_helper.from_array(np.eye(2, dtype=np.int64), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert audit(saved(model, tmp_path)).macs == 0


def test_the_bar_of_a_graph_holds_every_node_once(tmp_path: Path) -> None:
    """Stretches in the order of the graph: a float one in the middle with its cause, integers around it."""
    model = between(node("Tanh", ["a"], ["h"], name="tanh"))
    path = quantized(model, tmp_path)
    found = audit(path)
    segments = [segment for segment in found.segments if segment.kind != "other"]
    assert [segment.kind for segment in segments] == ["integer", "float", "integer"]
    assert segments[1].op_types == ("Tanh",)
    assert sum(segment.macs for segment in found.segments) == found.macs
    assert sum(segment.integer_macs for segment in found.segments) == sum(row.integer_macs for row in found.rows)
    details = segment_details(found.segments)
    assert json.loads(json.dumps(details)) == details
    assert sum(one["macs_ratio"] for one in details) == pytest.approx(1.0, abs=1e-5)
    for one in details:
        assert ("cause" in one) == ("fix" in one) == (one["kind"] == "float")


def test_the_bar_of_a_float_model_is_in_the_report_only_if_it_is_quantized(tmp_path: Path) -> None:
    """A float model is one float stretch, which says nothing; the report leaves it out."""
    path = saved(residual(), tmp_path)
    assert {segment.kind for segment in audit(path).segments} <= {"float", "other"}
    assert measure_work(path, Target(), {"x": np.zeros((1, 3, 16, 16), np.float32)}, quantized=False)[1] == []


def test_a_long_bar_is_coarsened_and_keeps_its_sums() -> None:
    """Of 500 stretches at most 60 remain, with all nodes and products, and the weightiest cause of each."""
    light, heavy = (
        Island(("n",), ("Relu",), macs, name, (Cause("k", name, "c"),)) for macs, name in ((1, "a"), (9, "b"))
    )
    fine = [
        Segment("integer", 2, 10, 10, ("Conv",)) if place % 2 else Segment("float", 1, 5, 0, ("Relu",), island)
        for place, island in enumerate([light, heavy] * 250)
    ]
    fine[2] = replace(fine[2], island=heavy)
    coarse = coarser(fine)
    assert len(coarse) <= MAX_SEGMENTS
    for name in ("nodes", "macs", "integer_macs"):
        assert sum(getattr(one, name) for one in coarse) == sum(getattr(one, name) for one in fine)
    assert {one.kind for one in coarse} == {"mixed"}
    assert coarse[0].island == heavy
    assert coarse[0].op_types == ("Relu", "Conv")
    assert coarser(fine[:MAX_SEGMENTS]) == tuple(fine[:MAX_SEGMENTS])
    assert coarser(()) == ()
