"""SmoothQuant: outlier channels of an activation move into the weights that it meets; the float function stays.

``x @ w = (x / s) @ (s w)`` for any ``s > 0`` per input channel. With ``s = max|x|^alpha / max|w|^(1 - alpha)`` the
channels of ``x / s`` are more even, and an 8-bit grid over all of them wastes fewer levels. All nodes that read one
activation share one ``s``. The division goes into the LayerNormalization that writes the activation where nothing else
reads it, and is a Mul by ``1 / s`` elsewhere.

With ``alpha: auto`` every activation gets its own: the one whose product, with both sides rounded to 8 bits, is nearest
the float product on rows of the calibration samples. No smoothing at all is one of the candidates.

Source: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
equation 4; the search is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.config.stages import SmoothQuant
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import DataError, ParityError
from onnxshrink.data.reader import Reader
from onnxshrink.runtime.graph import graphs_of, input_specs, load_model, name_nodes, save_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.optimize import gather

ALPHAS = tuple(round(0.05 * step, 2) for step in range(6, 20))
"""What ``auto`` tries besides no smoothing: 0.3 to 0.95."""

_BATCH = 4
_MOST_ROWS = 256
_ROWS_OF_A_BATCH = 16

Floats = NDArray[np.float32]


@dataclass(slots=True)
class _Group:
    """An activation and the nodes with constant weights that read it.

    Attributes:
        tensor: Name of the activation; channels on its last axis.
        nodes: MatMul and Gemm nodes.
        weights: Their weights as ``(channels, outputs)``, side by side.
        largest: Largest magnitude of each channel so far, ``(channels,)``.
        rows: Some rows of the activation, at most 256.
    """

    tensor: str
    nodes: list[onnx.NodeProto]
    weights: Floats
    largest: Floats
    rows: list[Floats] = field(default_factory=list)

    def see(self, values: Floats) -> None:
        """Remember what a batch shows of the activation, of shape ``(..., channels)``."""
        rows = values.reshape(-1, values.shape[-1])
        if not len(rows):
            return
        np.maximum(self.largest, np.abs(rows).max(axis=0), out=self.largest)
        if sum(map(len, self.rows)) < _MOST_ROWS:
            self.rows.append(rows[:: -(-len(rows) // _ROWS_OF_A_BATCH)].copy())


def smooth_quant(settings: SmoothQuant, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Smooth every activation that constant weights of a MatMul or Gemm meet, and compare the result with the input.

    Returns:
        ``alphas``: activation to its alpha, or None where smoothing does not pay; how many divisions were ``folded``
        into a LayerNormalization and how many ``muls`` were written; the largest relative error.

    Raises:
        DataError: There are no calibration samples.
        ParityError: The result gives other numbers.
    """
    model = load_model(source.model_path)
    evidence = gather(model, ctx)
    reader = ctx.reader("calibration", input_specs(model), batch_size=_BATCH)
    if reader is None:  # the config refuses this; the Python API may not
        raise DataError("there are no calibration samples", where=ctx.step, fix="give the data role `calibration`")
    facts = smooth_model(model, reader, None if settings.alpha == "auto" else settings.alpha, name=ctx.step)
    error = evidence.error(Session(save_model(model, out), optimization="disabled"))
    if not error <= settings.max_abs_error:
        raise ParityError(
            "the smoothed model differs from the one it was made of",
            where=f"{ctx.step}, on {evidence.origin}",
            got=f"max|candidate - reference| = {error:.3g} of max(1, max|reference|)",
            want=f"at most {settings.max_abs_error:.3g}",
            fix="raise max_abs_error where the accuracy allows it, or leave the stage out",
        )
    return facts | {"samples_from": evidence.origin, "max_error": error, "max_abs_error": settings.max_abs_error}


def smooth_model(model: onnx.ModelProto, reader: Reader, alpha: float | None, *, name: str = "model") -> Facts:
    """Smooth ``model`` in place.

    Args:
        model: A float32 model.
        reader: Samples to see the activations on.
        alpha: Share of the outliers that moves into the weights; None searches it for each activation.
        name: What to call the model in messages.
    """
    name_nodes(model)  # before a Mul moves the places that later stages name nodes by
    groups = _groups_of(model)
    _observe(model, groups, reader, name=name)
    alphas: dict[str, float | None] = {}
    folded = muls = 0
    for group in groups:
        alphas[group.tensor] = chosen = best_alpha(group.rows, group.weights, group.largest) if alpha is None else alpha
        if chosen is None:
            continue
        scale = smoothing_scale(group.largest, np.abs(group.weights).max(axis=1), chosen)
        _scale_weights(model, group, scale)
        if _fold_into_norm(model, group, scale):
            folded += 1
        else:
            _insert_mul(model, group, scale)
            muls += 1
    return {"alphas": alphas, "folded": folded, "muls": muls}


def smoothing_scale(activations: Floats, weights: Floats, alpha: float) -> Floats:
    """What each input channel is divided by: ``max|x|^alpha / max|w|^(1 - alpha)``, the geometric mean over all one.

    Args:
        activations: Largest magnitude of each channel, ``(channels,)``.
        weights: Largest weight that each channel meets, ``(channels,)``.
        alpha: From 0, which evens the weights, to 1, which evens the activation.

    Returns:
        ``(channels,)`` float32, within a factor of 1e4 of one; 1 for a channel that is never used.
    """
    used = (activations > 0) & (weights > 0)
    logarithm = alpha * np.log(np.where(used, activations, 1)) - (1 - alpha) * np.log(np.where(used, weights, 1))
    if used.any():
        logarithm -= logarithm[used].mean()
    scale: Floats = np.where(used, np.exp(np.clip(logarithm, -9.2, 9.2)), 1).astype(np.float32)
    return scale


