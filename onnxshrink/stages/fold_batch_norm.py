"""BatchNorm folded into the convolution before it, as export does, in a network that keeps its structure.

Quantization sees the folded weights, so training for it has to see them too. The BatchNorm stays where it is and does
nothing but add a bias: the state dict keeps its names and shapes, and fits the user's factory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from onnxshrink.runtime.torch_model import run_network


@dataclass(frozen=True, slots=True)
class Folded:
    """A convolution and the BatchNorm that it has taken in."""

    layer: nn.Module
    norm: _BatchNorm


@torch.no_grad()
def fold_batch_norms(network: nn.Module, inputs: Sequence[Tensor]) -> list[Folded]:
    """Fold every BatchNorm whose input is a convolution or linear layer that nothing else reads; in place.

    Afterwards such a BatchNorm has mean 0, variance 1 less its epsilon, weight 1, and the folded bias: in eval mode it
    multiplies by exactly 1. The network's function is the same but for rounding in float32; it must not be put in
    train mode afterwards, which would normalize again.

    Args:
        network: In eval mode.
        inputs: A batch to follow the tensors with.

    Returns:
        What was folded, in the order of the forward pass.
    """
    pairs = _pairs(network, inputs)
    for pair in pairs:
        _fold(pair)
    return pairs


def _fold(pair: Folded) -> None:
    layer, norm = pair.layer, pair.norm
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise AssertionError(norm)  # `_pairs` leaves these out
    gain = torch.rsqrt(variance.double() + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight
    shift = ((0 if bias is None else bias) - mean.double()) * gain
    if norm.bias is not None:
        shift = shift + norm.bias
    weight.copy_(weight * gain.reshape(_along_outputs(layer, weight)))
    variance.fill_(1 - norm.eps)
    mean.zero_()
    if norm.weight is not None:
        norm.weight.fill_(1)
        norm.weight.requires_grad = False
    if bias is not None:
        bias.zero_()
    if norm.bias is not None:
        norm.bias.copy_(shift)
    else:
        mean.copy_(-shift)


def _along_outputs(layer: nn.Module, weight: Tensor) -> list[int]:
    """Shape of one number for each output channel beside ``weight``."""
    axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
    return [-1 if at == axis else 1 for at in range(weight.ndim)]


def _pairs(network: nn.Module, inputs: Sequence[Tensor]) -> list[Folded]:
    """Layers whose output goes to one BatchNorm and nowhere else; each of both is called once."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    found: list[Folded] = []
    calls: Counter[nn.Module] = Counter()
    read_elsewhere: set[nn.Module] = set()

    class Readers(TorchFunctionMode):
        """Notes layers whose output something other than BatchNorm computes with."""

        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and func is not torch.nn.functional.batch_norm:
                for arg in _flat((*args, *(kwargs or {}).values())):
                    if id(arg) in made:
                        read_elsewhere.add(made[id(arg)][0])
            return result

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, _BatchNorm):
            layer = made.get(id(args[0]), (None,))[0]
            if layer is not None:
                found.append(Folded(layer, module))
        else:
            made[id(output)] = module, output  # kept alive: no other tensor gets its id

    layers = [module for module in network.modules() if _takes_in(module) or isinstance(module, _BatchNorm)]
    handles = [module.register_forward_hook(after) for module in layers]
    with Readers():
        run_network(network, inputs)
    for handle in handles:
        handle.remove()
    return [
        pair
        for pair in found
        if calls[pair.layer] == calls[pair.norm] == 1
        and pair.layer not in read_elsewhere
        and pair.norm.running_mean is not None
    ]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _takes_in(module: nn.Module) -> bool:
    grouped = isinstance(module, _ConvTransposeNd) and module.groups > 1
    return isinstance(module, (_ConvNd, nn.Linear)) and not grouped
