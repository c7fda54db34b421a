"""What the options of a training do, and that a killed one ends as an unbroken one does."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_models import Bench, held_samples

from onnxshrink.config.training import EarlyStopping, Training
from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import ConfigError, TrainingError
from onnxshrink.core.events import Silent
from onnxshrink.stages.context import Context
from onnxshrink.stages.early_stopping import MAX_CURVE, best_epoch, hold_out, is_over, thinned
from onnxshrink.stages.loop import Learner
from onnxshrink.stages.optimizer import schedule
from onnxshrink.stages.samples import Samples, TrainingBatch
from onnxshrink.stages.training import train

ALL = Training(
    epochs=4,
    batch_size=8,
    learning_rate=0.01,
    ema_decay=0.9,
    early_stopping=EarlyStopping(patience=9, held_out_ratio=0.25),
    checkpoint_minutes=1e-9,
)


class Killed(BaseException):
    """What kill -9 would do."""


class Killer(Silent):
    """Stops the run when a step is announced, and keeps the warnings."""

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.warnings: list[str] = []

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:  # noqa: ARG002
        """Raise at the step."""
        if done == self.at:
            raise Killed

    def warned(self, text: str) -> None:
        """Append."""
        self.warnings.append(text)


class Classifier(Learner):
    """Learns the labels; beside the network stands an adapter that is trained and thrown away."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.adapter = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Cross-entropy of the logits and of what the adapter makes of them."""
        assert batch.labels is not None
        if self.training:
            self.seen += len(batch)
        logits = self.network(*batch.inputs)
        return {
            "labels": functional.cross_entropy(logits, batch.labels),
            "adapter": 0.1 * functional.cross_entropy(self.adapter(logits), batch.labels),
        }


class Fading(Classifier):
    """Its second epoch is judged best, whatever was learned."""

    def judge(self, batch: TrainingBatch) -> Tensor:
        """How far the training is from the end of its second epoch."""
        return (self.seen - 2 * 30).abs().expand(len(batch))


def samples_of(count: int = 40) -> Samples:
    labels = torch.arange(count) % 3
    values = torch.randn(count, 4, generator=torch.Generator().manual_seed(1)) + labels[:, None]
    return held_samples(values, labels)


def learner_of(kind: type[Classifier] = Classifier, *, dropout: float = 0.3) -> Classifier:
    torch.manual_seed(5)
    return kind(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 3)))


def bytes_of(learner: Learner) -> bytes:
    """Of all that is trained or counted."""
    tensors = (*learner.parameters(), *learner.buffers())
    return b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)


def trained(
    settings: Training, ctx: Context, learner: Learner | None = None, *, part: str = "training"
) -> tuple[bytes, Facts]:
    learner = learner or learner_of()
    facts = train(learner, samples_of(), settings, ctx, part=part)
    return bytes_of(learner), facts


def told(facts: Facts) -> Facts:
    """Without what depends on the machine."""
    return {name: value for name, value in facts.items() if name not in {"peak_memory_bytes", "resumed_from_step"}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Facts]:
    """The result of a run that nobody disturbs."""
    return trained(ALL, Bench(tmp_path_factory.mktemp("unbroken")).context)


def test_a_checkpoint_changes_nothing(tmp_path: Path, unbroken: tuple[bytes, Facts]) -> None:
    """A run that writes checkpoints and one that does not give the same weights and facts."""
    weights, facts = trained(ALL, replace(Bench(tmp_path).context, scratch=tmp_path / "s"))
    assert (weights, told(facts)) == (unbroken[0], told(unbroken[1]))
    assert "resumed_from_step" not in facts


@pytest.mark.parametrize("step", [1, 2, 4, 5, 11, 16])
def test_a_run_killed_at_any_step_ends_as_an_unbroken_one(
    tmp_path: Path, unbroken: tuple[bytes, Facts], step: int
) -> None:
    """Same bytes in network, adapter and buffers with dropout, BatchNorm, AdamW, EMA and best weights; same facts."""
    scratch = tmp_path / "s"
    with pytest.raises(Killed):
        trained(ALL, replace(Bench(tmp_path, events=Killer(step)).context, scratch=scratch))
    weights, facts = trained(ALL, replace(Bench(tmp_path).context, scratch=scratch))
    assert weights == unbroken[0]
    assert facts.get("resumed_from_step", 0) == step - 1
    assert told(facts) == told(unbroken[1])


