import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_models
from torch import Tensor, nn
from torch.nn import functional
from torch_models import Bench, digits_like, held_samples

from onnxshrink.config.data import NpzData
from onnxshrink.config.training import Training
from onnxshrink.core.errors import DataError, TrainingError
from onnxshrink.core.events import Silent
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.stages.optimizer import schedule
from onnxshrink.stages.samples import Samples, TrainingBatch, read_samples
from onnxshrink.stages.training import Learner, train

IMAGE = (TensorSpec("image", "float32", ("batch", 1, 6, 6)),)


class Recorder(Silent):
    """Keeps the progress."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, str]] = []

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:
        """Append."""
        self.seen.append((done, total, f"{step}: {detail}"))


def samples_of(count: int, *, classes: int = 3) -> Samples:
    """Seeded samples for `torch_models.linear`."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % classes
    return held_samples(torch.randn(count, 4, generator=generator) + labels[:, None], labels)


class Classifier(Learner):
    """Learns the labels, and keeps the sizes of its batches."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.sizes: list[int] = []

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Cross-entropy."""
        assert batch.labels is not None
        self.sizes.append(len(batch))
        return {"labels": functional.cross_entropy(self.network(*batch.inputs), batch.labels)}


class Astray(Learner):
    """Gives these losses one after the other."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__(torch_models.linear())
        self.losses = iter(losses)

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The next one."""
        return {"bad": self.network(*batch.inputs).sum() * next(self.losses)}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    """Training depends on network, data, settings and seed alone; the caller's random state is not touched."""
    weights = []
    samples = samples_of(50)
    for seed, callers in ((0, 1), (0, 2), (1, 1)):
        network = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        with torch.no_grad():
            for index, parameter in enumerate(network.parameters()):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) * (index + 1))
        torch.manual_seed(callers)
        state = torch.get_rng_state()
        train(
            Classifier(network),
            samples,
            Training(epochs=3, batch_size=8),
            Bench(tmp_path, seed=seed).context,
        )
        assert torch.equal(state, torch.get_rng_state())
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]).numpy().tobytes())
    assert weights[0] == weights[1] != weights[2]


def test_training_learns(tmp_path: Path) -> None:
    """The loss falls from epoch to epoch, the facts tell it, and the network ends in eval mode."""
    torch.manual_seed(0)
    samples, network = samples_of(96), torch_models.linear()
    settings = Training(epochs=6, batch_size=8, learning_rate=0.1)
    epochs = train(Classifier(network), samples, settings, Bench(tmp_path).context)["epochs"]
    assert [entry["epoch"] for entry in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1]["loss"] < 0.6 * epochs[0]["loss"]
    assert not network.training


def test_progress_is_told_step_by_step(tmp_path: Path) -> None:
    """Every step counts towards the announced total, with its loss."""
    recorder, samples = Recorder(), samples_of(20)
    context = Bench(tmp_path, events=recorder).context
    train(Classifier(torch_models.linear()), samples, Training(epochs=2, batch_size=8), context)
    assert [done for done, _, _ in recorder.seen] == [1, 2, 3, 4, 5, 6]
    assert {total for _, total, _ in recorder.seen} == {6}
    assert recorder.seen[0][2].startswith("step: loss ")


@pytest.mark.parametrize(("count", "batch", "expected"), [(9, 4, [4, 5]), (8, 4, [4, 4]), (3, 1, [3]), (2, 8, [2])])
def test_no_batch_has_one_sample(tmp_path: Path, count: int, batch: int, expected: list[int]) -> None:
    """BatchNorm cannot learn from one sample: a lonely last one joins its neighbour, and none is lost."""
    samples = samples_of(count)
    learner = Classifier(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    train(learner, samples, Training(epochs=1, batch_size=batch), Bench(tmp_path).context)
    assert learner.sizes == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_says_where(tmp_path: Path, bad: float) -> None:
    """Epoch, step and learning rate are in the message, with what to change."""
    samples = samples_of(16)
    with pytest.raises(TrainingError, match="went astray") as caught:
        train(
            Astray([1.0, 1.0, 1.0, bad]),
            samples,
            Training(epochs=2, batch_size=8, learning_rate=0.5),
            Bench(tmp_path).context,
        )
    assert str(caught.value.where).startswith("step, epoch 2, step 4, learning rate ")
    assert "learning_rate" in str(caught.value.fix)


def test_a_frozen_network_is_refused(tmp_path: Path) -> None:
    """Nothing to train is a mistake, not a long wait for nothing."""
    samples = samples_of(8)
    with pytest.raises(TrainingError, match="every parameter is frozen"):
        train(Classifier(torch_models.linear(frozen=True)), samples, Training(), Bench(tmp_path).context)


def test_the_schedule_rises_then_follows_a_cosine() -> None:
    """Against numpy: 5 of 100 steps up to the peak, then half a cosine down to almost nothing."""
    factors = [schedule(step, 100, 0.05) for step in range(100)]
    cosine = (1 + np.cos(np.linspace(0, np.pi, 96)[:-1])) / 2
    np.testing.assert_allclose(factors, [0.2, 0.4, 0.6, 0.8, 1.0, *cosine], atol=1e-12)
    assert [schedule(0, 1, 0.05), schedule(0, 2, 0.05)] == [1.0, 1.0]


def test_samples_are_read_in_order_and_whole(tmp_path: Path) -> None:
    """Every sample with its label, whatever the reader's batches; labels are optional unless needed."""
    context = Bench(tmp_path, digits_like(tmp_path / "d.npz", count=300)).context
    file = np.load(tmp_path / "d.npz")
    samples = read_samples(context, IMAGE, labels="needed")
    np.testing.assert_array_equal(samples.take(torch.arange(300)).inputs[0].numpy(), file["image"])
    assert samples.labels is not None
    assert samples.labels.dtype == torch.int64
    np.testing.assert_array_equal(samples.labels.numpy(), file["labels"])
    assert read_samples(context, IMAGE, labels="unused").labels is None
    bare = Bench(tmp_path, digits_like(tmp_path / "bare.npz", labels=False)).context
    assert read_samples(bare, IMAGE, labels="wanted").labels is None
    with pytest.raises(DataError, match="labels"):
        read_samples(bare, IMAGE, labels="needed")


def test_an_input_without_samples_is_given_whole(tmp_path: Path) -> None:
    """A table beside the samples stays one table, however many samples there are."""
    np.savez(tmp_path / "t.npz", x=np.ones((600, 2), np.float32), table=np.ones((5, 2), np.float32), labels=[0] * 600)
    specs = (TensorSpec("table", "float32", (5, 2)), TensorSpec("x", "float32", ("batch", 2)))
    samples = read_samples(Bench(tmp_path, NpzData(npz=tmp_path / "t.npz")).context, specs, labels="needed")
    table, x = samples.take(torch.tensor([3, 4, 599])).inputs
    assert (table.shape, x.shape, len(samples)) == ((5, 2), (3, 2), 600)


def test_one_sample_is_too_few(tmp_path: Path) -> None:
    """Said before the training."""
    with pytest.raises(TrainingError, match="one sample is too few"):
        read_samples(Bench(tmp_path, digits_like(tmp_path / "d.npz", count=1)).context, IMAGE, labels="needed")
