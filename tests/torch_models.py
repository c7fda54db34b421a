"""Small torch networks and contexts for the tests of the torch stages; factories are entered as `torch_models:name`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from onnxshrink.config.data import DataRoles, NpzData
from onnxshrink.config.source import FactorySource, InputSettings, ModelSource
from onnxshrink.config.stages import AnyStage
from onnxshrink.core.artifact import Artifact, Facts, Kind
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.store import Store
from onnxshrink.core.tensors import Array
from onnxshrink.stages import Context, work_of
from onnxshrink.stages.source import open_source


def convolutions(width: int = 8, classes: int = 3) -> nn.Module:
    """Two convolutions with BatchNorm, and a classifier; takes (batch, 1, 6, 6)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def frozen_stem() -> nn.Module:
    """`convolutions` whose first layer is not to be trained."""
    network = convolutions()
    network.get_submodule("0").requires_grad_(requires_grad=False)
    return network


class Residual(nn.Module):
    """Two outputs, an addition, a concatenation and a grouped convolution: what pruning must follow."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.left = nn.Conv2d(width, width, 3, padding=1)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.features = nn.Conv2d(2 * width, width, 1)
        self.head = nn.Linear(width * 36, 3)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the features they come from."""
        stem = torch.relu(self.stem(image))
        both = torch.cat([stem + self.left(stem), torch.relu(self.grouped(stem))], dim=1)
        features = torch.relu(self.features(both))
        return self.head(features.flatten(1)), features


class Tied(nn.Module):
    """Two linear layers with one weight, and a buffer that shares its memory with another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("same", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4) to (batch, 4)."""
        return self.second(self.first(x)) * self.scale


class Grouped(nn.Module):
    """Normalizes within numbered slices of its channels, which no one can prune without being told."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 6, 6) to (batch, 3)."""
        y = self.conv(x)
        return self.head(y.reshape(len(y), 2, 4, -1).mean(-1).reshape(len(y), 8))


def linear(classes: int = 3, *, frozen: bool = False) -> nn.Module:
    """One linear layer on (batch, 4)."""
    return nn.Linear(4, classes).requires_grad_(not frozen)


def no_module() -> int:
    """A factory's mistake."""
    return 3


def failing() -> nn.Module:
    """A factory that raises."""
    message = "no such size"
    raise ValueError(message)


def source(factory: str, shape: tuple[int | str, ...] = ("batch", 1, 6, 6), **settings: object) -> FactorySource:
    """A source with one float32 input ``image``."""
    inputs = {"image": InputSettings(shape=shape)}
    return FactorySource.model_validate({"factory": f"torch_models:{factory}", "inputs": inputs, **settings})


def digits_like(path: Path, *, labels: bool = True, count: int = 48, shape: tuple[int, ...] = (1, 6, 6)) -> NpzData:
    """An archive of three classes that differ in brightness; the samples are seeded."""
    rng = np.random.default_rng(3)
    target = np.arange(count) % 3
    image = rng.normal(target.reshape(-1, *[1] * len(shape)), 0.3, (count, *shape)).astype(np.float32)
    arrays: Mapping[str, Array] = {"image": image} | ({"labels": target} if labels else {})
    np.savez(path, **arrays)
    return NpzData(npz=path)


class Bench:
    """Runs sources and stages one by one on a store, as the pipeline does, and keeps the facts of the last."""

    def __init__(
        self, root: Path, train: NpzData | None = None, *, seed: int = 0, events: Events | None = None
    ) -> None:
        self._store = Store(root / "store")
        self._count = 0
        self.facts: Facts = {}
        self.ran: list[str] = []
        self.context = Context(
            step="step",
            data=DataRoles(train=train),
            seed=seed,
            events=events or Silent(),
            open=self.open,
            derive=self.run,
        )

    def open(self, settings: ModelSource) -> Artifact:
        """The artifact of a source."""
        return self._make("source", settings.gives, lambda out: open_source(settings, out, seed=self.context.seed))

    def run(self, stage: AnyStage, artifact: Artifact) -> Artifact:
        """The artifact that a stage makes of another."""
        return self._make(stage.kind, stage.gives, lambda out: work_of(stage)(artifact, out, self.context))

    def _make(self, what: str, kind: Kind, work: Callable[[Path], Facts]) -> Artifact:
        self._count += 1
        entry = self._store.make(f"{self._count}", kind, work, lambda: 0.0)  # type: ignore[arg-type]
        self.facts = entry.facts
        self.ran.append(what)
        return entry.artifact
