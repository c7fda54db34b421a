"""Conv, MatMul and Gemm as the matrix product that ONNX Runtime's integer kernels compute, K in their order.

In a convolution K runs over the kernel's positions and, within each, over the channels of the group: the kernels work
on channels last, and reorder weights that are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view

from onnxshrink.core.tensors import Array

_BLOCK = 1 << 22  # elements of the unfolded activations that are given at a time, or one row of the output


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """A node's attribute, or ``default`` where it has none."""
    found = next((entry for entry in node.attribute if entry.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def groups_of(node: onnx.NodeProto) -> int:
    """Number of independent products: a convolution's groups."""
    return int(attribute(node, "group", 1)) if node.op_type == "Conv" else 1


def weight_rows(node: onnx.NodeProto, weights: Array) -> Array:
    """Weights as ``(groups, M, K)``, one row for each output channel of the group.

    Args:
        node: Conv with weights ``(groups * M, C, *kernel)``, or MatMul or Gemm with a matrix.
        weights: Its second input.
    """
    if node.op_type == "Conv":
        rows = np.moveaxis(weights, 1, -1).reshape(len(weights), -1)
    else:
        rows = weights if node.op_type == "Gemm" and attribute(node, "transB", 0) else weights.T
    return rows.reshape(groups_of(node), -1, rows.shape[1])


def activation_rows(
    node: onnx.NodeProto, values: Array, kernel: tuple[int, ...], padding: int
) -> Iterator[tuple[int, Array]]:
    """The rows of activations that are multiplied with `weight_rows`, some at a time.

    Args:
        node: Conv, MatMul or Gemm.
        values: Its first input: ``(N, C, *spatial)`` for Conv.
        kernel: Shape of a Conv's kernel.
        padding: What a Conv's padding holds.

    Yields:
        The number of the group, and rows ``(P, K)``.
    """
    if node.op_type == "Conv":
        yield from _unfolded(node, values, kernel, padding)
        return
    rows = values.T if node.op_type == "Gemm" and attribute(node, "transA", 0) else values
    rows = rows.reshape(-1, rows.shape[-1])
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        yield 0, rows[start : start + step]


def _unfolded(
    node: onnx.NodeProto, values: Array, kernel: tuple[int, ...], padding: int
) -> Iterator[tuple[int, Array]]:
    groups, rank = groups_of(node), len(kernel)
    channels = values.shape[1] // groups
    for sample in _windows(node, values, kernel, padding):
        step = max(1, _BLOCK * groups // math.prod(sample.shape[1:]))
        for start in range(0, len(sample), step):
            for group in range(groups):
                block = sample[start : start + step, ..., group * channels : (group + 1) * channels]
                yield group, block.reshape(math.prod(block.shape[:rank]), -1)


def _windows(node: onnx.NodeProto, values: Array, kernel: tuple[int, ...], padding: int) -> Array:
    """Every output position's window, ``(N, *output, *kernel, C)``: a view on the padded activations."""
    rank = len(kernel)
    strides = attribute(node, "strides", [1] * rank)
    dilations = attribute(node, "dilations", [1] * rank)
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    pads = [(0, 0), (0, 0), *_pads(node, values.shape[2:], strides, spans)]
    padded = np.pad(values, pads, constant_values=padding)
    view = sliding_window_view(padded, spans, axis=tuple(range(2, 2 + rank)))
    view = view[(slice(None), slice(None), *(slice(None, None, step) for step in (*strides, *dilations)))]
    return np.moveaxis(view, 1, -1)


def _pads(
    node: onnx.NodeProto, spatial: tuple[int, ...], strides: list[int], spans: list[int]
) -> list[tuple[int, int]]:
    rank = len(spatial)
    auto = attribute(node, "auto_pad", b"NOTSET")
    if auto == b"NOTSET":
        pads = attribute(node, "pads", [0] * 2 * rank)
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if auto == b"VALID":
        return [(0, 0)] * rank
    totals = [
        max(0, (-(-size // stride) - 1) * stride + span - size)
        for size, stride, span in zip(spatial, strides, spans, strict=True)
    ]
    pairs = [(total // 2, total - total // 2) for total in totals]
    return pairs if auto == b"SAME_UPPER" else [(after, before) for before, after in pairs]
