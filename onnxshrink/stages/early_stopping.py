"""Which epoch was best, on samples that nothing is learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onnxshrink.config.training import EarlyStopping
from onnxshrink.core.errors import TrainingError

FIGURE = "held_out"
"""What an epoch's figure is called in its record; lower is better."""

MAX_CURVE = 200
"""Epochs that a training's facts keep."""


def hold_out(count: int, settings: EarlyStopping | None, *, seed: int, where: str) -> tuple[Tensor, Tensor]:
    """Draw the samples to judge on.

    Args:
        count: How many samples there are.
        settings: The share to hold out; None holds out none.
        seed: Another one draws others.
        where: The samples' origin, for messages.

    Returns:
        The numbers of the samples to learn from and of those to judge on, both rising, int64.

    Raises:
        TrainingError: Too few samples are left to learn from.
    """
    if settings is None:
        return torch.arange(count), torch.arange(0)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    n_held = max(1, round(count * settings.held_out_ratio))
    if count - n_held < 2:
        raise TrainingError(
            "early stopping leaves too few samples to learn from",
            where=where,
            got=f"{count} samples, of which {n_held} are held out",
            want="at least two to learn from",
            fix="lower `early_stopping.held_out_ratio`, or leave `early_stopping` out",
        )
    return order[n_held:].sort().values, order[:n_held].sort().values


def best_epoch(epochs: Sequence[Mapping[str, Any]]) -> int:
    """Number of the epoch with the lowest figure, the first of equals; 0 before the first."""
    return int(min(epochs, key=lambda entry: entry[FIGURE])["epoch"]) if epochs else 0


def thinned(epochs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most `MAX_CURVE` of the epochs, evenly, the first and the last among them: enough to draw the curve."""
    if len(epochs) <= MAX_CURVE:
        return list(epochs)
    return [epochs[place * (len(epochs) - 1) // (MAX_CURVE - 1)] for place in range(MAX_CURVE)]


def is_over(epochs: Sequence[Mapping[str, Any]], settings: EarlyStopping | None) -> bool:
    """True if no epoch within the patience was better than the best before."""
    return settings is not None and len(epochs) - best_epoch(epochs) >= settings.patience


@torch.no_grad()
def sum_of(judge: Callable[[Tensor], Tensor], rows: Tensor, batch_size: int) -> float:
    """The sum of ``judge`` over ``rows``, which it is given batch by batch."""
    return sum(float(judge(part).double().sum()) for part in torch.split(rows, batch_size) if len(part))
