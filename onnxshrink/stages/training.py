"""The training loop that distillation and fine-tuning share: seeded, and the same weights again for the same seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onnxshrink.config.training import Training
from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import ModelError, TrainingError
from onnxshrink.runtime.torch_model import run_network
from onnxshrink.stages.context import Context
from onnxshrink.stages.samples import Samples, TrainingBatch


class Learner(nn.Module):
    """A network and what it is to learn: the parameters of both are trained, and only the network is kept.

    Args:
        network: What to train.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Every term of the loss, weighted, as a scalar; their sum is minimized."""
        raise NotImplementedError


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
        [logits_of(network, samples.take(part).inputs) for part in torch.split(torch.arange(len(samples)), batch_size)]
    )


def train(
    learner: Learner,
    samples: Samples,
    settings: Training,
    ctx: Context,
    *,
    part: str = "training",  # noqa: ARG001
) -> Facts:
    """Train in place; the network is in eval mode afterwards.

    AdamW with a linear warm-up and a cosine decay, gradients clipped to norm 1. The same seed, data and number of
    threads give the same weights, byte for byte; torch's global random state is left as it was.

    Args:
        learner: What to train and what to minimize; frozen parameters stay as they are.
        samples: The training data.
        settings: Epochs, learning rate, batch size, weight decay.
        ctx: Seed, step and events.
        part: Name of this training in its stage: a stage that trains more than once names each.

    Returns:
        ``epochs``: for each its number and its mean loss.

    Raises:
        TrainingError: The loss or a gradient is not finite; or every parameter is frozen.
    """
    weights = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    if not weights:
        raise TrainingError("the network has nothing to train: every parameter is frozen", where=ctx.step)
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    order = torch.Generator().manual_seed(ctx.seed)
    total = settings.epochs * len(_split(torch.arange(len(samples)), settings.batch_size))
    epochs: list[dict[str, Any]] = []
    step = 0
    learner.train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(ctx.seed)
        for epoch in range(1, settings.epochs + 1):
            summed = 0.0
            for chosen in _split(torch.randperm(len(samples), generator=order), settings.batch_size):
                rate = settings.learning_rate * schedule(step, total, settings.warm_up_ratio)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
                value = torch.stack(list(learner(samples.take(chosen)).values())).sum()
                value.backward()  # type: ignore[no-untyped-call]
                norm = nn.utils.clip_grad_norm_(weights, settings.max_gradient_norm or math.inf)
                if not math.isfinite(value.item() + norm.item()):
                    raise _astray(value, norm, f"{ctx.step}, epoch {epoch}, step {step + 1}, learning rate {rate:.3g}")
                optimizer.step()
                summed += value.item() * len(chosen)
                step += 1
                ctx.events.progress(ctx.step, step, total, f"loss {value.item():.3f}")
            epochs.append({"epoch": epoch, "loss": round(summed / len(samples), 6)})
    learner.eval()
    return {"epochs": epochs}


def schedule(step: int, total: int, warm_up_ratio: float) -> float:
    """Factor of the peak learning rate at ``step`` of ``total``: linear warm-up, then half a cosine towards zero.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, without restarts.
    """
    warm_up = math.ceil(total * warm_up_ratio)
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
