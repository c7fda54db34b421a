"""A target in multiply-accumulates or bytes, met by search over the pruning ratio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.torch_model import Cut

_HALVINGS = 12  # ratios 1/4096 apart: finer than one channel of any layer
_LAYER_BYTES = 8  # of an output channel beside its weights: an int32 bias and a float32 scale
_NODE_BYTES = 850  # of a layer's Conv or Gemm with the QuantizeLinear, DequantizeLinear and names around it

Cuts: TypeAlias = tuple[Cut, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Where a search ended.

    Attributes:
        ratio: The smallest ratio that meets the budget, as far as it was searched.
        cuts: What it removes.
        tried: Each ratio whose network was measured, with the measure.
    """

    ratio: float
    cuts: Cuts
    tried: tuple[tuple[float, int], ...]


def search_ratio(
    plan: Callable[[float], Cuts],
    measure: Callable[[Cuts], int],
    limit: float,
    *,
    what: str,
    where: str,
    target: float | None = None,
) -> Found:
    """The least pruning whose measure is within ``limit``, by bisection.

    Args:
        plan: The cuts of a ratio from 0 to 1; more of them, the larger it is.
        measure: Of the network after these cuts.
        limit: Largest measure allowed.
        what: What is measured, for the message.
        where: The network's origin, for the message.
        target: What later steps must come to, where ``limit`` is on the way there: it must be in reach as well.

    Raises:
        ModelError: Even removing all that may go is not enough; names what can be reached.
    """
    known: dict[Cuts, int] = {}
    tried: list[tuple[float, int]] = []

    def measured(ratio: float) -> int:
        cuts = plan(ratio)
        if cuts not in known:
            known[cuts] = measure(cuts)
            tried.append((ratio, known[cuts]))
        return known[cuts]

    low, high = 0.0, 1.0
    target = limit if target is None else target
    if measured(low) <= limit:
        return Found(low, plan(low), tuple(tried))
    if measured(high) > target:
        raise ModelError(
            f"the network cannot be pruned to {target:,.0f} {what}",
            where=where,
            got=f"{measured(high):,} {what} when all is removed that may be",
            want=f"a target of {measured(high):,} or more; it has {measured(0.0):,} unpruned",
            fix="raise the target, lower `round_to`, take names out of `ignore`, or begin with a smaller network",
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if measured(middle) <= limit else (middle, high)
    return Found(high, plan(high), tuple(tried))


def estimated_int8_bytes(network: nn.Module) -> int:
    """Size of the ONNX file after static int8 quantization, per channel; an estimate, made before there is a file.

    A weight of a matrix, a kernel or an embedding is one byte; each output channel of a convolution or linear layer has
    an int32 bias and a float32 scale; BatchNorm folds away; other parameters stay float32; and each layer has its
    nodes. Shared parameters count once.
    """
    total = 0
    seen: set[int] = set()
    for module in network.modules():
        layer = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))  # noqa: SLF001
        total += _NODE_BYTES if layer else 0
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001
                continue
            seen.add(id(parameter))
            if parameter.ndim >= 2:
                total += parameter.numel() + _LAYER_BYTES * (len(parameter) if layer else 1)
            elif not (layer and name == "bias"):
                total += 4 * parameter.numel()
    return total