def best_alpha(rows: Sequence[Floats], weights: Floats, largest: Floats) -> float | None:
    """The alpha with the least squared error of the rounded product, or None where no smoothing is as good.

    Args:
        rows: Parts of the activation, each ``(n, channels)``; each part is rounded over its own range, as dynamic
            quantization would.
        weights: ``(channels, outputs)``, rounded per output.
        largest: Largest magnitude of each channel, ``(channels,)``.
    """
    products = [part @ weights for part in rows]
    reaches = np.abs(weights).max(axis=1)
    best, least = None, _rounding_error(rows, weights, products)
    for alpha in ALPHAS:
        scale = smoothing_scale(largest, reaches, alpha)
        error = _rounding_error([part / scale for part in rows], weights * scale[:, None], products)
        if error < least:
            best, least = alpha, error
    return best


def _rounding_error(rows: Sequence[Floats], weights: Floats, products: Sequence[Floats]) -> float:
    step = np.maximum(np.abs(weights).max(axis=0), np.finfo(np.float32).tiny) / 127
    rounded = np.rint(weights / step) * step
    error = 0.0
    for part, product in zip(rows, products, strict=True):
        lo, hi = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
        step_x = np.float32((hi - lo) / 255 or 1.0)
        zero = np.rint(-lo / step_x)
        eight_bits = (np.clip(np.rint(part / step_x) + zero, 0, 255) - zero) * step_x
        error += float(np.square(eight_bits @ rounded - product).sum(dtype=np.float64))
    return error


def _groups_of(model: onnx.ModelProto) -> list[_Group]:
    """Every activation that meets constant two-dimensional weights which nothing else reads, in graph order."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = Counter(name for graph in graphs_of(model.graph) for node in graph.node for name in node.input)
    groups: dict[str, _Group] = {}
    for node in model.graph.node:
        if (
            node.op_type not in ("Attention", "MatMul", "Gemm")
            or node.input[0] in tensors
            or node.input[1] not in tensors
        ):
            continue
        tensor = tensors[node.input[1]]
        if (
            len(tensor.dims) != 2
            or tensor.data_type != TensorProto.FLOAT
            or readers[tensor.name] > 1
            or _flag(node, "transA")
        ):
            continue
        weights = numpy_helper.to_array(tensor)
        weights = weights.T if _flag(node, "transB") else weights
        group = groups.setdefault(
            node.input[0],
            _Group(node.input[0], [], np.zeros((len(weights), 0), np.float32), np.zeros(len(weights), np.float32)),
        )
        group.nodes.append(node)
        group.weights = np.concatenate([group.weights, weights], axis=1)
    return list(groups.values())


def _observe(model: onnx.ModelProto, groups: Sequence[_Group], reader: Reader, *, name: str) -> None:
    inputs = {spec.name for spec in input_specs(model)}
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    inner = [group.tensor for group in groups if group.tensor not in inputs]
    del shown.graph.output[:]
    shown.graph.output.extend(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None) for tensor in inner)
    session = Session(shown.SerializeToString(), name=name) if inner else None
    for batch in reader:
        values = dict(batch) | (session.run(batch) if session else {})
        for group in groups:
            group.see(values[group.tensor])


def _scale_weights(model: onnx.ModelProto, group: _Group, scale: Floats) -> None:
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in group.nodes:
        tensor = tensors[node.input[1]]
        factor = scale if _flag(node, "transB") else scale[:, None]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, tensor.name))


def _fold_into_norm(model: onnx.ModelProto, group: _Group, scale: Floats) -> bool:
    """Divide the gain and bias of the LayerNormalization before the group, if it writes for the group alone."""
    names = [name for graph in graphs_of(model.graph) for node in graph.node for name in node.input]
    names += [value.name for value in model.graph.output]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    norm = next((node for node in model.graph.node if node.output[0] == group.tensor), None)
    if norm is None or norm.op_type != "LayerNormalization" or names.count(group.tensor) != len(group.nodes):
        return False
    parameters = [name for name in norm.input[1:] if name]
    if any(
        name not in tensors or names.count(name) != 1 or list(tensors[name].dims) != [scale.size] for name in parameters
    ):
        return False
    for name in parameters:
        tensors[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensors[name]) / scale, name))
    return True


def _insert_mul(model: onnx.ModelProto, group: _Group, scale: Floats) -> None:
    """``tensor * (1 / scale)`` for the group's nodes, written before the first of them."""
    taken = {name for node in model.graph.node for name in (*node.input, *node.output, node.name)}
    smooth = f"{group.tensor}_smooth"
    while taken & {smooth, f"{smooth}_factor", f"{smooth}_mul"}:
        smooth += "_"
    model.graph.initializer.append(numpy_helper.from_array((1 / scale).astype(np.float32), f"{smooth}_factor"))
    names = [node.output[0] for node in group.nodes]
    place = next(i for i, node in enumerate(model.graph.node) if node.output[0] in names)
    mul = helper.make_node("Mul", [group.tensor, f"{smooth}_factor"], [smooth], name=f"{smooth}_mul")
    for node in group.nodes:
        node.input[0] = smooth
    model.graph.node.insert(place, mul)


def _flag(node: onnx.NodeProto, name: str) -> bool:
    return any(attribute.name == name and attribute.i for attribute in node.attribute)