def test_a_finished_training_is_not_done_again(tmp_path: Path, unbroken: tuple[bytes, Facts]) -> None:
    """A stage killed after its training takes the weights it had."""
    scratch = tmp_path / "s"
    trained(ALL, replace(Bench(tmp_path).context, scratch=scratch))
    weights, facts = trained(ALL, replace(Bench(tmp_path, events=Killer(1)).context, scratch=scratch))
    assert (weights, facts["resumed_from_step"]) == (unbroken[0], 16)
    assert told(facts) == told(unbroken[1])
    assert len(list(scratch.iterdir())) == 1


def test_trainings_of_one_stage_do_not_meet(tmp_path: Path) -> None:
    """Each part has checkpoints of its own; the same name for another start is another training, and told."""
    events = Killer()
    context = replace(Bench(tmp_path, events=events).context, scratch=tmp_path / "s")
    learner = learner_of()
    first, _ = trained(ALL, context, learner, part="round 1")
    second, facts = trained(ALL, context, learner, part="round 2")
    assert second != first
    assert "resumed_from_step" not in facts
    assert len(list((tmp_path / "s").iterdir())) == 2
    assert events.warnings == []
    third, facts = trained(ALL, context, learner, part="round 1")
    assert third not in {first, second}
    assert "resumed_from_step" not in facts
    assert "another training" in events.warnings[0]


@pytest.mark.parametrize("settings", [{"epochs": 5}, {"learning_rate": 0.02}, {"batch_size": 10}])
def test_a_checkpoint_of_other_settings_is_ignored(tmp_path: Path, settings: dict[str, Any]) -> None:
    """With a warning, and the result is that of a fresh run."""
    other, events = ALL.model_copy(update=settings), Killer()
    expected, _ = trained(other, Bench(tmp_path).context)
    trained(ALL, replace(Bench(tmp_path).context, scratch=tmp_path / "s"))
    weights, facts = trained(other, replace(Bench(tmp_path, events=events).context, scratch=tmp_path / "s"))
    assert weights == expected
    assert "resumed_from_step" not in facts
    assert "another training" in events.warnings[0]


def test_sgd_is_torchs_with_nesterov_momentum_and_no_decay_of_biases(tmp_path: Path) -> None:
    """Against plain arithmetic: v = m v + g + d w, w -= r (g + d w + m v), and d = 0 for what has one axis."""
    settings = Training(
        epochs=3,
        batch_size=40,
        optimizer="sgd",
        learning_rate=0.1,
        momentum=0.8,
        weight_decay=0.05,
        warm_up_ratio=0.0,
        max_gradient_norm=None,
    )

    class Linear(Learner):
        def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
            assert batch.labels is not None
            return {"labels": functional.cross_entropy(self.network(*batch.inputs), batch.labels)}

    torch.manual_seed(0)
    learner, samples = Linear(nn.Linear(4, 3)), samples_of()
    assert samples.labels is not None
    weight, bias = (parameter.detach().double().clone() for parameter in learner.network.parameters())
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(3):
        x = samples.take(torch.arange(40)).inputs[0].double()
        distance = ((x @ weight.T + bias).softmax(1) - functional.one_hot(samples.labels, 3)) / 40
        rate = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 3))
        for at, (value, gradient) in enumerate(((weight, distance.T @ x + 0.05 * weight), (bias, distance.sum(0)))):
            momenta[at] = 0.8 * momenta[at] + gradient
            value.sub_(rate * (gradient + 0.8 * momenta[at]))
    train(learner, samples, settings, Bench(tmp_path).context)
    found_weight, found_bias = learner.network.parameters()
    torch.testing.assert_close(found_weight.double(), weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found_bias.double(), bias, atol=1e-6, rtol=1e-5)


