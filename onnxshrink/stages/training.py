"""The training loop that distillation and fine-tuning share: seeded, and the same weights again for the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from onnxshrink.config.stages import Training
from onnxshrink.core.errors import ModelError, TrainingError
from onnxshrink.core.tensors import LABELS, Array, TensorSpec
from onnxshrink.data.batching import constant_inputs
from onnxshrink.data.labels import check_labels
from onnxshrink.runtime.torch_model import run_network
from onnxshrink.stages.context import Context

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Logits ``(batch, classes)`` and the indices of their samples ``(batch,)`` to a scalar."""

WARM_UP_RATIO = 0.05
"""Share of the steps in which the learning rate rises."""

MAX_GRADIENT_NORM = 1.0
_READ_SAMPLES = 256


@dataclass(frozen=True, slots=True)
class Samples:
    """Training data in memory: every epoch draws it in another order.

    Attributes:
        inputs: One tensor for each input of the network, samples on axis 0.
        labels: Class numbers ``(samples,)`` int64, or None where the data has none.
        where: The origin, for messages.
        constants: Positions of the inputs that hold no samples and are given whole with every batch.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    where: str
    constants: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return next(len(tensor) for at, tensor in enumerate(self.inputs) if at not in self.constants)

    def take(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """The inputs of the samples at the indices ``chosen``."""
        return tuple(tensor if at in self.constants else tensor[chosen] for at, tensor in enumerate(self.inputs))


def read_samples(
    ctx: Context, specs: Sequence[TensorSpec], *, labels: Literal["needed", "wanted", "unused"]
) -> Samples:
    """Read ``data.train`` once.

    Args:
        ctx: The run.
        specs: The network's inputs.
        labels: Data without them is refused, taken as it is, or not asked.

    Raises:
        DataError: The samples do not fit, or have no labels and need them.
        TrainingError: There are fewer than two samples.
    """
    reader = ctx.reader("train", specs, batch_size=_READ_SAMPLES, labels=labels == "needed")
    assert reader is not None  # noqa: S101  # `needs` has train: the config is refused without it
    if labels == "wanted" and reader.has_labels:
        reader = ctx.reader("train", specs, batch_size=_READ_SAMPLES, labels=True)
        assert reader is not None  # noqa: S101
    batches = list(reader)
    whole = constant_inputs(specs, batches[0])
    arrays: dict[str, Array] = {
        name: first if name in whole else np.concatenate([batch[name] for batch in batches])
        for name, first in batches[0].items()
    }
    samples = Samples(
        tuple(torch.from_numpy(arrays[spec.name]) for spec in specs),
        None,
        reader.where,
        frozenset(at for at, spec in enumerate(specs) if spec.name in whole),
    )
    if len(samples) < 2:
        raise TrainingError("one sample is too few to learn from", where=reader.where, want="at least two")
    if LABELS not in arrays:
        return samples
    check_labels(arrays[LABELS], n_samples=len(samples), where=reader.where)
    return replace(samples, labels=torch.from_numpy(arrays[LABELS].astype(np.int64)))


def logits_of(network: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The first output of a network, as the logits of a classification.

    Returns:
        ``(batch, classes)``, floating.

    Raises:
        ModelError: The first output is something else.
    """
    logits = run_network(network, inputs)[0]
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ModelError(
            "the network's first output cannot be the logits of a classification, which training needs",
            where=type(network).__name__,
            got=f"{str(logits.dtype).removeprefix('torch.')}{list(logits.shape)}",
            want="floating logits of shape [batch, classes] as the first output",
            fix="return the logits first; other tasks can be pruned, exported and quantized, and trained elsewhere",
        )
    return logits


@torch.no_grad()
def predict(network: nn.Module, samples: Samples, *, batch_size: int = 256) -> Tensor:
    """Logits of every sample in eval mode, ``(samples, classes)``."""
    network.eval()
    return torch.cat(
        [logits_of(network, samples.take(part)) for part in torch.split(torch.arange(len(samples)), batch_size)]
    )


def train(network: nn.Module, samples: Samples, loss: Loss, settings: Training, ctx: Context) -> list[dict[str, Any]]:
    """Train in place; the network is in eval mode afterwards.

    AdamW with a linear warm-up and a cosine decay, gradients clipped to norm 1. The same seed, data and number of
    threads give the same weights, byte for byte; torch's global random state is left as it was.

    Args:
        network: What to train; frozen parameters stay as they are.
        samples: The training data.
        loss: What to minimize.
        settings: Epochs, learning rate, batch size, weight decay.
        ctx: Seed, step and events.

    Returns:
        For each epoch its number and its mean loss.

    Raises:
        TrainingError: The loss or a gradient is not finite; or every parameter is frozen.
    """
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not weights:
        raise TrainingError("the network has nothing to train: every parameter is frozen", where=ctx.step)
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    order = torch.Generator().manual_seed(ctx.seed)
    total = settings.epochs * len(_split(torch.arange(len(samples)), settings.batch_size))
    epochs: list[dict[str, Any]] = []
    step = 0
    network.train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(ctx.seed)
        for epoch in range(1, settings.epochs + 1):
            summed = 0.0
            for chosen in _split(torch.randperm(len(samples), generator=order), settings.batch_size):
                rate = settings.learning_rate * schedule(step, total)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
                value = loss(logits_of(network, samples.take(chosen)), chosen)
                value.backward()  # type: ignore[no-untyped-call]
                norm = nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
                if not math.isfinite(value.item() + norm.item()):
                    raise _astray(value, norm, f"{ctx.step}, epoch {epoch}, step {step + 1}, learning rate {rate:.3g}")
                optimizer.step()
                summed += value.item() * len(chosen)
                step += 1
                ctx.events.progress(ctx.step, step, total, f"loss {value.item():.3f}")
            epochs.append({"epoch": epoch, "loss": round(summed / len(samples), 6)})
    network.eval()
    return epochs


def schedule(step: int, total: int) -> float:
    """Factor of the peak learning rate at ``step`` of ``total``: linear warm-up, then half a cosine towards zero.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, without restarts.
    """
    warm_up = math.ceil(total * WARM_UP_RATIO)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / (total - warm_up)))


def _split(order: Tensor, batch_size: int) -> list[Tensor]:
    """Batches of at least two samples: BatchNorm has no variance over one, so a lonely last one joins its neighbour."""
    batches: list[Tensor] = list(torch.split(order, max(batch_size, 2)))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _astray(loss: Tensor, norm: Tensor, where: str) -> TrainingError:
    return TrainingError(
        f"training went astray: the loss is {loss.item():.3g} and its gradient has norm {norm.item():.3g}",
        where=where,
        want="finite numbers",
        fix="lower `learning_rate`, and check the scale of the inputs",
    )
