"""Small torch networks and contexts for the tests of the torch stages; factories are entered as `torch_models:name`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from onnxshrink.config.data import Data, DataRoles, NpzData
from onnxshrink.config.source import FactorySource, InputSettings, ModelSource
from onnxshrink.config.stages import AnyStage
from onnxshrink.core.artifact import Artifact, Facts, Kind
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.store import Store
from onnxshrink.core.tensors import Array
from onnxshrink.data.indexed import HeldSamples
from onnxshrink.stages import Context, work_of
from onnxshrink.stages.samples import Samples
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


class Shortcut(nn.Module):
    """A residual block whose shortcut widens by zeros (option A): its channels stand beside others after the block."""

    def __init__(self, width: int = 8, *, measured: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.first = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(2 * width)
        self.second = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, 3)
        self.padding = width // 2
        self.measured = measured

    def forward(self, image: Tensor) -> Tensor:
        """Logits; `measured` pads by what is missing, so that no wrong number of channels is ever noticed."""
        x = torch.relu(self.stem(image))
        y = self.second(torch.relu(self.norm(self.first(x))))
        missing = y.shape[1] - x.shape[1]
        before, after = (missing // 2, missing - missing // 2) if self.measured else (self.padding, self.padding)
        x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, after))
        return self.head(torch.relu(x + y).mean((2, 3)))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expanded, depthwise, projected, added."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        wide = 4 * width
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.expand = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 1, 6, 6) to (batch, 3)."""
        x = self.stem(image)
        return self.head((x + self.project(self.depthwise(self.expand(x)))).mean((2, 3)))


class GroupedConvolutions(nn.Module):
    """A grouped and a depthwise convolution, concatenated with what went before, and a reshape before linear layers.

    `flat` reshapes the concatenation itself: Torch-Pruning mistakes its channels.
    """

    def __init__(self, width: int = 8, *, flat: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.grouped = nn.Conv2d(width, 2 * width, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.mix = nn.Identity() if flat else nn.Conv2d(3 * width, 3 * width, 1)
        self.hidden = nn.Linear(3 * width * 9, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 1, 6, 6) to (batch, 3)."""
        x = torch.relu(self.stem(image))
        y = torch.relu(self.depthwise(torch.relu(self.grouped(x))))
        both = functional.max_pool2d(self.mix(torch.cat([y, x], dim=1)), 2)
        return self.head(torch.relu(self.hidden(both.reshape(both.shape[0], -1))))


class Shuffle(nn.Module):
    """Channels that are interleaved by a reshape, which no dependency graph sees (ShuffleNet).

    `spare` turns their order round whatever their number, so that nothing breaks when one is missing.
    """

    def __init__(self, width: int = 8, *, spare: bool = False) -> None:
        super().__init__()
        self.spare = spare
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.other = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 1, 6, 6) to (batch, 3)."""
        x = torch.relu(self.other(torch.relu(self.stem(image))))
        x = x.flip(1) if self.spare else x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class TiedLanguage(nn.Module):
    """An embedding that is also the output layer, with a hidden layer between; takes (batch, 5) token numbers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each token."""
        x = self.embedding(tokens)
        return self.head(x + self.down(torch.relu(self.up(x))))


class Attention(nn.Module):
    """Self-attention in the user's own words: queries, keys and values apart, or from one layer."""

    def __init__(self, width: int, heads: int, *, fused: bool = False) -> None:
        super().__init__()
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.num_heads = heads
        self.head_dim = width // heads
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        batch, tokens = x.shape[:2]
        parts = self.qkv(x).chunk(3, dim=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2) for part in parts)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class Transformer(nn.Module):
    """One pre-norm transformer block on the rows of an image; `kind` is whose attention."""

    def __init__(self, kind: str = "own", width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.before = nn.LayerNorm(width)
        self.attention: nn.Module
        if kind == "torch":
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        else:
            self.attention = Attention(width, heads, fused=kind == "fused")
        self.between = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.after = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)
        self.torch_attention = kind == "torch"

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 1, 6, 6) to (batch, 3)."""
        x = self.embed(image.squeeze(1))
        y = self.before(x)
        x = x + (self.attention(y, y, y, need_weights=False)[0] if self.torch_attention else self.attention(y))
        x = x + self.down(functional.gelu(self.up(self.between(x))))
        return self.head(self.after(x).mean(1))


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, projected where width or size change."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width_in, height, width) to (batch, width, height / stride, width / stride)."""
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def resnet(width: int = 32, blocks: int = 3, classes: int = 10) -> nn.Module:
    """A residual network in the manner of ResNet-20 for CIFAR; takes (batch, 3, 32, 32)."""
    stages: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stage in range(3):
        wide = width * 2**stage
        for block in range(blocks):
            given = wide // 2 if stage and not block else wide
            stages.append(ResidualBlock(given, wide, 2 if stage and not block else 1))
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


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


def held_samples(values: Tensor, labels: Tensor | None = None) -> Samples:
    """Samples of one input ``image`` in memory."""
    return Samples(HeldSamples("here", {"image": values.numpy()}), ("image",), labels)


class Bench:
    """Runs sources and stages one by one on a store, as the pipeline does, and keeps the facts of the last."""

    def __init__(self, root: Path, train: Data | None = None, *, seed: int = 0, events: Events | None = None) -> None:
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
