"""Do two models give the same numbers? The measure, and inputs to try it on where no samples are at hand."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnxshrink.core.tensors import Array, Batch, TensorSpec
from onnxshrink.runtime.graph import PROTOBUF_LIMIT_BYTES, save_model
from onnxshrink.runtime.session import Session

AXIS_LENGTHS = (32, 64, 16, 224, 8)
"""Lengths to try for named axes other than the batch: sequences and images take at least one of them."""


def relative_error(reference: Array, candidate: Array) -> float:
    """``max|candidate - reference| / max(1, max|reference|)`` in float64.

    Args:
        reference: Any shape, any dtype; numbers, or text that must be equal.
        candidate: The same shape.

    Returns:
        0 for equal arrays. NaN and infinities must stand at the same places; where they do not, or where the shapes or
        kinds differ, the error is infinite.
    """
    if reference.shape != candidate.shape or reference.dtype != candidate.dtype:
        return math.inf
    if reference.dtype.kind not in "fiub":
        return 0.0 if np.array_equal(reference, candidate) else math.inf
    want, got = reference.astype(np.float64), candidate.astype(np.float64)
    finite = np.isfinite(want)
    if not np.array_equal(want[~finite], got[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return math.inf
    gap = np.abs(got[finite] - want[finite]).max(initial=0.0)
    return float(gap / max(1.0, np.abs(want[finite]).max(initial=0.0)))


def relative_errors(reference: Batch, candidate: Batch) -> dict[str, float]:
    """`relative_error` of each output; one that the candidate does not have counts as infinite."""
    return {
        name: relative_error(value, candidate[name]) if name in candidate else math.inf
        for name, value in reference.items()
    }


def axis_lengths(specs: Sequence[TensorSpec], *, batch: int, length: int) -> dict[str, int]:
    """A length for each named axis; different names get different lengths, so that none can stand for another.

    Args:
        specs: The inputs of a model.
        batch: Length of the first name that stands on an axis 0; further ones get one more each.
        length: Length of the first other name; further ones get two, three times as much.
    """
    batches = dict.fromkeys(spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], str))
    names = dict.fromkeys(dim for spec in specs for dim in spec.shape if isinstance(dim, str) and dim not in batches)
    return {str(name): batch + i for i, name in enumerate(batches)} | {
        name: length * (i + 1) for i, name in enumerate(names)
    }


def random_batch(specs: Sequence[TensorSpec], lengths: Mapping[str, int], *, seed: int) -> dict[str, Array]:
    """Seeded values for each input.

    Returns:
        Input name to array: standard normal if floating, bytes over their whole range, and zeros and ones for other
        integers, because these are valid as indices and as masks.
    """
    rng = np.random.default_rng(seed)
    batch: dict[str, Array] = {}
    for spec in specs:
        shape = tuple(lengths[dim] if isinstance(dim, str) else dim for dim in spec.shape)
        dtype = np.dtype(spec.dtype)
        if dtype.kind == "f":
            batch[spec.name] = rng.standard_normal(shape).astype(dtype)
        elif dtype.itemsize == 1 and dtype.kind in "iu":
            limits = np.iinfo(dtype)
            batch[spec.name] = rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
        else:
            batch[spec.name] = rng.integers(0, 2, shape).astype(dtype)
    return batch


def reference_session(model: onnx.ModelProto, *, name: str) -> Session:
    """A session that computes what the graph says, node by node: no optimization of ONNX Runtime's own.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
    """
    if model.ByteSize() < PROTOBUF_LIMIT_BYTES:
        return Session(model.SerializeToString(), optimization="disabled", name=name)
    with tempfile.TemporaryDirectory() as folder:
        return Session(save_model(model, Path(folder)), optimization="disabled", name=name)
