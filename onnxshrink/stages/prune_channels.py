"""Channel pruning: whole channels go, with everything that depends on them, so that the network really is smaller."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from onnxshrink.config.stages import Finetune, PruneChannels
from onnxshrink.core.artifact import WEIGHTS_FILE, Artifact, Facts, digest_folder
from onnxshrink.core.errors import ConfigError, ModelError, ShrinkError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime.torch_model import (
    Architecture,
    build_network,
    count_macs,
    count_parameters,
    dependency_graph,
    example_inputs,
    load_network,
    prune_network,
    run_network,
    save_network,
    traceable,
)
from onnxshrink.runtime.torch_weights import load_weights
from onnxshrink.stages.channel_groups import LAYERS, ChannelGroup, find_groups, plan, pruning_pass
from onnxshrink.stages.context import Context
from onnxshrink.stages.importance import importance_of, take_gradients
from onnxshrink.stages.named_modules import find_modules, unknown_module
from onnxshrink.stages.pruning_budget import Cuts, Found, estimated_int8_bytes, search_ratio
from onnxshrink.stages.pruning_trial import unsound


@dataclass
class _State:
    """A network on its way to the target.

    Attributes:
        network: What is pruned, in place.
        architecture: With the passes that were made.
        ignored: Modules to leave alone.
        outputs: Names of the layers that give the outputs.
        num_heads: Heads of the named layers, now.
        declined: By layer, why it stays whole.
        initial: Units of each group before the first step, by its root.
        steps: What each step did, for the facts.
    """

    network: nn.Module
    architecture: Architecture
    ignored: list[nn.Module]
    outputs: list[str]
    num_heads: dict[str, int]
    declined: dict[str, str] = field(default_factory=dict)
    initial: dict[str, int] = field(default_factory=dict)
    steps: list[Facts] = field(default_factory=list)


def prune_channels(settings: PruneChannels, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Remove the least important channels of the network of ``source``; those of its outputs are kept.

    What cannot be pruned without changing more than its own channels is left whole, and the facts say why.

    Raises:
        ConfigError: A name in ``ignore`` or ``num_heads`` is no module of the network.
        ModelError: The network cannot be traced, nothing of it can be pruned, or the target is out of reach.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, by their package Torch-Pruning.
    """
    network, architecture = load_network(source)
    specs = architecture.inputs
    parameters, macs, channels = count_parameters(network), count_macs(network, specs), _channels(network)
    size = estimated_int8_bytes(network)
    shapes = _output_shapes(network, specs)
    state = _State(
        network,
        architecture,
        ignored=find_modules(network, settings.ignore, option="ignore", where=ctx.step),
        outputs=[],
        num_heads=_heads(network, settings.num_heads, ctx.step),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Torch-Pruning warns of what the trials find
            _to_target(settings, state, ctx)
    except ShrinkError:
        raise
    except Exception as e:  # Torch-Pruning raises what the network's own operations raise, and its own assertions
        raise ModelError(
            f"the network cannot be pruned: {type(e).__name__}: {e}",
            where=architecture.factory,
            fix="name the modules that reshape or split channels in `ignore`",
        ) from e
    network = _rebuilt(state)
    _check(network, specs, shapes, architecture.factory)
    save_network(network, state.architecture, out)
    after = _channels(network)
    facts: Facts = {
        "parameters_before": parameters,
        "parameters_after": count_parameters(network),
        "macs_before": macs,
        "macs_after": count_macs(network, specs),
        "int8_bytes_before_estimate": size,
        "int8_bytes_after_estimate": estimated_int8_bytes(network),
        "channels": {name: [count, after[name]] for name, count in channels.items()},
        "kept_for_outputs": state.outputs,
        "steps": state.steps,
    }
    whole = {name: count for name, count in channels.items() if after[name] == count and name not in state.outputs}
    if declined := {name: state.declined.get(name, f"all {count} channels kept") for name, count in whole.items()}:
        facts["declined"] = [f"{name}: {reason}" for name, reason in declined.items()]
    return facts


def _to_target(settings: PruneChannels, state: _State, ctx: Context) -> None:
    """Prune, and train between the steps."""
    with traceable(state.network):
        layers = _output_layers(state.network, example_inputs(state.architecture.inputs, 2))
    names = {module: name for name, module in state.network.named_modules()}
    state.outputs = [names[layer] for layer in layers]
    state.ignored = [*layers, *state.ignored]
    start = _measure(settings, state.architecture)(state.network)
    for step in range(1, settings.steps + 1):
        groups = _groups(settings, state, ctx)
        share = step / settings.steps
        ratio, cuts, facts = _chosen(settings, state, groups, share, start)
        done, state.num_heads = pruning_pass(state.network, groups, cuts, state.num_heads)
        if cuts:
            prune_network(state.network, state.architecture.inputs, done)
            state.architecture = state.architecture.pruned(done)
        state.steps.append({"pruning_ratio": ratio, **facts})
        ctx.events.progress(ctx.step, step, settings.steps, f"pruning ratio {ratio:.3f}")
        if settings.finetune is not None and step < settings.steps:
            _train(Finetune(**settings.finetune.model_dump()), state, ctx)


def _groups(settings: PruneChannels, state: _State, ctx: Context) -> list[ChannelGroup]:
    """What may be cut, scored as the network is now, without the groups that a trial has refused."""
    network, specs = state.network, state.architecture.inputs
    taylor = settings.importance == "taylor"
    samples = take_gradients(network, specs, ctx) if taylor else 0
    with traceable(network), torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.seed + len(state.steps))
        graph = dependency_graph(network, example_inputs(specs, 2))
        groups, declined = find_groups(
            network, graph, importance_of(settings), ignored=state.ignored, num_heads=state.num_heads
        )
    network.zero_grad()
    if taylor:
        ctx.events.progress(ctx.step, len(state.steps), settings.steps, f"gradients of {samples} samples")
    if not state.steps:
        state.declined = declined | unsound(network, specs, groups, state.num_heads)
    groups = [group for group in groups if not any(layer in state.declined for layer in group.layers)]
    if not groups:
        raise ModelError(
            "nothing of the network can be pruned",
            where=state.architecture.factory,
            got="; ".join(f"{name}: {reason}" for name, reason in state.declined.items()) or "only layers of outputs",
            want="a layer whose channels can go without changing others",
            fix="name attention layers in `num_heads`; take names out of `ignore`; or leave this stage out",
        )
    for group in groups:
        state.initial.setdefault(group.root, len(group.units))
    return groups


