"""Torch networks as data: entry point and arguments, pruning history, tensors. Nothing is ever unpickled into code.

```
architecture.json      factory, args, digest of the factory's source, inputs, outputs, channels and weights pruned
weights.safetensors    the state dict
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch_pruning as tp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from onnxshrink.config.source import FactorySource
from onnxshrink.core.artifact import WEIGHTS_FILE, Artifact
from onnxshrink.core.errors import ModelError
from onnxshrink.core.importing import load_entry, source_digest, split_entry
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime.torch_weights import load_weights

ARCHITECTURE_FILE = "architecture.json"

Cut: TypeAlias = tuple[str, bool, tuple[int, ...]]
"""A module's name, whether its output channels were removed (or its input channels), and their indices at that time."""

Forward: TypeAlias = Callable[[nn.Module, Sequence[Tensor]], tuple[Tensor, ...]]

_DYNAMIC_AXIS = 32  # length of a named axis other than the batch in example inputs


@dataclass(frozen=True, slots=True)
class PruningPass:
    """Cuts that were made on one network, and what its modules were told of them.

    Attributes:
        cuts: In the order they were made.
        attributes: Whole numbers that modules hold beside their weights, such as ``block.num_heads``, by dotted name.
    """

    cuts: tuple[Cut, ...]
    attributes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Architecture:
    """All of a network but its weights.

    Attributes:
        factory: ``package.module:function``.
        args: Keyword arguments of the factory; plain JSON values.
        source: sha256 of the factory's source, so that changed code gives another artifact.
        inputs: Inputs in the order of ``forward``.
        outputs: Names of the outputs in ONNX, or None for the exporter's.
        pruning: One entry for each pruning pass, in the order they were made.
        sparse: Names of the parameters whose single weights were pruned: their zeros stay zero in every training.
    """

    factory: str
    args: Mapping[str, Any]
    source: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...] | None = None
    pruning: tuple[PruningPass, ...] = ()
    sparse: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: FactorySource) -> Architecture:
        """The architecture that a config describes, not pruned."""
        digest = source_digest(settings.factory)
        return cls(settings.factory, settings.args, digest, settings.specs, settings.outputs)

    def pruned(self, done: PruningPass) -> Architecture:
        """This architecture after one more pruning pass."""
        return replace(self, pruning=(*self.pruning, done))

    def to_json(self) -> str:
        """Text with sorted keys: the same architecture gives the same bytes."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """The inverse of `to_json`."""
        value = json.loads(text)
        return cls(
            factory=value["factory"],
            args=value["args"],
            source=value["source"],
            inputs=tuple(TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in value["inputs"]),
            outputs=tuple(value["outputs"]) if value["outputs"] is not None else None,
            pruning=tuple(
                PruningPass(tuple((name, out, tuple(at)) for name, out, at in done["cuts"]), done["attributes"])
                for done in value["pruning"]
            ),
            sparse=tuple(value["sparse"]),
        )


def save_network(network: nn.Module, architecture: Architecture, folder: Path) -> None:
    """Write a network into an artifact's folder; equal weights give equal bytes.

    Raises:
        ModelError: The state dict holds something other than tensors.
    """
    state = network.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the state dict entry {name!r} is no tensor",
                where=architecture.factory,
                got=type(value).__name__,
                want="tensors only",
                fix="keep extra state out of the state dict: rebuild it in the factory",
            )
    # Tied weights are written once for each name: safetensors refuses shared storage, and loading ties them again.
    save_file({name: value.detach().clone().contiguous() for name, value in state.items()}, folder / WEIGHTS_FILE)
    (folder / ARCHITECTURE_FILE).write_text(architecture.to_json(), encoding="utf-8")


def read_architecture(artifact: Artifact) -> Architecture:
    """The architecture of an artifact of kind ``torch``, without building it."""
    return Architecture.from_json((artifact.path / ARCHITECTURE_FILE).read_text(encoding="utf-8"))


def load_network(artifact: Artifact) -> tuple[nn.Module, Architecture]:
    """Build the network of an artifact of kind ``torch``: factory, then its pruning history, then its weights.

    Returns:
        The module in eval mode on the CPU, and its architecture. Whoever trains it keeps the zeros of its sparse
        parameters.

    Raises:
        ModelError: The factory fails, or its network no longer fits the weights.
    """
    architecture = read_architecture(artifact)
    network = build_network(architecture)
    load_weights(network, artifact.path / WEIGHTS_FILE)
    for name in architecture.sparse:
        hold_zeros(network.get_parameter(name))
    return network, architecture


def build_network(architecture: Architecture, *, seed: int = 0) -> nn.Module:
    """Call the factory, and remove the channels that were removed before.

    Args:
        architecture: What to build.
        seed: Torch's seed while the factory runs; the caller's random state is left as it was.

    Returns:
        The module in eval mode, with the factory's own weights.

    Raises:
        ModelError: The factory raises, or returns something other than a module.
    """
    factory = load_entry(architecture.factory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = factory(**architecture.args)
        except (Exception, SystemExit) as e:  # a user's factory may raise anything
            raise ModelError(
                f"the factory failed: {type(e).__name__}: {e}",
                where=architecture.factory,
                got=f"args {dict(architecture.args)}",
                want="a torch.nn.Module",
                fix="check `args`"
                if isinstance(e, TypeError)
                else "call it by hand: python -c 'import {0}; {0}.{1}()'".format(*split_entry(architecture.factory)),
            ) from e
    if not isinstance(network, nn.Module):
        raise ModelError(
            "the factory does not return a torch network",
            where=architecture.factory,
            got=type(network).__name__,
            want="a torch.nn.Module",
        )
    network = network.cpu().eval()
    for done in architecture.pruning:
        prune_network(network, architecture.inputs, done)
    return network


def prune_network(network: nn.Module, specs: Sequence[TensorSpec], done: PruningPass) -> None:
    """Make the cuts of one pass, in place. The only way channels are ever removed, so that history replays exactly."""
    with traceable(network):
        graph = dependency_graph(network, example_inputs(specs, 2))
        graph.load_pruning_history([[name, out, list(at)] for name, out, at in done.cuts])
    for name, value in done.attributes.items():
        module, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(module), attribute, value)


def hold_zeros(parameter: nn.Parameter) -> None:
    """Let no gradient reach the elements that are zero: those that are pruned stay so in training.

    Gradients are enough. A weight of zero whose gradients were all zero is left at zero by SGD and AdamW, by their
    momentum, by weight decay and by averages of the weights. The mask is the weights themselves, so there is none to
    store, to move to a device or to go on from.
    """
    if parameter.requires_grad:
        parameter.register_hook(lambda gradient: gradient * (parameter != 0))  # type: ignore[no-untyped-call]


def run_network(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One forward pass.

    Returns:
        The outputs in order; those of a dict in the order of its keys.

    Raises:
        ModelError: The network raises, or gives something other than tensors.
    """
    try:
        value = network(*inputs)
    except (Exception, SystemExit) as e:  # a user's forward may raise anything
        raise ModelError(
            f"the network fails on its inputs: {type(e).__name__}: {str(e).strip().partition(chr(10))[0]}",
            where=type(network).__name__,
            got=", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in inputs),
            want="inputs that its forward takes, in that order",
            fix="check `inputs`: order, shape and dtype",
        ) from e
    outputs = tuple(_flat(value))
    if not outputs or not all(isinstance(output, Tensor) for output in outputs):
        kinds = ", ".join(type(output).__name__ for output in outputs) or "nothing"
        raise ModelError("the network gives no tensors", where=type(network).__name__, got=kinds, want="tensors")
    return outputs


