"""`method: auto`: the range of each activation by the method that brings the model's outputs nearest to the float ones.

Starting from the best single method, the tensors are visited once in the order of the graph. Each takes another
method's range where that lowers the error of the outputs on every few samples, all other tensors being as they are by
then, by more than chance would: 61 tensors with three candidates each always hold some that fit 16 samples by luck.

A trial is one forward pass and no new session: scales and zero points of the activations are inputs of one model, which
ONNX Runtime then computes in float with all values rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxshrink.calibration.ranges import Range
from onnxshrink.config.stages import CalibrationMethod
from onnxshrink.core.artifact import Facts
from onnxshrink.core.drift import Drift
from onnxshrink.core.errors import DataError
from onnxshrink.core.report import finite
from onnxshrink.core.tensors import Array, Batch
from onnxshrink.runtime.session import Session

Noise: TypeAlias = NDArray[np.float64]
"""Error power of each sample over the mean signal power of all, ``(n_samples,)``, summed over the outputs."""

Grid: TypeAlias = tuple[Array, Array]
"""Scale and zero point of a tensor, both scalars."""

_ALIKE = 0.02
_STANDARD_ERRORS = 2.0
_SCALE, _ZERO_POINT = "_scale", "_zero_point"  # ONNX Runtime's quantizers call them so, after the tensor


@dataclass(frozen=True, slots=True)
class ChosenRanges:
    """A range for every tensor.

    Attributes:
        ranges: Tensor name to ``(lo, hi)``.
        facts: How near each method comes by itself and all together, and what each tensor took and gained by it.
    """

    ranges: Mapping[str, Range]
    facts: Facts


def choose_ranges(
    candidates: Mapping[CalibrationMethod, Mapping[str, Range]],
    quantize: Callable[[Mapping[str, Range]], onnx.ModelProto],
    original: onnx.ModelProto,
    samples: Iterable[Batch],
    *,
    progress: Callable[[int, int], None],
    name: str = "model",
) -> ChosenRanges:
    """Choose among the methods, tensor by tensor.

    On these samples the result is never worse than the best single method.

    Args:
        candidates: Each method's range for every tensor; of equally good ones the first is kept.
        quantize: Quantizes the model to QDQ form with given ranges; all its results differ in scales only.
        original: The float model.
        samples: Some calibration samples, one at a time; all are held, at least one.
        progress: Told how many tensors of how many are done.
        name: What to call the model in messages.

    Raises:
        DataError: There are no samples.

    Source: coordinate descent on the error of the outputs as in Nahshan et al. 2021, "Loss Aware Post-training
        Quantization", over a few given ranges per tensor; the test against chance is ours.
    """
    models = {method: quantize(ranges) for method, ranges in candidates.items()}
    base = next(iter(models.values()))
    grids = {method: _grids(model, candidates[method]) for method, model in models.items()}
    tensors = [tensor for tensor in _in_order(base) if all(tensor in grid for grid in grids.values())]
    fake = _FakeQuantized(base, tensors, original, samples, name=name)
    noises = {method: fake.noise(grid) for method, grid in grids.items()}
    best = min(noises, key=lambda method: float(noises[method].mean()))
    chosen, noise = dict.fromkeys(tensors, best), noises[best]
    grid = {tensor: grids[best][tensor] for tensor in tensors}
    gains: dict[str, float] = {}
    for done, tensor in enumerate(tensors):
        before = noise
        for method in _distinct(tensor, best, grids):
            trial = grid | {tensor: grids[method][tensor]}
            tried = fake.noise(trial)
            if is_better(tried, noise):
                grid, noise, chosen[tensor] = trial, tried, method
        if chosen[tensor] != best:
            gains[tensor] = float(1 - noise.mean() / before.mean())
        progress(done + 1, len(tensors))
    ranges = {tensor: candidates[chosen.get(tensor, best)][tensor] for tensor in candidates[best]}
    facts: Facts = {
        "sqnr_db": {method: _decibels(one) for method, one in noises.items()} | {"auto": _decibels(noise)},
        "best_single": best,
        "tensors": len(tensors),
        "changed": {tensor: {"method": chosen[tensor], "gain": gain} for tensor, gain in gains.items()},
    }
    return ChosenRanges(ranges, facts)


def is_better(tried: Noise, noise: Noise) -> bool:
    """True where ``tried`` is less by more than two standard errors of the mean difference.

    One sample gives no standard error; any less is better then. What is no number is worse than any number.
    """
    if not np.isfinite(tried).all():
        return False
    if not np.isfinite(noise).all():
        return True
    less = noise - tried
    error = less.std(ddof=1) / math.sqrt(less.size) if less.size > 1 else 0.0
    return bool(less.mean() > _STANDARD_ERRORS * error)


class _FakeQuantized:
    """A quantized model whose activations take their scales and zero points from outside, and its drift.

    Args:
        model: A QDQ model.
        tensors: The activations.
        original: The float model.
        samples: What it is measured on.
        name: What to call the model in messages.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        tensors: Sequence[str],
        original: onnx.ModelProto,
        samples: Iterable[Batch],
        *,
        name: str,
    ) -> None:
        lifted = onnx.ModelProto()
        lifted.CopyFrom(model)
        outside = {tensor + part for tensor in tensors for part in (_SCALE, _ZERO_POINT)}
        constants = list(lifted.graph.initializer)
        del lifted.graph.initializer[:]
        for constant in constants:
            if constant.name in outside:
                lifted.graph.input.append(helper.make_tensor_value_info(constant.name, constant.data_type, []))
            else:
                lifted.graph.initializer.append(constant)
        # Without this ONNX Runtime would round the weights of nodes that were left in float.
        self._session = Session(lifted.SerializeToString(), config={"session.disable_quant_qdq": "1"}, name=name)
        reference = Session(original.SerializeToString(), name=name)
        self._batches = list(samples)
        if not self._batches:
            raise DataError("there are no calibration samples", where=name, want="at least one sample")
        self._wanted = [reference.run(batch) for batch in self._batches]
        self._power = {
            output: sum(self._drift(output, wanted, wanted).reference_squares for wanted in self._wanted)
            / len(self._wanted)
            for output in self._wanted[0]
        }

    def noise(self, grid: Mapping[str, Grid]) -> Noise:
        """Of each sample, infinite where an output is no number."""
        outside = {tensor + _SCALE: scale for tensor, (scale, _) in grid.items()}
        outside |= {tensor + _ZERO_POINT: zero_point for tensor, (_, zero_point) in grid.items()}
        noises = []
        for batch, wanted in zip(self._batches, self._wanted, strict=True):
            got = self._session.run({**batch, **outside})
            drifts = [self._drift(output, wanted, got) for output in wanted]
            noises.append(sum(math.inf if d.flaw else d.sum_squares / (self._power[d.output] or 1.0) for d in drifts))
        return np.array(noises, np.float64)

    @staticmethod
    def _drift(output: str, wanted: Mapping[str, Array], got: Mapping[str, Array]) -> Drift:
        return Drift(output).update(wanted[output], got[output])


