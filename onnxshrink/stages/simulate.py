"""A network that computes as its quantized form will, and can still be trained: quantization-aware training.

Nothing is added to the network. While it runs, torch's functions are intercepted, in modules and outside of them, and
what the quantize stage will round is rounded: weights on their way into a convolution or product, and activations where
ONNX Runtime puts QuantizeLinear and DequantizeLinear, at what its quantizable operators read and write. An output waits
until it is read: BatchNorm, Relu and Clip are part of the operator before them, so what is rounded is their output.

Before training, where one scale serves a whole weight tensor, its few largest weights are clipped as far as the layer's
output gains from finer steps for all others; training heals what they meant. Then biases are corrected: rounding moves
the mean of a channel, and its bias moves it back to where it was in float (Nagel et al. 2019, "Data-Free Quantization
Through Weight Equalization and Bias Correction", section 4.2, with samples).

While it is trained, every parameter is held in steps: 1/127 of the largest magnitude that shares its scale (1/7 for 4
bits). So one learning rate suits all layers and widths. In absolute numbers a rate that moves the weights of one layer
by a thousandth of a step moves those of another by several.

Not simulated: int32 biases, what happens inside fused attention and recurrent layers, the rounding between a matrix
product and its bias, 7-bit weights that a forecast decides on, and nodes that are excluded by their ONNX names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from onnxshrink.calibration.prepare import SUITED_TO_TRANSFORMERS
from onnxshrink.calibration.ranges import Range, absurd_reason, value_range
from onnxshrink.calibration.statistics import TensorStatistics
from onnxshrink.config.stages import QuantizeStatic, QuantizeWeights
from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.torch_model import run_network
from onnxshrink.stages.fake_quantize import Scheme, best_clip, round_activation, rounded_weights
from onnxshrink.stages.fold_batch_norm import fold_batch_norms
from onnxshrink.stages.torch_operators import (
    FUSED,
    HAS_BIAS,
    HAS_WEIGHTS,
    MULTIPLIES,
    ONE_INPUT,
    OPERATORS,
    QUESTIONS,
    each_tensor,
)

__all__ = ["Scheme", "Simulation", "simulated"]


class Simulation(TorchFunctionMode):
    """While it is entered, torch's functions compute with the weights and activations that `scheme` rounds.

    Args:
        scheme: Settings of the quantize stage that will follow.
        folded: BatchNorms that were folded, for the facts.
    """

    def __init__(self, scheme: Scheme, *, folded: int = 0) -> None:
        super().__init__()
        self.scheme = scheme
        self.folded = folded
        self._phase: Literal["count", "observe", "correct", "round", "settle"] = "observe"
        self._statistics: list[TensorStatistics] = []
        self._limits: list[Range | None] = []
        self._place = 0
        # Means of the channels in float, by batch and by the number of the call in a forward pass.
        self._means: dict[tuple[int, int], Tensor] = {}
        self._batch, self._biased = 0, 0
        # How many layers multiply in a forward pass, and how many of them came so far.
        self._layers, self._layer = 0, 0
        self._op_types = scheme.op_types
        self._clips = WeakIdKeyDictionary()
        self._units = WeakIdKeyDictionary()
        # Tensors of this forward pass: outputs that wait to be read, True if they are rounded
        # then, and what others were rounded to.
        self._waiting = WeakIdKeyDictionary()
        self._rounded = WeakIdKeyDictionary()

    @property
    def activations(self) -> int:
        """Places in a forward pass where activations are rounded."""
        return sum(limits is not None for limits in self._limits)

    def attach(self, network: nn.Module) -> Callable[[], None]:
        """Simulate whenever ``network`` runs, in eval mode always: as it will be run; returns what ends it."""

        def before(module: nn.Module, _: Any) -> None:
            module.eval()
            self._place = self._biased = self._layer = 0
            self.__enter__()  # type: ignore[no-untyped-call]

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            result = each_tensor(output, self._read)
            self._waiting.clear()
            self._rounded.clear()
            return result

        handles = (
            network.register_forward_pre_hook(before),
            network.register_forward_hook(after, always_call=True),
        )

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def prepare(self, network: nn.Module, batches: Sequence[Sequence[Tensor]]) -> None:
        """Observe ranges of activations, clip weights, start to round, correct biases, hold parameters in steps."""
        if isinstance(self.scheme, QuantizeStatic):
            self._run("count", network, batches[:1])
            self._layers = self._layer
            self._run("observe", network, batches)
            self._limits = [self._range(seen, self.scheme) for seen in self._statistics]
            for weights, limit in self._clips.items():  # type: ignore[no-untyped-call]
                weights.data.clamp_(-limit, limit)
            self._run("correct", network, batches)
        self._statistics.clear()
        self._means.clear()
        self._phase = "round"
        for parameter in network.parameters():
            if parameter.requires_grad:
                self._units[parameter] = unit = self._unit(parameter.detach())
                parameter.data.div_(unit)

    @torch.no_grad()
    def _run(
        self,
        phase: Literal["count", "observe", "correct", "settle"],
        network: nn.Module,
        batches: Sequence[Sequence[Tensor]],
    ) -> None:
        self._phase = phase
        for self._batch, inputs in enumerate(batches):
            run_network(network, inputs)

    @staticmethod
    def _range(seen: TensorStatistics, settings: QuantizeStatic) -> Range | None:
        """The range of an activation; None for what no 8 bits can serve, which is left."""
        # `auto` asks the finished int8 model, which there is none of yet; `mse` is where it starts from most often.
        method = "mse" if settings.method == "auto" else settings.method
        fit = seen.is_finite and absurd_reason(seen) is None
        return value_range(seen, method, percentile=settings.percentile) if fit else None

    def restore(self) -> None:
        """Give the parameters their true size again; they are plain numbers from here on."""
        for parameter, unit in self._units.items():  # type: ignore[no-untyped-call]
            parameter.data.mul_(unit)
        self._units.clear()

    def settle(self, network: nn.Module, inputs: Sequence[Tensor]) -> None:
        """Leave every weight as it was last rounded, so that the quantize stage finds it on its grid."""
        self._run("settle", network, [inputs])

    def _unit(self, values: Tensor) -> Tensor:
        """A step of each scale's grid, in a shape that fits beside ``values``; 1/127 where all are zero."""
        shared = values.ndim < 2 or (
            isinstance(self.scheme, QuantizeStatic) and self.scheme.granularity == "per_tensor"
        )
        largest = values.abs().amax(dim=tuple(range(0 if shared else 1, values.ndim)), keepdim=True)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        return largest / (7 if isinstance(self.scheme, QuantizeWeights) and self.scheme.bits == 4 else 127)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func`` as it will be run when quantized."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in QUESTIONS:
            return func(*args, **kwargs)
        if self._units:
            args = tuple(each_tensor(arg, self._true) for arg in args)
            kwargs = {key: each_tensor(value, self._true) for key, value in kwargs.items()}
        if name in FUSED and args and isinstance(args[0], Tensor) and args[0] in self._waiting:
            is_rounded = self._waiting[args[0]]
            value = self._call(func, args, kwargs, OPERATORS.get(name))
            if value in self._rounded:
                del self._rounded[value]  # of what it was before, where it works in place
            self._waiting[value] = is_rounded
            return value
        if self._phase == "count" and name == "layer_norm" and self.scheme.op_types is None:
            self._op_types = SUITED_TO_TRANSFORMERS  # as the quantize stage will find
        left = self._is_left(name)
        operator = None if left else self._operator(name, args)
        read = self._read_input if operator else self._read
        kept = len(args) if operator not in ONE_INPUT else 1
        inputs = [each_tensor(arg, read) for arg in args[:kept]] + list(args[kept:])
        if operator in HAS_WEIGHTS:
            inputs, kwargs = self._with_weights(operator, inputs, dict(kwargs))
        value = self._call(func, inputs, kwargs, operator)
        if operator in HAS_WEIGHTS and self._phase == "observe":
            self._find_clip(func, operator, inputs, kwargs, value)
        if (operator or left) and isinstance(value, Tensor) and isinstance(self.scheme, QuantizeStatic):
            self._waiting[value] = not left
        return value

    def _call(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], operator: str | None
    ) -> Any:
        """What a function gives; before training also what its channels' means are, or should be."""
        value = func(*args, **kwargs)
        if self._phase not in ("observe", "correct") or operator not in HAS_BIAS:
            return value
        bias = kwargs.get("bias", args[2] if len(args) > 2 and operator != "BatchNormalization" else None)
        if not isinstance(bias, nn.Parameter):
            return value
        axis = value.ndim - 1 if operator == "Gemm" else 1
        mean = value.mean(dim=[at for at in range(value.ndim) if at != axis])
        key = self._batch, self._biased
        self._biased += 1
        if self._phase == "observe":
            self._means[key] = mean
        elif key in self._means and mean.shape == self._means[key].shape == bias.shape:
            # The first batch corrects in full, the second by a half, ...: in the end their mean has been subtracted.
            moved = (mean - self._means[key]) / (self._batch + 1)
            bias.data.sub_(moved)
            value = value - moved.reshape([-1 if at == axis else 1 for at in range(value.ndim)])
        return value

    def _find_clip(
        self, func: Callable[..., Any], operator: str, inputs: list[Any], kwargs: Mapping[str, Any], wanted: Tensor
    ) -> None:
        """Where to clip weights that share one scale."""
        weights = kwargs["weight"] if "weight" in kwargs else inputs[1]
        shared = isinstance(self.scheme, QuantizeStatic) and self.scheme.granularity == "per_tensor"
        if not shared or operator == "Gather" or not isinstance(weights, nn.Parameter) or weights in self._clips:
            return

        def noise(rounded: Tensor) -> Tensor:
            given = {"weight": rounded} if "weight" in kwargs else {}
            args = inputs if given else [inputs[0], rounded, *inputs[2:]]
            added: Tensor = func(*args, **{**kwargs, **given}) - wanted
            return added

        axis = wanted.ndim - 1 if operator == "Gemm" else 1
        self._clips[weights] = best_clip(weights.detach(), operator, self.scheme, noise, axis=axis)

    def _true(self, value: Any) -> Any:
        """A parameter in its true size."""
        return value * self._units[value] if isinstance(value, nn.Parameter) and value in self._units else value

    def _is_left(self, name: str) -> bool:
        """True for the first and last layers that the scheme leaves in float."""
        if OPERATORS.get(name) not in MULTIPLIES:
            return False
        place, self._layer = self._layer, self._layer + 1
        if not isinstance(self.scheme, QuantizeStatic):
            return False
        first, last = self.scheme.float_first, self.scheme.float_last
        return self._phase != "count" and not first <= place < self._layers - last and bool(first or last)

    def _operator(self, name: str, args: Sequence[Any]) -> str | None:
        """The ONNX operator that a call becomes, or None if its kind is not quantized."""
        operator = OPERATORS.get(name)
        if operator == "Gemm" and args and args[0].ndim != 2:
            operator = "MatMul"
        if name == "mean" and args and args[0].ndim != 4:
            return None  # of a map it is a pool, which the stage `optimize` makes of it
        if operator is None or (self._op_types is not None and operator not in self._op_types):
            return None
        return "Gemm" if name == "linear" else operator

    def _read_input(self, value: Any) -> Any:
        """What a quantized operator reads in place of ``value``."""
        is_activation = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
        return self._round(value) if is_activation and isinstance(self.scheme, QuantizeStatic) else value

    def _read(self, value: Any) -> Any:
        """What a float operator reads: what a quantized one wrote is rounded."""
        is_rounded = isinstance(value, Tensor) and value in self._waiting and self._waiting[value]
        return self._round(value) if is_rounded else value

    def _round(self, value: Tensor) -> Tensor:
        if value in self._rounded:
            known: Tensor = self._rounded[value]
            return known
        place, self._place = self._place, self._place + 1
        result = value
        if self._phase == "count":
            return value
        if self._phase == "observe":
            if place == len(self._statistics):
                self._statistics.append(TensorStatistics())
            self._statistics[place].update(value.detach().float().cpu().numpy())
        elif place >= len(self._limits):
            raise ModelError(
                "the network takes another way through its forward than it took on the first samples",
                want="the same operations for every batch",
                fix="keep branches that depend on the data out of `forward`, or train without `simulate`",
            )
        elif (limits := self._limits[place]) is not None:
            result = round_activation(value, limits)
        self._rounded[value] = result
        self._rounded[result] = result
        return result

    def _with_weights(
        self, operator: str, inputs: list[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a function, the weights among them rounded."""
        weights = kwargs["weight"] if "weight" in kwargs else inputs[1]
        if self._phase in ("count", "observe") or not weights.is_floating_point():
            return inputs, kwargs
        rounded = rounded_weights(weights, operator, self.scheme)
        if self._phase == "settle" and isinstance(weights, nn.Parameter):
            weights.copy_(rounded)
        if "weight" in kwargs:
            return inputs, kwargs | {"weight": rounded}
        return [inputs[0], rounded, *inputs[2:]], kwargs


@contextmanager
def simulated(network: nn.Module, scheme: Scheme, batches: Sequence[Sequence[Tensor]]) -> Iterator[Simulation]:
    """Fold BatchNorms, find the ranges of activations, and let the network compute with rounded numbers meanwhile.

    Afterwards it computes in float again, its weights on the grid on which they were last rounded.

    Args:
        network: What to train; its state dict keeps names and shapes.
        scheme: Settings of the quantize stage that will follow.
        batches: Inputs that the ranges come from.
    """
    network.eval()
    simulation = Simulation(scheme, folded=len(fold_batch_norms(network, batches[0])))
    detach = simulation.attach(network)
    try:
        simulation.prepare(network, batches)
        yield simulation
        simulation.restore()
        simulation.settle(network, batches[0])
    finally:
        simulation.restore()
        detach()
