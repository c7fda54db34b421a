"""Channel pruning: whole channels go, with everything that depends on them, so that the network really is smaller."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch_pruning as tp
from torch import Tensor, nn

from onnxshrink.config.stages import PruneChannels
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import ConfigError, ModelError, ShrinkError
from onnxshrink.core.tensors import TensorSpec, did_you_mean
from onnxshrink.runtime.torch_model import (
    Cut,
    count_macs,
    count_parameters,
    dependency_graph,
    example_inputs,
    load_network,
    run_network,
    save_network,
    traceable,
)
from onnxshrink.stages.context import Context

_NORMS = {"magnitude_l1": 1, "magnitude_l2": 2}
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


def prune_channels(settings: PruneChannels, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Remove the least important channels of the network of ``source``; those of its outputs are kept.

    Raises:
        ConfigError: A name in ``ignore`` is no module of the network.
        ModelError: The network cannot be traced, or does not run any more once pruned.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, by their package Torch-Pruning.
    """
    network, architecture = load_network(source)
    specs = architecture.inputs
    parameters, macs, channels = count_parameters(network), count_macs(network, specs), _channels(network)
    shapes = _output_shapes(network, specs)
    ignored = _ignored(network, settings.ignore, ctx.step)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Torch-Pruning warns of what the checks below find
            cuts, kept = _prune(network, settings, ignored, example_inputs(specs, 2))
    except ShrinkError:
        raise
    except Exception as e:  # Torch-Pruning raises what the network's own operations raise, and its own assertions
        raise ModelError(
            f"the network cannot be pruned: {type(e).__name__}: {e}",
            where=architecture.factory,
            fix="name the modules that reshape or split channels in `ignore`",
        ) from e
    _check(network, specs, shapes, architecture.factory)
    save_network(network, architecture.pruned(cuts), out)
    after = _channels(network)
    facts: Facts = {
        "parameters_before": parameters,
        "parameters_after": count_parameters(network),
        "macs_before": macs,
        "macs_after": count_macs(network, specs),
        "channels": {name: [count, after[name]] for name, count in channels.items()},
        "kept_for_outputs": kept,
    }
    whole = [name for name, count in channels.items() if after[name] == count and name not in kept]
    if whole:
        facts["declined"] = [f"{name}: all {channels[name]} channels kept" for name in whole]
    return facts


def _prune(
    network: nn.Module, settings: PruneChannels, ignored: Sequence[nn.Module], inputs: Sequence[Tensor]
) -> tuple[list[Cut], list[str]]:
    """Prune in place; the cuts that were made, and the names of the layers kept because they give the outputs."""
    names = {module: name for name, module in network.named_modules()}
    with traceable(network):
        outputs = _output_layers(network, inputs)
        pruner = tp.pruner.MetaPruner(
            network,
            inputs,
            importance=tp.importance.GroupMagnitudeImportance(p=_NORMS[settings.importance]),
            global_pruning=settings.scope == "global",
            pruning_ratio=settings.pruning_ratio,
            round_to=settings.round_to,
            ignored_layers=[*outputs, *ignored],
            forward_fn=run_network,
            # Its defaults are dicts that all pruners of a process share and write to.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        pruner.step()
    history = pruner.pruning_history()
    return [(name, bool(out), tuple(map(int, at))) for name, out, at in history], [names[layer] for layer in outputs]


def _output_layers(network: nn.Module, inputs: Sequence[Tensor]) -> list[nn.Module]:
    """The layers whose channels are channels of an output, whatever lies between: adding, flattening, concatenating."""
    given: list[Tensor] = []

    def forward(module: nn.Module, example: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given.extend(outputs := run_network(module, example))
        return outputs

    graph = dependency_graph(network, inputs, forward)
    ends = {output.grad_fn for output in given}
    layers: dict[nn.Module, None] = {}
    for group in graph.get_all_groups():
        out = [dep.target for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        if any(node.grad_fn in ends for node in out):
            layers |= {node.module: None for node in out if isinstance(node.module, _LAYERS)}
    return list(layers)


def _ignored(network: nn.Module, names: Sequence[str], step: str) -> list[nn.Module]:
    modules = dict(network.named_modules())
    for name in names:
        if name not in modules or not name:
            raise ConfigError(
                f"`ignore` names {name!r}, and the network has no such module",
                where=step,
                got=name,
                want="a module's name",
                fix=did_you_mean(name, list(modules)) or f"one of {', '.join(_channels(network))}",
            )
    return [modules[name] for name in names]


def _check(network: nn.Module, specs: Sequence[TensorSpec], shapes: list[torch.Size], factory: str) -> None:
    """Refuse a pruned network that does not run, or whose outputs changed their shape."""
    try:
        after = _output_shapes(network, specs)
    except ModelError as e:
        raise ModelError(
            f"the pruned network does not run: {e.what}",
            where=factory,
            fix="name the modules that split, reshape or index their channels in `ignore`",
        ) from e
    if after != shapes:
        raise ModelError(
            "pruning changed the shape of the outputs",
            where=factory,
            got=str([list(shape) for shape in after]),
            want=str([list(shape) for shape in shapes]),
            fix="name the layers that give the outputs in `ignore`",
        )


@torch.no_grad()
def _output_shapes(network: nn.Module, specs: Sequence[TensorSpec]) -> list[torch.Size]:
    return [output.shape for batch in (1, 2) for output in run_network(network, example_inputs(specs, batch))]


def _channels(network: nn.Module) -> dict[str, int]:
    """Output channels of each convolution and linear layer, by name."""
    return {
        name: int(module.weight.shape[0]) for name, module in network.named_modules() if isinstance(module, _LAYERS)
    }
