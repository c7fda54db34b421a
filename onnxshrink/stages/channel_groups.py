"""Which channels can go, and what goes with them: Torch-Pruning's groups, ranked, and cut into whole units.

```
group   the layers that must lose the same channels, by the dependency graph
unit    what goes at once: a channel; one of each part of a grouped layer; an attention head
cut     the units of a group that are removed
```
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn

from onnxshrink.runtime.torch_model import Cut, PruningPass
from onnxshrink.stages.importance import Importance

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
"""Layers whose channels are counted."""

_ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM)  # noqa: SLF001  the class of all convolutions has no other name
_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention, nn.LSTM, nn.Parameter)


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Layers that must lose the same channels.

    Attributes:
        root: Name of the module that a cut starts at.
        out: True if it is the root's output channels that are cut, else its input channels.
        layers: Names of the convolutions and linear layers whose output channels these are.
        units: Channels of the root that go at once, for each unit.
        scores: Importance of each unit, ``(units,)``.
        heads: True if a unit is an attention head: heads are not rounded, and ranked among themselves.
        exact: True if nothing mixes these channels with others, so that removing silent ones changes no other number.
    """

    root: str
    out: bool
    layers: tuple[str, ...]
    units: tuple[tuple[int, ...], ...]
    scores: Tensor
    heads: bool
    exact: bool

    def cut(self, kept: int) -> Cut | None:
        """The cut that leaves the ``kept`` most important units, or None where that is all of them."""
        order = torch.argsort(self.scores, stable=True).tolist()
        removed = order[: len(self.units) - kept]
        channels = sorted(channel for unit in removed for channel in self.units[unit])
        return (self.root, self.out, tuple(channels)) if channels else None

    def rounded(self, wanted: int, round_to: int) -> int:
        """Units to keep, at most ``wanted`` of them but never none, so that the channels are a multiple."""
        step = 1 if self.heads else round_to // math.gcd(round_to, len(self.units[0]))
        return min(max(wanted // step * step, step), len(self.units))


def find_groups(
    network: nn.Module,
    graph: tp.DependencyGraph,
    importance: Importance,
    *,
    ignored: Sequence[nn.Module],
    num_heads: Mapping[str, int],
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Every group of channels that may be cut.

    Args:
        network: A `traceable` network.
        graph: Its dependency graph.
        importance: Scores of a group.
        ignored: Modules whose output channels stay.
        num_heads: Heads of the layers that give queries, keys and values, by name.

    Returns:
        The groups in the graph's order, and by layer the reason why others stay whole.
    """
    names = {module: name for name, module in network.named_modules()}
    tied = _tied(network)
    groups: list[ChannelGroup] = []
    declined: dict[str, str] = {}
    whole = [part for module in ignored for part in module.modules()]
    for group in graph.get_all_groups(ignored_layers=whole, root_module_types=_ROOTS):
        layers = tuple(dict.fromkeys(names[m] for m in _out_modules(graph, group) if isinstance(m, LAYERS)))
        shared = sorted({tied[names[m]] for dep, _ in group if (m := dep.target.module) in names and names[m] in tied})
        heads = {num_heads[name] for name in layers if name in num_heads}
        reason: str | None = None
        if shared:
            reason = f"it holds or meets a weight that is shared ({shared[0]})"
        elif len(heads) > 1:
            reason = f"queries, keys and values have different numbers of heads ({sorted(heads)})"
        elif heads:
            group = _from_the_projection(graph, group)  # noqa: PLW2901  the same channels, seen from where they end
            if group is None:
                reason = "no linear layer takes what its heads give"
        if reason is not None or group is None:
            declined |= dict.fromkeys(layers, reason or "")
            continue
        try:
            scores = importance(group)
        except IndexError:  # Torch-Pruning scores layer by layer, by indices that one of them does not have
            declined |= dict.fromkeys(layers, "it meets layers with another number of channels, as by padding")
            continue
        if scores is not None:
            groups.append(_group(names, graph, group, layers, scores.detach().cpu(), heads=next(iter(heads), 0)))
    return groups, declined


def plan(
    groups: Sequence[ChannelGroup], ratio: float, initial: Mapping[str, int], *, everywhere: bool, round_to: int
) -> tuple[Cut, ...]:
    """The cuts that leave a share of the units.

    Args:
        groups: What may be cut.
        ratio: Share of the units there were at first, to be removed since then; from 0 to 1.
        initial: Units of each group at first, by its root.
        everywhere: Rank across all groups, not within each.
        round_to: Keep multiples of so many channels.
    """
    wanted: dict[str, int] = {}
    for heads in (False, True):
        pool = [group for group in groups if group.heads == heads]
        if everywhere and pool:
            total = sum(initial[group.root] for group in pool)
            scores = torch.cat([group.scores for group in pool])
            kept = torch.zeros(len(scores), dtype=torch.bool)
            kept[torch.argsort(scores, stable=True)[len(scores) - min(_share(total, ratio), len(scores)) :]] = True
            parts = torch.split(kept, [len(group.units) for group in pool])
            wanted |= {group.root: int(part.sum()) for group, part in zip(pool, parts, strict=True)}
        else:
            wanted |= {group.root: _share(initial[group.root], ratio) for group in pool}
    cuts = (group.cut(group.rounded(wanted[group.root], round_to)) for group in groups)
    return tuple(cut for cut in cuts if cut is not None)


def pruning_pass(
    network: nn.Module, groups: Sequence[ChannelGroup], cuts: Sequence[Cut], num_heads: Mapping[str, int]
) -> tuple[PruningPass, dict[str, int]]:
    """A pass of these cuts, with what the attention blocks must be told; and the heads of each named layer after it."""
    units = {group.root: group for group in groups if group.heads}
    after = dict(num_heads)
    attributes: dict[str, int] = {}
    for root, _, channels in cuts:
        if root not in units:
            continue
        group = units[root]
        kept = len(group.units) - len(channels) // len(group.units[0])
        for layer in group.layers:
            if layer in num_heads:
                after[layer] = kept
                attributes |= _told(network, layer, num_heads[layer], kept, len(group.units[0]))
    return PruningPass(tuple(cuts), attributes), after


def silence(network: nn.Module, graph: tp.DependencyGraph, cut: Cut) -> None:
    """Zero, in place, all that a cut would remove of convolutions, linear layers and batch norms.

    Removing channels that give nothing and are not listened to must leave every output as it was: if it does not, the
    dependency graph has mistaken which channels belong together.
    """
    root, out, channels = cut
    module = network.get_submodule(root)
    pruner = graph.get_pruner_of_module(module)
    group = graph.get_pruning_group(module, pruner.prune_out_channels if out else pruner.prune_in_channels, channels)
    with torch.no_grad():
        for dep, at in group:
            target = dep.target.module
            if graph.is_out_channel_pruning_fn(dep.handler):
                _zero_out(target, list(at))
            elif isinstance(target, (*LAYERS, nn.modules.conv._ConvNd)):  # noqa: SLF001
                _zero_in(target, list(at))


def _group(
    names: Mapping[nn.Module, str],
    graph: tp.DependencyGraph,
    group: tp.Group,
    layers: tuple[str, ...],
    scores: Tensor,
    *,
    heads: int,
) -> ChannelGroup:
    root = group[0].dep
    out = bool(graph.is_out_channel_pruning_fn(root.handler))
    n_channels = len(scores)
    if heads:
        width = n_channels // heads
        units = tuple(tuple(range(head * width, (head + 1) * width)) for head in range(heads))
        scores = scores.view(heads, width).mean(1)
    else:
        parts = max((_parts(dep.target.module) for dep, _ in group), default=1)
        width = n_channels // parts
        units = tuple(tuple(range(at, n_channels, width)) for at in range(width))
        scores = scores.view(parts, width).mean(0)
    exact = not any(isinstance(dep.target.module, _MIXING) for dep, _ in group)
    return ChannelGroup(names[root.target.module], out, layers, units, scores, heads > 0, exact)


def _parts(module: object) -> int:
    """Equal parts that a layer divides its channels into, each of which must lose as many."""
    if isinstance(module, nn.modules.conv._ConvNd):  # noqa: SLF001
        return 1 if module.groups == module.out_channels else module.groups
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    return module.num_heads if isinstance(module, nn.MultiheadAttention) else 1


def _share(total: int, ratio: float) -> int:
    return math.floor(total * (1.0 - ratio) + 1e-9)


def _out_modules(graph: tp.DependencyGraph, group: tp.Group) -> list[object]:
    return [dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]


def _from_the_projection(graph: tp.DependencyGraph, group: tp.Group) -> tp.Group | None:
    """The group as seen from the linear layer that takes the heads: there they lie side by side, once."""
    for dep, at in group:
        if isinstance(dep.target.module, nn.Linear) and graph.is_in_channel_pruning_fn(dep.handler):
            channels = list(range(dep.target.module.in_features))
            return graph.get_pruning_group(dep.target.module, dep.handler, channels) if at else None
    return None


def _tied(network: nn.Module) -> dict[str, str]:
    """Modules that share a parameter with another, by name: the parameter's name in both."""
    modules = dict(network.named_modules())
    owners: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] in modules:
            owners.setdefault(id(parameter), []).append(name)
    shared = [users for users in owners.values() if len(users) > 1]
    return {name.rpartition(".")[0]: " and ".join(users) for users in shared for name in users}


def _told(network: nn.Module, layer: str, heads: int, kept: int, width: int) -> dict[str, int]:
    """The whole numbers that the block around ``layer`` holds of its heads: how many, and how wide all are together."""
    block = layer.rpartition(".")[0]
    told: dict[str, int] = {}
    for attribute, value in vars(network.get_submodule(block)).items():
        if not isinstance(value, int) or isinstance(value, bool) or "head" not in attribute:
            continue
        name = f"{block}.{attribute}" if block else attribute
        if value == heads and not any(part in attribute for part in ("dim", "size", "width")):
            told[name] = kept
        elif value == heads * width and "all" in attribute:
            told[name] = kept * width
    return told


def _zero_out(module: object, at: list[int]) -> None:
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:  # noqa: SLF001
        module.weight[:, at] = 0
    elif isinstance(module, (*_ROOTS[:2], nn.modules.batchnorm._BatchNorm)) and module.weight is not None:  # noqa: SLF001
        module.weight[at] = 0
    else:
        return
    if module.bias is not None:
        module.bias[at] = 0


def _zero_in(module: nn.Module, at: list[int]) -> None:
    weight, groups = module.weight, getattr(module, "groups", 1)
    assert isinstance(weight, Tensor)  # noqa: S101  # a convolution or a linear layer
    if getattr(module, "transposed", False):
        weight[at] = 0
        return
    inputs, outputs = weight.shape[1], len(weight) // groups
    for channel in at:
        part, place = divmod(channel, inputs)
        weight[part * outputs : (part + 1) * outputs, place] = 0
