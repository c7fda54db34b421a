"""What comes out of a network's modules on the way to its outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.torch_model import run_network


@dataclass(frozen=True, slots=True)
class Seen:
    """One forward pass.

    Attributes:
        outputs: The network's outputs, in order.
        features: Module name to its output.
    """

    outputs: tuple[Tensor, ...]
    features: Mapping[str, Tensor]


def observe(network: nn.Module, inputs: Sequence[Tensor], modules: Collection[str] = ()) -> Seen:
    """Run a network and look at the outputs of the named modules.

    Of a module that gives several tensors the first counts, and of one that runs several times the last run.
    Half-precision results of mixed arithmetic are given in float32, in which losses are computed.

    Raises:
        ModelError: The network fails; or one of the modules does not run, or gives no tensor.
    """
    given: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: given.update({name: output})

    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    try:
        outputs = run_network(network, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name in modules:
        if name not in given:
            raise ModelError(
                f"the module {name!r} does not run when the network does",
                where=type(network).__name__,
                want="a module whose forward is called",
                fix="name one that it contains, or that contains it",
            )
    features = {name: _full(_first_tensor(given[name], name)) for name in modules}
    return Seen(tuple(map(_full, outputs)), features)


def _first_tensor(output: Any, name: str) -> Tensor:
    values = list(output.values()) if isinstance(output, Mapping) else output
    first = next(iter(values), None) if isinstance(values, (list, tuple)) else values
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise ModelError(
            f"the module {name!r} gives no floating tensor first",
            got=type(first).__name__,
            want="a tensor, or several",
            fix="name a module inside it",
        )
    return first


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
