"""Modules that the user names, or the mistake with the nearest name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from onnxshrink.core.errors import ConfigError
from onnxshrink.core.tensors import did_you_mean

_SHOWN = 12


def find_modules(network: nn.Module, names: Sequence[str], *, option: str, where: str) -> list[nn.Module]:
    """The modules of those dotted names, in that order.

    Args:
        network: Where they are.
        names: As in `named_modules`; the empty name, which is the whole network, is refused.
        option: The setting that names them, for the message.
        where: The step, for the message.

    Raises:
        ConfigError: There is no such module.
    """
    modules = dict(network.named_modules())
    for name in names:
        if name not in modules or not name:
            raise unknown_module(network, name, option=option, where=where)
    return [modules[name] for name in names]


def unknown_module(network: nn.Module, name: str, *, option: str, where: str) -> ConfigError:
    """The error of a name that no module has: with the nearest that one has, and some that hold weights."""
    modules = dict(network.named_modules())
    weighted = [
        known for known, module in modules.items() if known and next(module.parameters(recurse=False), None) is not None
    ]
    return ConfigError(
        f"`{option}` names {name!r}, and the network has no such module",
        where=where,
        got=name,
        want="a module's name, such as " + (", ".join(weighted[:_SHOWN]) or "none: it has no parts"),
        fix=did_you_mean(name, [known for known in modules if known]),
    )
