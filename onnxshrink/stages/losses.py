"""What a network is to learn, as arithmetic on tensors: each term a scalar, the mean over the batch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


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
