"""Whether channels can go without changing others: tried on copies, before anything is removed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime.torch_model import (
    Cut,
    dependency_graph,
    example_inputs,
    prune_network,
    run_network,
    traceable,
)
from onnxshrink.stages.channel_groups import ChannelGroup, pruning_pass, silence

_TOLERANCE = 1e-3  # of the largest output: float sums in another order stay far below, a misplaced channel far above


def unsound(
    network: nn.Module, specs: Sequence[TensorSpec], groups: Sequence[ChannelGroup], num_heads: Mapping[str, int]
) -> dict[str, str]:
    """The layers whose channels cannot go alone, each with the reason.

    One unit of every group is cut. The network must still run at two batch sizes, and give outputs of the same shape;
    and where no norm or head mixes channels, cutting what was silenced before must leave every number as it was. Only
    if all groups together fail this is each tried by itself.

    Args:
        network: Left as it is.
        specs: Its inputs.
        groups: What may be cut.
        num_heads: Heads of the layers that give queries, keys and values.
    """
    cuts = {group.root: cut for group in groups if (cut := group.cut(len(group.units) - 1)) and len(group.units) > 1}
    tried = [group for group in groups if group.root in cuts]
    exact = [group for group in tried if group.exact]

    def reason(chosen: Sequence[ChannelGroup], *, numbers: bool) -> str | None:
        return _reason(network, specs, chosen, [cuts[group.root] for group in chosen], num_heads, numbers=numbers)

    if reason(tried, numbers=False) is None and reason(exact, numbers=True) is None:
        return {}
    refused = {group.root: reason([group], numbers=group.exact) for group in tried}
    return {layer: text for group in tried if (text := refused[group.root]) for layer in group.layers}


def _reason(
    network: nn.Module,
    specs: Sequence[TensorSpec],
    groups: Sequence[ChannelGroup],
    cuts: Sequence[Cut],
    num_heads: Mapping[str, int],
    *,
    numbers: bool,
) -> str | None:
    """Why these cuts together are not sound, or None."""
    if not groups:
        return None
    whole, pruned = copy.deepcopy(network), copy.deepcopy(network)
    done, _ = pruning_pass(network, groups, cuts, num_heads)
    if numbers:
        with traceable(whole):
            graph = dependency_graph(whole, example_inputs(specs, 2))
            for cut in cuts:
                silence(whole, graph, cut)
    before = _outputs(whole, specs)
    try:
        prune_network(pruned, specs, done)
        after = _outputs(pruned, specs)
    except Exception as e:  # noqa: BLE001  raised by the network's own operations, or by Torch-Pruning's assertions
        cause = str(e.__cause__ or e).strip().partition("\n")[0]
        return f"the network does not run without some of its channels ({cause or type(e).__name__})"
    if [output.shape for output in before] != [output.shape for output in after]:
        return "an output has another shape without some of its channels"
    if numbers and not all(_equal(x, y) for x, y in zip(before, after, strict=True)):
        return "other channels change when some of its channels go"
    return None


@torch.no_grad()
def _outputs(network: nn.Module, specs: Sequence[TensorSpec]) -> list[Tensor]:
    return [output for batch in (1, 2) for output in run_network(network, example_inputs(specs, batch))]


def _equal(before: Tensor, after: Tensor) -> bool:
    if not before.is_floating_point():
        return True
    difference, scale = (after - before).abs(), before.abs()
    return before.numel() == 0 or bool(difference.max() <= _TOLERANCE * scale.max().clamp(min=1e-6))