def _chosen(
    settings: PruneChannels, state: _State, groups: Sequence[ChannelGroup], share: float, start: int
) -> tuple[float, Cuts, Facts]:
    """The pruning ratio of a step, its cuts, and for a budget what was tried."""
    everywhere = settings.scope == "global"

    def cuts(ratio: float) -> Cuts:
        return plan(groups, ratio, state.initial, everywhere=everywhere, round_to=settings.round_to)

    if settings.pruning_ratio is not None:
        ratio = settings.pruning_ratio * share
        return ratio, cuts(ratio), {}
    target = _limit(settings, start)
    limit = start - share * (start - target)
    measure = _measure(settings, state.architecture)

    def after(removed: Cuts) -> int:
        trial = copy.deepcopy(state.network)
        done, _ = pruning_pass(trial, groups, removed, state.num_heads)
        prune_network(trial, state.architecture.inputs, done)
        return measure(trial)

    what = "multiply-accumulates" if settings.max_macs_ratio is not None else "bytes in int8"
    found: Found = search_ratio(cuts, after, limit, what=what, where=state.architecture.factory, target=target)
    return found.ratio, found.cuts, {"limit": limit, "tried": [list(pair) for pair in found.tried]}


def _limit(settings: PruneChannels, start: int) -> float:
    if settings.max_macs_ratio is not None:
        return settings.max_macs_ratio * start
    return float(settings.max_size or 0)


def _measure(settings: PruneChannels, architecture: Architecture) -> Callable[[nn.Module], int]:
    """What the target counts."""
    if settings.max_size is not None:
        return estimated_int8_bytes
    return lambda network: count_macs(network, architecture.inputs)


def _train(settings: Finetune, state: _State, ctx: Context) -> None:
    """Fine-tune the network as it is now. The result is remembered: a killed run does not train it again."""
    with tempfile.TemporaryDirectory() as folder:
        save_network(state.network, state.architecture, Path(folder))
        tuned = ctx.derive(settings, Artifact("torch", Path(folder), digest_folder(Path(folder))))
    load_weights(state.network, tuned.path / WEIGHTS_FILE)


def _rebuilt(state: _State) -> nn.Module:
    """The network as every later stage will build it, from the factory and the history."""
    network = build_network(state.architecture)
    network.load_state_dict(state.network.state_dict())
    return network


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
            layers |= {node.module: None for node in out if isinstance(node.module, LAYERS)}
    return list(layers)


def _heads(network: nn.Module, num_heads: Mapping[str, int], step: str) -> dict[str, int]:
    """``num_heads``, once every name is a linear layer that divides into so many heads."""
    modules = dict(network.named_modules())
    for name, heads in num_heads.items():
        if name not in modules:
            raise unknown_module(network, name, option="num_heads", where=step)
        layer = modules[name]
        if not isinstance(layer, nn.Linear) or layer.out_features % heads:
            raise ConfigError(
                f"`num_heads` says that {name!r} gives {heads} heads",
                where=step,
                got=str(layer).partition("\n")[0],
                want=f"a linear layer whose output divides by {heads}",
                fix="name the linear layers that give queries, keys and values, each with its number of heads",
            )
    return dict(num_heads)


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
    return {name: int(module.weight.shape[0]) for name, module in network.named_modules() if isinstance(module, LAYERS)}