def test_gradients_are_left_alone_without_a_norm(tmp_path: Path) -> None:
    """A tiny norm stops SGD where it stands; None does not."""
    results = []
    for norm in (1e-9, None):
        learner = learner_of()
        before = learner.network.get_submodule("0").weight.detach().clone()
        settings = Training(epochs=1, optimizer="sgd", momentum=0, weight_decay=0, max_gradient_norm=norm)
        train(learner, samples_of(), settings, Bench(tmp_path).context)
        results.append(float((learner.network.get_submodule("0").weight.detach() - before).abs().max()))
    assert results[0] < 1e-8
    assert results[1] > 1e-6


def test_the_result_is_the_moving_average(tmp_path: Path) -> None:
    """Against the average of each step's weights, from runs of 1, 2 and 3 steps at a constant rate."""
    settings = Training(epochs=1, batch_size=8, optimizer="sgd", learning_rate=0.1, warm_up_ratio=1.0)
    path: list[Tensor] = []

    class Watching(Classifier):
        def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
            path.append(self.adapter.weight.detach().double().clone())
            return super().forward(batch)

    last = learner_of(Watching)
    train(last, samples_of(), settings, Bench(tmp_path).context)
    path.append(last.adapter.weight.detach().double())
    average = path[0]
    for step, weights in enumerate(path[1:], 1):
        decay = min(0.2, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weights
    averaged = learner_of()
    train(averaged, samples_of(), settings.model_copy(update={"ema_decay": 0.2}), Bench(tmp_path).context)
    torch.testing.assert_close(averaged.adapter.weight.double(), average, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(averaged.adapter.weight, last.adapter.weight, atol=1e-4)
    for name, buffer in averaged.network.named_buffers():
        assert torch.equal(buffer, last.network.get_buffer(name))


def test_bfloat16_trains_on_a_cpu(tmp_path: Path) -> None:
    """By autocast: the weights stay float32, the loss is near that of float32 and not the same; the facts say so."""
    results = {}
    for precision in ("float32", "auto", "bfloat16"):
        settings = Training(epochs=3, batch_size=8, precision=precision)  # type: ignore[arg-type]
        learner = learner_of(dropout=0.0)
        facts = train(learner, samples_of(), settings, Bench(tmp_path).context)
        assert {parameter.dtype for parameter in learner.parameters()} == {torch.float32}
        results[precision] = facts["epochs"][-1]["loss"]
        assert facts["precision"] == ("bfloat16" if precision == "bfloat16" else "float32")
    assert results["float32"] == results["auto"] != results["bfloat16"]
    assert results["bfloat16"] == pytest.approx(results["float32"], rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has float16")
def test_float16_without_a_gpu_is_refused(tmp_path: Path) -> None:
    """Before the first step, with what to do."""
    with pytest.raises(ConfigError, match="needs a CUDA device") as caught:
        train(learner_of(), samples_of(), Training(precision="float16"), Bench(tmp_path, events=Killer(1)).context)
    assert caught.value.fix == "precision: auto"


def test_the_best_epoch_is_kept_and_training_ends(tmp_path: Path) -> None:
    """Judged worse after the second epoch: its weights are kept, and two more epochs are tried."""
    settings = ALL.model_copy(update={"epochs": 9, "early_stopping": EarlyStopping(patience=2, held_out_ratio=0.25)})
    learner = learner_of(Fading)
    weights, facts = trained(settings, Bench(tmp_path).context, learner)
    assert [entry["held_out"] for entry in facts["epochs"]] == [30.0, 0.0, 30.0, 60.0]
    assert facts["best_epoch"] == 2
    assert float(learner.seen) == 60
    rerun = learner_of(Fading)
    for step in (8, 9, 16):
        scratch = tmp_path / str(step)
        with pytest.raises(Killed):
            trained(
                settings, replace(Bench(tmp_path, events=Killer(step)).context, scratch=scratch), learner_of(Fading)
            )
        rerun = learner_of(Fading)
        again, _ = trained(settings, replace(Bench(tmp_path).context, scratch=scratch), rerun)
        assert again == weights
    assert not rerun.training


def test_without_a_better_judge_the_loss_decides(tmp_path: Path) -> None:
    """The figure is the mean loss of the held-out samples in eval mode, by the averaged weights that are kept."""
    settings = ALL.model_copy(update={"epochs": 2})
    learner = learner_of()
    facts = train(learner, samples_of(), settings, Bench(tmp_path).context)
    _, held = hold_out(40, settings.early_stopping, seed=0, where="here")
    terms = learner(samples_of().take(held))
    assert facts["best_epoch"] == 2
    assert sum(float(term.detach()) for term in terms.values()) == pytest.approx(
        facts["epochs"][-1]["held_out"], abs=1e-5
    )


def test_held_out_samples_are_not_learned_from(tmp_path: Path) -> None:
    """Every other sample is, each epoch."""
    seen: list[Tensor] = []

    class Watching(Classifier):
        def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
            if self.training:
                seen.append(batch.rows)
            return super().forward(batch)

    train(learner_of(Watching), samples_of(), ALL, Bench(tmp_path).context)
    kept, held = hold_out(40, ALL.early_stopping, seed=0, where="here")
    assert (len(kept), len(held)) == (30, 10)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(40))
    assert torch.equal(torch.cat(seen).sort().values, kept.repeat_interleave(4))
    assert not torch.equal(held, hold_out(40, ALL.early_stopping, seed=1, where="here")[1])


def test_too_few_samples_to_hold_any_out_are_refused() -> None:
    """At least two are left to learn from."""
    with pytest.raises(TrainingError, match="too few samples to learn from") as caught:
        hold_out(4, EarlyStopping(held_out_ratio=0.7), seed=0, where="here")
    assert caught.value.got == "4 samples, of which 3 are held out"
    assert len(hold_out(3, EarlyStopping(held_out_ratio=0.01), seed=0, where="here")[1]) == 1


def test_patience_counts_epochs_since_the_best() -> None:
    """Of equals the first is the best."""
    epochs = [{"epoch": at, "held_out": figure} for at, figure in enumerate([3.0, 1.0, 1.0, 2.0], 1)]
    assert best_epoch(epochs) == 2
    assert [is_over(epochs[:n], EarlyStopping(patience=2)) for n in range(5)] == [False, False, False, False, True]
    assert not is_over(epochs, None)


def test_memory_is_told(tmp_path: Path) -> None:
    """At least what torch takes, and no more than what the machine has."""
    _, facts = trained(Training(epochs=1), Bench(tmp_path).context)
    assert 20e6 < facts["peak_memory_bytes"] < 1e12


def test_the_curve_of_a_training_is_in_its_facts(tmp_path: Path) -> None:
    """Each epoch has its number, its loss and the learning rate of its last step, which is the schedule's."""
    settings = Training(epochs=3, batch_size=8, learning_rate=0.02)
    facts = train(learner_of(), samples_of(), settings, Bench(tmp_path).context)
    assert [entry["epoch"] for entry in facts["epochs"]] == [1, 2, 3]
    total = 15
    want = [0.02 * schedule(step, total, settings.warm_up_ratio) for step in (4, 9, 14)]
    assert [entry["learning_rate"] for entry in facts["epochs"]] == pytest.approx(want, rel=5e-4)


def test_a_long_curve_is_thinned() -> None:
    """Of 1,000 epochs 200 stay, evenly, the first and the last among them; of 200 all."""
    epochs = [{"epoch": number} for number in range(1, 1001)]
    kept = [entry["epoch"] for entry in thinned(epochs)]
    assert (len(kept), kept[0], kept[-1]) == (MAX_CURVE, 1, 1000)
    assert {after - before for before, after in pairwise(kept)} <= {5, 6}
    assert thinned(epochs[:MAX_CURVE]) == epochs[:MAX_CURVE]
