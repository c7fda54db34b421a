"""Errors of pieces are those that a second source computes, and memory keeps to its window."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import explain_mutations as mutations
import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxshrink.config.data import NpzData
from onnxshrink.runtime.graph import input_specs
from onnxshrink.runtime.session import Session
from onnxshrink.verify.explain import explain_models
from onnxshrink.verify.local_error import GridError, Measured, energy, measure_pieces, signal_of, windows_of
from onnxshrink.verify.pairing import Pair, Tensors, pair_up
from onnxshrink.verify.pieces import Grid


def measured(model: nets.Model, candidate: nets.Model, reader: nets.ArrayReader, max_bytes: int = 1 << 28) -> Measured:
    """All pieces, for a processor with VNNI."""
    return measure_pieces(
        pair_of(model, candidate, reader),
        reader,
        max_bytes=max_bytes,
        emulate_saturation=False,
        deployed=Session,
    )


def pair_of(model: nets.Model, candidate: nets.Model, reader: nets.ArrayReader) -> Pair:
    """The two models, with the sizes of the reader's batches."""
    shapes = {name: array.shape for name, array in next(iter(reader)).items()}
    return pair_up(Tensors(model, shapes, name="reference"), Tensors(candidate, shapes, name="candidate"))


def deep(depth: int) -> nets.Model:
    """``x[N,1,64,64]`` to ``y``: so many convolutions in a row."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((8, 1 if i == 0 else 8, 3, 3)).astype(np.float32) / 8 for i in range(depth)}
    names = ["x", *(f"t{i}" for i in range(depth - 1)), "y"]
    nodes = [
        helper.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]], name=f"c{i}", pads=[1] * 4) for i in range(depth)
    ]
    return nets.model_of(nodes, {"x": ["N", 1, 64, 64]}, {"y": ["N", 8, 64, 64]}, weights)


@pytest.mark.parametrize("grid", [Grid(0.05, 0, "int8"), Grid(0.02, 128, "uint8"), Grid(0.01, 3, "uint8")])
def test_a_grid_rounds_and_clips_as_onnx_does(grid: Grid) -> None:
    """Stored and restored values are those of ONNX's own reference implementation."""
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(grid.dtype))
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "pair",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])],
        [
            helper.make_tensor_value_info("q", dtype, [None]),
            helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None]),
        ],
        [
            numpy_helper.from_array(np.array(grid.scale, np.float32), "s"),
            numpy_helper.from_array(np.array(grid.zero_point, grid.dtype), "z"),
        ],
    )
    x = np.random.default_rng(0).normal(0, 3, 500).astype(np.float32)
    stored, restored = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])).run(
        None, {"x": x}
    )
    np.testing.assert_array_equal(grid.stored(x), stored)
    np.testing.assert_allclose(grid.restored(grid.stored(x)), restored, rtol=1e-6)
    error = GridError(grid)
    error.update(x)
    np.testing.assert_allclose(error.rounding + error.clipping, np.square(x.astype(float) - restored).sum(), rtol=1e-5)
    beyond = (x > grid.hi + grid.scale / 2) | (x < grid.lo - grid.scale / 2)
    assert error.clipped == beyond.sum() > 0


def test_the_local_error_is_that_of_the_nodes_own_subgraph() -> None:
    """The piece `dense1`, cut out by onnx.utils by hand: the same error on the reference's inputs."""
    model = mutations.mlp()
    arrays = mutations.samples("mlp", model)
    good = mutations.quantized(model, arrays)
    reader = nets.ArrayReader(arrays, 8)  # type: ignore[arg-type]
    found = next(one for one in measured(model, good, reader).pieces if one.piece.node == "dense1")
    cut = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(good)).extract_model(
        ["r0"], ["r1_DequantizeLinear_Output"]
    )
    exact = ReferenceEvaluator(model).run(None, arrays)
    assert len(exact) == 1
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend([onnx.ValueInfoProto(name="r0"), onnx.ValueInfoProto(name="r1")])
    r0, r1 = (Session(shown.SerializeToString()).run(arrays)[name] for name in ("r0", "r1"))
    got = Session(cut.SerializeToString()).run({"r0": r0})["r1_DequantizeLinear_Output"]
    np.testing.assert_allclose(found.local, np.square(r1.astype(float) - got).sum(), rtol=0.02)
    np.testing.assert_allclose(found.signal, np.square(r1.astype(float)).sum(), rtol=1e-5)


def test_marks_of_a_mask_are_no_error() -> None:
    """Equal infinities agree, finfo.min is as good as infinity, and no number is infinitely wrong."""
    low = np.finfo(np.float32).min
    assert energy(np.array([-np.inf, low, 1.0]), np.array([low, -np.inf, 3.0])) == 4
    assert signal_of(np.array([-np.inf, low, 2.0])) == 4
    assert energy(np.array([low], np.float32), np.array([-65504], np.float16)) == 0
    assert energy(np.array([1.0]), np.array([np.nan])) == np.inf


def test_windows_cut_the_work_and_change_no_figure() -> None:
    """In windows of one piece each the sums are those of one window for all."""
    model = mutations.residual()
    arrays = mutations.samples("residual", model)
    good = mutations.quantized(model, arrays)
    reader = nets.ArrayReader(arrays, 8)  # type: ignore[arg-type]
    whole, parts = measured(model, good, reader), measured(model, good, reader, max_bytes=1)
    assert (whole.windows, parts.windows) == (1, len(whole.pieces))
    for one, other in zip(whole.pieces, parts.pieces, strict=True):
        assert (one.signal, one.local, one.weights, one.kernel) == (
            other.signal,
            other.local,
            other.weights,
            other.kernel,
        )
        assert one.alone == other.alone


def test_a_window_holds_what_fits() -> None:
    """Twice the memory, half the windows."""
    model = deep(8)
    reader = nets.ArrayReader(nets.samples_of(model, 4), 4)
    pair = pair_of(model, model, reader)
    one = 8 * 64 * 64 * 4 * 4
    sizes = [[len(window) for window in windows_of(pair, one * factor)] for factor in (16, 33, 200)]
    assert sizes[0] == [1] * 8
    assert sizes[1] == [2] * 4
    assert sizes[2] == [8]


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "samples"), [(4, 32), (16, 8)])
def test_memory_follows_the_window(depth: int, samples: int, tmp_path: Path) -> None:
    """Neither four times the samples nor four times the depth takes more memory than a few tensors."""

    def peak(depth: int, samples: int) -> int:
        model = deep(depth)
        np.savez(tmp_path / "x.npz", **nets.samples_of(model, samples))
        tracemalloc.start()
        explain_models(model, model, NpzData(npz=tmp_path / "x.npz"), max_bytes=8 << 20)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(depth, samples) < 1.2 * peak(4, 8)


def test_samples_are_counted_once() -> None:
    """However many windows there are."""
    model = deep(3)
    reader = replace(nets.ArrayReader(nets.samples_of(model, 6)), batch_size=4)
    assert measured(model, model, reader, max_bytes=1).samples == 6
    assert len(input_specs(model)) == 1
