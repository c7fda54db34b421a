"""What a network is to learn, as arithmetic on tensors: each term a scalar, the mean over the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""The label of a token that has none."""


def label_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of class numbers, the mean over those that are not `IGNORED`; 0 where all are.

    Args:
        logits: ``(batch, ..., classes)``.
        labels: Class numbers ``(batch, ...)`` int64.
        label_smoothing: Share of a label's mass that is spread over all classes.
    """
    summed = functional.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return summed / (labels != IGNORED).sum().clamp(min=1)


def softened_divergence(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """``T² · KL(softmax(taught / T) || softmax(logits / T))`` over the last axis, the mean over all others.

    Args:
        logits: The student's, ``(batch, ..., classes)``.
        taught: The teacher's, of the same shape.
        temperature: ``T``, above 0; its square keeps the gradient's size as ``T`` grows.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    student = functional.log_softmax(logits / temperature, dim=-1).flatten(0, -2)
    teacher = functional.log_softmax(taught / temperature, dim=-1).flatten(0, -2)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def decoupled_divergences(logits: Tensor, taught: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`softened_divergence` in two: that of the label's class against all others, and that among the others.

    With ``p`` the teacher's softened probability of the label, the whole is the first + ``(1 - p)`` · the second for
    each sample: the teacher's confidence no longer hides what it knows of the other classes.

    Args:
        logits: The student's, ``(batch, ..., classes)`` with two classes or more.
        taught: The teacher's, of the same shape.
        labels: Class numbers ``(batch, ...)`` int64; those that are `IGNORED` do not count.
        temperature: ``T``, above 0.

    Returns:
        The paper's TCKD and NCKD, each times ``T²``; both 0 where all labels are ignored.

    Source: Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation", CVPR 2022, equations 5 to 7.
    """
    counted = labels.flatten() != IGNORED
    if not counted.any():
        return logits.sum() * 0, logits.sum() * 0
    chosen = labels.flatten()[counted, None]
    sides: list[tuple[Tensor, Tensor]] = []
    for values in (logits, taught):
        rows = values.flatten(0, -2)[counted] / temperature
        is_other = torch.ones_like(rows, dtype=torch.bool).scatter(1, chosen, value=False)
        others = rows[is_other].reshape(len(rows), -1)
        # Unnormalized logarithms of the two masses: the softmax over them gives the label's probability and the rest.
        sides.append((torch.cat([rows.gather(1, chosen), others.logsumexp(1, keepdim=True)], dim=1), others))
    (student, student_others), (teacher, teacher_others) = sides
    scale = temperature**2
    return (
        scale * softened_divergence(student, teacher, 1.0),
        scale * softened_divergence(student_others, teacher_others, 1.0),
    )


def aligned(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps ``(batch, channels, height, width)`` averaged down to the smaller height and width of the two.

    Features of other ranks are given back as they are.
    """
    if student.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return functional.adaptive_avg_pool2d(student, size), functional.adaptive_avg_pool2d(teacher, size)


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of where two features are large: their squares summed over channels, each of norm 1.

    Args:
        student: ``(batch, channels, height, width)``, or tokens ``(batch, tokens, channels)``.
        teacher: The same but for the number of channels; maps of another size are `aligned`.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2 with p = 2; the mean
    over positions is that of the authors' code.
    """
    axis = 1 if student.ndim == 4 else -1
    maps = (features.square().sum(axis).flatten(1) for features in aligned(student, teacher))
    ours, theirs = (functional.normalize(values, dim=1) for values in maps)
    return functional.mse_loss(ours, theirs)


def cosine_distance(outputs: Tensor, taught: Tensor) -> Tensor:
    """One minus the cosine between two tensors of one shape, along the last axis; the mean over all others."""
    return 1 - functional.cosine_similarity(outputs, taught, dim=-1).mean()