@contextmanager
def traceable(network: nn.Module) -> Iterator[None]:
    """Let Torch-Pruning work: it follows autograd, also into frozen layers, and what it cuts it leaves unfrozen."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    with torch.enable_grad():
        for parameter in network.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)


def dependency_graph(
    network: nn.Module, inputs: Sequence[Tensor], forward: Forward = run_network
) -> tp.DependencyGraph:
    """Torch-Pruning's graph of which channels depend on which, for a `traceable` network."""
    return tp.DependencyGraph().build_dependency(network, inputs, forward_fn=forward, verbose=False)


def example_inputs(specs: Sequence[TensorSpec], batch: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Seeded inputs to trace or probe a network with.

    Args:
        specs: The network's inputs. A name that stands on an axis 0 is the batch's; other named axes get length 32.
        batch: Length of the batch axes that are dynamic.
        seed: Seed of the values.

    Returns:
        One tensor for each input: standard normal if floating, else zeros and ones (valid as indices and masks).
    """
    batch_names = {spec.shape[0] for spec in specs if spec.shape}
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in specs:
        shape = [d if isinstance(d, int) else batch if d in batch_names else _DYNAMIC_AXIS for d in spec.shape]
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            tensors.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            tensors.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return tuple(tensors)


def count_parameters(network: nn.Module) -> int:
    """Number of scalar parameters; tied weights count once, buffers do not."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, specs: Sequence[TensorSpec]) -> int:
    """Multiply-accumulates of one sample in convolutions and matrix products, as torch's own counter has them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_network(network, example_inputs(specs, 1))
    return int(counter.get_total_flops()) // 2


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    else:
        yield value
