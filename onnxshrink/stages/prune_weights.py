"""Weight pruning: single weights become zero. The network stays as large, compresses better, and is no faster on a CPU.

The pruned tensors are named in ``architecture.json``; which of their elements were pruned, their zeros say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from onnxshrink.config.stages import PruneWeights
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.torch_model import count_parameters, load_network, save_network
from onnxshrink.stages.context import Context
from onnxshrink.stages.named_modules import find_modules

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter whose elements may go.

    Attributes:
        name: Dotted, as in `named_parameters`.
        layer: The module that multiplies with it.
        values: The parameter.
    """

    name: str
    layer: nn.Module
    values: nn.Parameter


@torch.no_grad()
def prune_weights(settings: PruneWeights, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Set the weights of least magnitude to zero, in convolutions, linear layers and attention's projections.

    Biases, norms and embeddings stay, and so does a weight that is tied to an embedding. Of equal magnitudes the first
    is kept. What is zero already counts: pruning again goes on to the new target.

    Raises:
        ConfigError: A name in ``ignore`` is no module of the network.
        ModelError: The network has no weight that may go.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015; Mishra et
    al., "Accelerating Sparse Deep Neural Networks", 2021 (N:M).
    """
    network, architecture = load_network(source)
    ignored = find_modules(network, settings.ignore, option="ignore", where=ctx.step)
    weights, declined = _weights(network, ignored)
    if not weights:
        raise ModelError(
            "no weight of the network can be pruned",
            where=architecture.factory,
            got="; ".join(declined) or f"no convolution and no linear layer{' outside `ignore`' if ignored else ''}",
            want="a convolution or a linear layer that is not in `ignore`",
            fix="take names out of `ignore`, or leave this stage out",
        )
    for weight, kept in zip(weights, _masks(weights, settings), strict=True):
        weight.values.masked_fill_(~kept, 0.0)
    sparse = tuple(sorted({*architecture.sparse, *(weight.name for weight in weights)}))
    save_network(network, replace(architecture, sparse=sparse), out)
    return _facts(network, weights) | ({"declined": declined} if declined else {})


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """True for the ``count`` largest elements; of equal ones for the first.

    Args:
        magnitudes: ``(n,)``, floating.
        count: From 0 to ``n``.

    Returns:
        ``(n,)`` bool.
    """
    kept = torch.zeros(len(magnitudes), dtype=torch.bool)
    kept[magnitudes.sort(descending=True, stable=True).indices[:count]] = True
    return kept


def largest_of_groups(magnitudes: Tensor, count: int, size: int) -> Tensor:
    """True for the ``count`` largest elements of every ``size`` in a row; of equal ones for the first.

    A last group that is shorter is treated as if zeros filled it, as hardware does: ``count`` of it stay, or all.

    Args:
        magnitudes: ``(rows, n)``, floating; groups do not reach from one row into the next.
        count: Elements to keep of a group.
        size: Elements of a group.

    Returns:
        ``(rows, n)`` bool.
    """
    rows, n = magnitudes.shape
    groups = functional.pad(magnitudes, (0, -n % size), value=-1.0).reshape(rows, -1, size)
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, order[..., :count], value=True)
    return kept.reshape(rows, -1)[:, :n]


def by_output(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A weight with a row for each output channel, ``(outputs, inputs * kernel)``: what one output sums over."""
    if isinstance(layer, _ConvTransposeNd):
        grouped = tensor.reshape(layer.groups, -1, *tensor.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)
    return tensor.flatten(1)


def _from_rows(layer: nn.Module, rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `by_output`."""
    if isinstance(layer, _ConvTransposeNd):
        inputs, outputs, *kernel = shape
        grouped = rows.reshape(layer.groups, outputs, inputs // layer.groups, *kernel)
        return grouped.transpose(1, 2).reshape(shape)
    return rows.reshape(shape)


def _masks(weights: list[Weight], settings: PruneWeights) -> list[Tensor]:
    """For each weight, True where an element stays."""
    magnitudes = [weight.values.abs() for weight in weights]
    if settings.pattern is not None:
        count, size = settings.group
        return [
            _from_rows(
                weight.layer, largest_of_groups(by_output(weight.layer, values), count, size), weight.values.shape
            )
            for weight, values in zip(weights, magnitudes, strict=True)
        ]
    flat = [values.flatten() for values in magnitudes]
    together = [torch.cat(flat)] if settings.scope == "global" else flat
    sparsity = settings.sparsity or 0.0
    kept = torch.cat([largest(values, len(values) - round(sparsity * len(values))) for values in together])
    parts = torch.split(kept, [len(values) for values in flat])
    return [part.reshape(values.shape) for part, values in zip(parts, magnitudes, strict=True)]


def _weights(network: nn.Module, ignored: list[nn.Module]) -> tuple[list[Weight], list[str]]:
    """What may be pruned, each parameter once; and what a user would expect there and is left, with the reason."""
    left = {parameter for module in ignored for parameter in module.parameters()}
    embeddings = {m.weight for m in network.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    layers = {
        (f"{path}.{name}" if path else name): (module, parameter)
        for path, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in _names(module) and parameter not in left
    }
    declined = [f"{name}: it is an embedding as well" for name, (_, values) in layers.items() if values in embeddings]
    own = dict(network.named_parameters())
    found = [Weight(name, *layer) for name, layer in layers.items() if name in own and layer[1] not in embeddings]
    return found, declined


def _names(module: nn.Module) -> tuple[str, ...]:
    """Of a module's own parameters, those that multiply its inputs."""
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION_WEIGHTS
    return ("weight",) if isinstance(module, (_ConvNd, nn.Linear)) else ()


def _facts(network: nn.Module, weights: list[Weight]) -> Facts:
    """How many are left, in all and by layer."""
    nonzero = {weight.name: int(weight.values.count_nonzero()) for weight in weights}
    total = sum(weight.values.numel() for weight in weights)
    facts: Facts = {
        "weights": total,
        "nonzero_weights": sum(nonzero.values()),
        "sparsity": round(1 - sum(nonzero.values()) / total, 6),
        "sparsity_by_layer": {w.name: round(1 - nonzero[w.name] / w.values.numel(), 6) for w in weights},
        "parameters": count_parameters(network),
        "nonzero_parameters": sum(int(parameter.count_nonzero()) for parameter in network.parameters()),
    }
    if empty := [name for name, count in nonzero.items() if not count]:
        facts["warnings"] = [f"every weight of {', '.join(empty)} is zero: lower `sparsity`, or use `ignore`"]
    return facts
