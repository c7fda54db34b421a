"""What makes a channel worth keeping, as Torch-Pruning scores it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from onnxshrink.config.stages import PruneChannels
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.labels import check_labels
from onnxshrink.runtime.torch_model import run_network, traceable
from onnxshrink.stages.context import Context
from onnxshrink.stages.losses import IGNORED
from onnxshrink.stages.samples import read_samples

Importance: TypeAlias = Callable[[tp.Group], Tensor | None]
"""A group of layers that share channels to ``(channels,)`` scores, or None where it holds nothing to judge by."""

_MAX_SAMPLES = 1024
_BATCH_SIZE = 64


def importance_of(settings: PruneChannels) -> Importance:
    """The scores that ``settings`` ask for. Each is scaled to mean one within its group, but for `lamp` and `random`.

    Source: `magnitude`: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017. `group_norm`: Fang et al.,
    "DepGraph", CVPR 2023. `lamp`: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021.
    `taylor`: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.
    """
    scores: dict[str, Callable[[], Importance]] = {
        "group_norm": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "magnitude_l1": lambda: tp.importance.GroupMagnitudeImportance(p=1, group_reduction="first"),
        "magnitude_l2": lambda: tp.importance.GroupMagnitudeImportance(p=2, group_reduction="first"),
        "lamp": lambda: tp.importance.LAMPImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "random": tp.importance.RandomImportance,
    }
    return scores[settings.importance]()


def take_gradients(network: nn.Module, specs: Sequence[TensorSpec], ctx: Context) -> int:
    """Leave in every parameter the gradient of a loss, summed over up to 1024 samples of ``data.train``.

    Of more samples the seed draws as many: folders of images come one class after the other. The loss is the
    cross-entropy for integer labels and the squared error for others. Without labels it is half the square of the
    outputs: how much of them goes with a channel. (Against the network's own outputs every loss is at its minimum, and
    its gradient zero.)

    Returns:
        Number of samples.

    Raises:
        DataError: The samples or their labels do not fit.
    """
    samples = read_samples(ctx, specs, labels="wanted")
    drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(ctx.seed))[:_MAX_SAMPLES]
    network.zero_grad()
    with traceable(network):
        for rows in torch.split(drawn.sort().values, _BATCH_SIZE):
            batch = samples.take(rows)
            output = run_network(network, batch.inputs)[0]
            _loss(output, batch.labels, where=samples.where).backward()  # type: ignore[no-untyped-call]
    return len(drawn)


def _loss(output: Tensor, labels: Tensor | None, *, where: str) -> Tensor:
    """The sum over the samples of a batch."""
    if labels is None:
        return 0.5 * output.square().sum()
    if not labels.is_floating_point() and output.ndim >= 2 and output.shape[-1] > 1:
        logits, classes = output.flatten(0, -2), labels.flatten()
        if len(classes) == len(logits):
            logits, classes = logits[classes != IGNORED], classes[classes != IGNORED]
        check_labels(classes.numpy(), n_samples=len(logits), n_classes=logits.shape[1], where=where)
        return functional.cross_entropy(logits, classes.long(), reduction="sum")
    if labels.numel() != output.numel():
        raise DataError(
            "the labels do not fit the network's first output",
            where=where,
            got=f"labels {list(labels.shape)}",
            want=f"{list(output.shape)}",
        )
    return functional.mse_loss(output, labels.reshape(output.shape).to(output.dtype), reduction="sum")
