"""Two small networks for 8 by 8 images of digits: a teacher, and a student with a hundredth of its weights."""

from __future__ import annotations

from torch import nn


def teacher(width: int = 64) -> nn.Module:
    """A network larger than the task needs: six convolutions, 556,106 parameters."""
    return _network((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 2), (2 * width, 1))


def student(width: int = 64) -> nn.Module:
    """Three wide layers, 75,338 parameters before pruning: integer kernels gain most where a layer has much to do."""
    return _network((width, 1), (width, 1), (width, 2))


def _network(*layers: tuple[int, int]) -> nn.Module:
    """Conv-BatchNorm-ReLU for each (channels, stride), then global average pooling and a linear classifier.

    The input is ``image`` float32 ``(batch, 1, 8, 8)``, the output logits ``(batch, 10)``.
    """
    modules: list[nn.Module] = []
    channels = 1
    for width, stride in layers:
        modules += [
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
