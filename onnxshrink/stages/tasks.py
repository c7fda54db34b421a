"""What a task asks of a network's first output and of the labels, and how near two answers are."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from onnxshrink.config.training import Task
from onnxshrink.core.errors import ModelError
from onnxshrink.data.labels import check_labels, check_token_labels, check_values
from onnxshrink.stages.losses import IGNORED

_FORMS: dict[Task, str] = {
    "classification": "floating logits [batch, classes]",
    "regression": "floating values",
    "embedding": "floating vectors [batch, length]",
    "tokens": "floating logits [batch, tokens, classes]",
}


def require_answer(output: Tensor, task: Task, *, where: str) -> None:
    """Refuse a first output that cannot be the answer to the task.

    Args:
        output: Of some samples.
        task: What it should be.
        where: The network, for the message.

    Raises:
        ModelError: With the tasks that would fit.
    """
    if _is_answer(output, task):
        return
    others = [other for other in get_args(Task) if _is_answer(output, other)]
    raise ModelError(
        f"the network's first output does not fit task: {task}",
        where=where,
        got=form_of(output),
        want=f"{_FORMS[task]} as the first output",
        fix=f"set `task` to {' or '.join(others)}" if others else "return what is to be learned first",
    )


def require_labels(labels: Tensor, answer: Tensor, task: Task, *, where: str) -> None:
    """Refuse labels that cannot be the answers to the task.

    Args:
        labels: Of all samples, samples on axis 0.
        answer: The network's first output on some samples.
        task: What it is.
        where: The data's origin, for the message.

    Raises:
        DataError: The shape, the dtype or a value does not fit.
    """
    numbers, count, classes = labels.numpy(), len(labels), answer.shape[-1]
    if task == "regression":
        check_values(numbers, shape=(count, *answer.shape[1:]), where=where)
    elif task == "tokens":
        shape = (count, answer.shape[1])
        check_token_labels(numbers, shape=shape, n_classes=classes, ignored=IGNORED, where=where)
    else:
        check_labels(numbers, n_samples=count, n_classes=classes, where=where)


def misses(answer: Tensor, wanted: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """How far answers are from what is wanted, sample by sample; lower is better.

    Args:
        answer: The network's first output, samples on axis 0.
        wanted: The teacher's, or labels.
        task: Of classes and tokens the wrong ones count, of embeddings one minus the cosine, of values the squared
            difference.

    Returns:
        A sum for each sample and what to divide it by, ``(batch,)`` both: tokens and values that count, else 1.
    """
    if task == "embedding":
        one = torch.ones(len(answer), device=answer.device)
        return 1 - functional.cosine_similarity(answer, wanted, dim=-1), one
    if task == "regression":
        missed = (answer - wanted.reshape(answer.shape)).double().square()
        counted = torch.ones_like(missed)
    else:
        classes = wanted.argmax(-1) if wanted.is_floating_point() else wanted
        counted = (classes != IGNORED).double()
        missed = (answer.argmax(-1) != classes) * counted
    return missed.reshape(len(answer), -1).sum(1), counted.reshape(len(answer), -1).sum(1)


def figure(missed: float, task: Task) -> float:
    """The mean of `misses` as it is known: share of right classes, mean cosine, or root of the mean square."""
    return round(math.sqrt(missed) if task == "regression" else 1 - missed, 6)


def form_of(tensor: Tensor) -> str:
    """``float32[2,10]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"


def _is_answer(output: Tensor, task: Task) -> bool:
    if not output.is_floating_point() or not output.ndim:
        return False
    match task:
        case "classification":
            return output.ndim == 2 and output.shape[1] > 1
        case "embedding":
            return output.ndim == 2
        case "tokens":
            return output.ndim == 3 and output.shape[2] > 1
        case "regression":
            return True
