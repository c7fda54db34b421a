"""How weights are moved: the optimizer, its learning rate, and the moving average of what it leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onnxshrink.config.training import Training


def make_optimizer(weights: Sequence[nn.Parameter], settings: Training) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum.

    Weight decay is for matrices and kernels: it would pull biases and the scales of norms, which have one axis or none,
    away from where they do their work, and they are too few to overfit.

    Args:
        weights: What is trained, each once.
        settings: Optimizer, peak learning rate, momentum and weight decay.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019; Sutskever et al., "On the
    importance of initialization and momentum in deep learning", ICML 2013; He et al., "Bag of Tricks for Image
    Classification with Convolutional Neural Networks", CVPR 2019, section 3.1 (no decay of biases and norms).
    """
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    nesterov = settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=nesterov)


def schedule(step: int, total: int, warm_up_ratio: float) -> float:
    """Factor of the peak learning rate at ``step`` of ``total``: linear warm-up, then half a cosine towards zero.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, without restarts.
    """
    warm_up = math.ceil(total * warm_up_ratio)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / (total - warm_up)))


class Average:
    """The exponential moving average of weights.

    After step ``t`` (from 1) the average moves by ``1 - min(decay, (1 + t) / (10 + t))`` of its distance to the
    weights: a fixed decay would hold the first weights for ``1 / (1 - decay)`` steps, longer than a short training.

    Args:
        weights: What is averaged; the average starts at them.
        decay: Towards 1 is slower.

    Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; the ramp is that of
    ``num_updates`` in TensorFlow's ``tf.train.ExponentialMovingAverage``.
    """

    def __init__(self, weights: Sequence[nn.Parameter], decay: float) -> None:
        self._weights = tuple(weights)
        self._decay = decay
        self.tensors = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights as they are after ``step``, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for average, weight in zip(self.tensors, self._weights, strict=True):
            average.lerp_(weight, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the average into the network and keep the network's weights in its place; twice is not at all."""
        for average, weight in zip(self.tensors, self._weights, strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Go on from ``tensors``, as they stood in `tensors`."""
        for average, tensor in zip(self.tensors, tensors, strict=True):
            average.copy_(tensor)
