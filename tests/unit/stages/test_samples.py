"""What training data promises: labels in memory, the rest read when it is drawn, and chance that can be repeated."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from torch_models import Bench

from onnxshrink.config.data import EntryData, ImageData
from onnxshrink.config.training import EarlyStopping, Training
from onnxshrink.core.errors import DataError
from onnxshrink.core.events import Silent
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.stages.loop import Learner
from onnxshrink.stages.samples import Samples, TrainingBatch, read_samples
from onnxshrink.stages.training import train

X = (TensorSpec("x", "float32", ("batch", 1, 6, 6)),)


def pictures(folder: Path, *steps: dict[str, object], seed: int = 0, count: int = 12) -> Samples:
    """Images of two classes, 8 by 8."""
    rng = np.random.default_rng(3)
    for at in range(count):
        path = folder / "images" / f"{at % 2}" / f"{at:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    data = {"images": folder / "images", "labels": "folders", "steps": [*steps]}
    return read_samples(Bench(folder, ImageData.model_validate(data), seed=seed).context, X, labels="wanted")


class Watched(Learner):
    """Keeps what it was given to learn from."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))
        self.learned: list[tuple[list[int], bytes]] = []
        self.judged: list[bytes] = []

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Cross-entropy."""
        assert batch.labels is not None
        seen = self.learned if self.training else self.judged
        content = batch.inputs[0].numpy().tobytes()
        seen.append((batch.rows.tolist(), content) if self.training else content)  # type: ignore[arg-type]
        return {"labels": functional.cross_entropy(self.network(batch.inputs[0]), batch.labels)}


def test_every_epoch_draws_its_own_form_of_an_image(tmp_path: Path) -> None:
    """What is learned from follows from seed, epoch and number; what is judged on is the form without chance."""
    samples = pictures(tmp_path, {"random_crop": 6}, {"flip": 0.5}, seed=4)
    assert samples.is_random
    assert samples.labels is not None
    assert samples.labels.tolist() == [0] * 6 + [1] * 6
    learner = Watched()
    settings = Training(epochs=2, batch_size=4, early_stopping=EarlyStopping(held_out_ratio=0.3))
    train(learner, samples, settings, Bench(tmp_path, seed=4).context)
    per_epoch = len(learner.learned) // 2
    for at, (rows, content) in enumerate(learner.learned):
        again = samples.take(torch.tensor(rows), epoch=1 + at // per_epoch).inputs[0]
        assert again.numpy().tobytes() == content
    assert learner.judged[: len(learner.judged) // 2] == learner.judged[len(learner.judged) // 2 :]
    plain = pictures(tmp_path, {"crop": 6})
    torch.testing.assert_close(samples.take(torch.arange(12)).inputs[0], plain.take(torch.arange(12)).inputs[0])


class Killer(Silent):
    """Stops the training at its fifth step."""

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:  # noqa: ARG002
        """Raise there."""
        if done == 5:
            raise KeyboardInterrupt


def test_a_killed_training_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    """What the rest of the epochs learn from, and the weights, are those of an unbroken training."""
    samples = pictures(tmp_path, {"random_crop": 6}, {"flip": 0.5})
    settings = Training(epochs=3, batch_size=4, checkpoint_minutes=1e-9)
    context = Bench(tmp_path).context
    torch.manual_seed(0)
    whole, part = Watched(), Watched()
    part.network.load_state_dict(whole.network.state_dict())
    rest = deepcopy(part)
    train(whole, samples, settings, context)
    with pytest.raises(KeyboardInterrupt):
        train(part, samples, settings, replace(context, events=Killer(), scratch=tmp_path / "half"))
    facts = train(rest, samples, settings, replace(context, scratch=tmp_path / "half"))
    assert facts["resumed_from_step"] == len(part.learned) - 1
    assert part.learned[:-1] + rest.learned == whole.learned
    for ours, theirs in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_seed_draws_others(tmp_path: Path) -> None:
    """The same one draws the same again."""
    first, again, other = (
        pictures(tmp_path, {"random_crop": 6}, seed=seed).take(torch.arange(12), epoch=1).inputs[0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_damaged_image_stops_the_training_with_its_name(tmp_path: Path) -> None:
    """It is found when it is drawn."""
    samples = pictures(tmp_path, {"crop": 6})
    (tmp_path / "images" / "1" / "003.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read") as caught:
        train(Watched(), samples, Training(epochs=1), Bench(tmp_path).context)
    assert "003.png" in (caught.value.where or "")


class Noisy(Dataset[tuple[Tensor, int]]):
    """A user's Dataset with torch's chance in every item."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        return torch.full((1, 6, 6), float(at)) + torch.rand(1), at % 2


def test_a_users_dataset_may_be_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainings learn from the same draws, which differ from epoch to epoch; a look gives the same again."""
    module = ModuleType("users_noise")
    module.Noisy = Noisy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_noise", module)
    bench = Bench(tmp_path, EntryData(entry="users_noise:Noisy"))
    samples = read_samples(bench.context, X, labels="needed")
    learned = []
    for _ in range(2):
        torch.rand(1)
        learner = Watched()
        train(learner, samples, Training(epochs=2, batch_size=12), bench.context)
        learned.append(learner.learned)
    assert learned[0] == learned[1]
    assert len({content for _, content in learned[0]}) == 2
    looks = [samples.take(torch.arange(12)).inputs[0] for _ in range(2)]
    assert torch.equal(*looks)