def _grids(model: onnx.ModelProto, tensors: Iterable[str]) -> dict[str, Grid]:
    """Scale and zero point of those ``tensors`` that have their own in a QDQ model."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        tensor: (
            numpy_helper.to_array(constants[tensor + _SCALE]),
            numpy_helper.to_array(constants[tensor + _ZERO_POINT]),
        )
        for tensor in tensors
        if tensor + _SCALE in constants
    }


def _in_order(model: onnx.ModelProto) -> list[str]:
    """The tensors that are quantized, each once, in the order of the graph."""
    scales = (node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear")
    return list(dict.fromkeys(scale.removesuffix(_SCALE) for scale in scales))


def _distinct(
    tensor: str, best: CalibrationMethod, grids: Mapping[CalibrationMethod, Mapping[str, Grid]]
) -> list[CalibrationMethod]:
    """The methods worth a trial: whose grid for the tensor hardly equals that of ``best`` or of one before."""
    methods = [best]
    for method, grid in grids.items():
        if not any(_alike(grid[tensor], grids[other][tensor]) for other in methods):
            methods.append(method)
    return methods[1:]


def _alike(a: Grid, b: Grid) -> bool:
    return bool(a[1] == b[1]) and math.isclose(float(a[0]), float(b[0]), rel_tol=_ALIKE)


def _decibels(noise: Noise) -> float | None:
    mean = float(noise.mean())
    return finite(-10 * math.log10(mean) if mean else math.inf)
