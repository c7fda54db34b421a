"""Attention masks: tensors that hold a mark of minus infinity, and must stay in float whatever the samples show.

A mask adds ``finfo.min``, -1e9 or -10,000 to scores that shall have no weight after softmax. An 8-bit grid over such a
tensor either has no step left for the scores or, clipped, lets masked positions through. Samples without padding do not
even show it: the mask's product is zero in all of them. So masks are found in the graph as well as in the data.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from onnxshrink.core.tensors import Array
from onnxshrink.runtime.graph import constant_value

# Operators that hand a mark on. Others either end it (Softmax) or are no part of a mask.
_CARRIERS = {
    "Add", "Cast", "Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Mul", "Reshape", "Slice",
    "Squeeze", "Sub", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
}  # fmt: skip
_MARK = 1e9
_SCALAR_MARK = -1e3


def masked_tensors(model: onnx.ModelProto) -> dict[str, str]:
    """The tensors that a mask's mark can reach, each with the reason.

    A mark is a constant of magnitude 1e9 or more, infinity included, or a single number of -1,000 or less, that enters
    one of the operators masks are built from (Mul, Add, Sub, Where, or one that moves values). What such operators make
    of it is masked too, up to the operator that ends it, which is softmax.

    Args:
        model: Its nodes in topological order, as ONNX demands.

    Returns:
        Tensor name to a line such as ``can hold -3.4e+38, a mask``. The marked constants are among them.
    """
    reasons: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            _mark(reasons, tensor.name, numpy_helper.to_array(tensor))
    marked = set(reasons)
    used: set[str] = set()
    for node in model.graph.node:
        if (value := constant_value(node)) is not None:
            _mark(reasons, node.output[0], value)
            marked |= {node.output[0]} & set(reasons)
        elif node.op_type in _CARRIERS:
            source = next((name for name in node.input if name in reasons), None)
            if source is not None:
                used.add(source)
                reasons.update(dict.fromkeys(node.output, reasons[source]))
    return {name: reason for name, reason in reasons.items() if name in used or name not in marked}


def _mark(reasons: dict[str, str], name: str, values: Array) -> None:
    if values.size == 0 or values.dtype not in (np.float32, np.float64):
        return
    lo, hi = float(np.min(values)), float(np.max(values))
    extreme = lo if -lo > hi else hi
    if abs(extreme) >= _MARK or (values.size == 1 and extreme <= _SCALAR_MARK):
        reasons[name] = f"can hold {extreme:.2g}, a mask"
