from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_models
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch_models import Bench, convolutions, digits_like, held_samples, source

from onnxshrink.config.data import NpzData
from onnxshrink.config.stages import Distill, Finetune
from onnxshrink.config.training import Loss, Task, Teacher
from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import ConfigError, DataError, ModelError
from onnxshrink.core.tensors import Array
from onnxshrink.runtime.torch_model import load_network
from onnxshrink.stages.learner import Student
from onnxshrink.stages.losses import softened_divergence
from onnxshrink.stages.samples import Samples
from onnxshrink.stages.teachers import Teachers

LOSSES: TypeAdapter[tuple[Loss, ...]] = TypeAdapter(tuple[Loss, ...])
TEACHER = Teacher(factory="torch_models:convolutions", args={"width": 6})


class Tokens(nn.Module):
    """Logits for each of four tokens, after a hidden layer."""

    def __init__(self, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, 2) to (batch, 4, classes)."""
        return self.head(torch.relu(self.hidden(x)))


def tokens(**args: int) -> nn.Module:
    """A factory."""
    return Tokens(**args)


def values(outputs: int = 2) -> nn.Module:
    """(batch, 1, 6, 6) to (batch, outputs)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, outputs))


def squared(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...] | None, labels: Tensor | None) -> Tensor:
    """A user's loss: what `mse` is."""
    assert teacher is not None
    assert labels is not None
    return ((student[0] - teacher[0]) ** 2).mean()


def features_too(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...] | None, labels: Tensor | None) -> Tensor:
    """A user's loss on the second outputs; labels are not looked at."""
    assert teacher is not None
    return ((student[1] - teacher[1]) ** 2).mean() + 0 * (0 if labels is None else 1)


def not_reduced(student: tuple[Tensor, ...], *_: object) -> Tensor:
    """A user's mistake."""
    return student[0] ** 2


def detached(student: tuple[Tensor, ...], *_: object) -> Tensor:
    """A user's mistake."""
    return student[0].detach().mean()


def failing(*_: object, power: int) -> Tensor:
    """A user's mistake."""
    message = f"no power {power}"
    raise ValueError(message)


def losses(*settings: dict[str, Any]) -> tuple[Loss, ...]:
    """Settings as the config has them."""
    return LOSSES.validate_python(settings)


def samples_of(count: int = 6, shape: tuple[int, ...] = (1, 6, 6)) -> Samples:
    """Seeded."""
    image = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    return held_samples(image, torch.arange(count) % 3)


def student_of(*settings: dict[str, Any], teacher: nn.Module | None = None, task: Task = "classification") -> Student:
    """`convolutions` with these losses."""
    torch.manual_seed(5)
    teachers = Teachers([convolutions(width=6) if teacher is None else teacher])
    return Student(
        convolutions(width=4), losses(*settings), task, samples_of().take(torch.arange(2)), teachers=teachers
    )


def ran(
    tmp_path: Path,
    factory: Callable[[], nn.Module],
    task: Task,
    labels: Array | None,
    shape: tuple[int, ...],
    **settings: Any,
) -> Facts:
    """The facts of a distillation on seeded samples, from a teacher with other weights."""
    rng = np.random.default_rng(0)
    arrays = {} if labels is None else {"labels": labels}
    np.savez(tmp_path / "d.npz", image=rng.normal(size=shape).astype(np.float32), **arrays)
    entry = f"{factory.__module__}:{factory.__name__}"
    bench = Bench(tmp_path, NpzData(npz=tmp_path / "d.npz"))
    given = bench.open(source("linear", ("batch", *shape[1:])).model_copy(update={"factory": entry}))
    stage = Distill(teacher=taught_by(factory, tmp_path), task=task, learning_rate=0.03, batch_size=8, **settings)
    bench.run(stage, given)
    return bench.facts


def taught_by(factory: Callable[[], nn.Module], folder: Path) -> Teacher:
    """A teacher with weights that no factory gives by itself."""
    torch.manual_seed(7)
    save_file(factory().state_dict(), folder / "teacher.safetensors")
    entry = f"{factory.__module__}:{factory.__name__}"
    return Teacher(factory=entry, weights=folder / "teacher.safetensors")


def test_terms_are_named_weighted_and_add_up() -> None:
    """Each is its weight times its arithmetic, and the second of a kind has a name of its own."""
    student = student_of(
        {"kind": "kl", "temperature": 2, "weight": 0.5}, {"kind": "kl", "temperature": 3}, {"kind": "labels"}
    )
    batch = samples_of().take(torch.tensor([4, 1, 2]))
    terms = {name: value.detach() for name, value in student.eval()(batch).items()}
    ours = student.network(batch.inputs[0]).detach()
    theirs = Teachers([student._teachers.networks[0]])(batch).outputs[0]  # type: ignore[union-attr]
    assert batch.labels is not None
    expected = {
        "kl": 0.5 * softened_divergence(ours, theirs, 2.0),
        "kl_2": softened_divergence(ours, theirs, 3.0),
        "labels": functional.cross_entropy(ours, batch.labels),
    }
    torch.testing.assert_close(terms, expected)


def test_a_teacher_is_neither_trained_nor_saved_nor_heard_twice() -> None:
    """The learner has no parameter of it; what it said of every sample is kept, row by row."""
    student = student_of({"kind": "kl"})
    samples = samples_of(600)
    before = student(samples.take(torch.tensor([599, 0])))
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in student.network.parameters())
    assert student.keep(samples)
    with torch.no_grad():
        for parameter in student._teachers.networks[0].parameters():  # type: ignore[union-attr]
            parameter.zero_()
    torch.testing.assert_close(student(samples.take(torch.tensor([599, 0]))), before)


def test_what_changes_every_epoch_is_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept of random samples, of features, or of more than fits."""

    class Random(Samples):
        is_random = True

    plain = samples_of()
    assert not student_of({"kind": "kl"}).keep(Random(plain.source, plain.inputs, plain.labels))
    assert not student_of({"kind": "hint", "student": "3", "teacher": "3"}).keep(plain)
    monkeypatch.setattr("onnxshrink.stages.teachers._KEPT_BYTES", 6 * 3 * 4 - 1)
    assert not student_of({"kind": "kl"}).keep(plain)
    monkeypatch.setattr("onnxshrink.stages.teachers._KEPT_BYTES", 6 * 3 * 4)
    assert student_of({"kind": "kl"}).keep(plain)


def test_teachers_are_averaged() -> None:
    """The mean of the logits: at every temperature the normalized geometric mean of the distributions."""
    torch.manual_seed(0)
    networks, batch = [convolutions(), convolutions(), convolutions()], samples_of().take(torch.arange(6))
    said = Teachers(networks)(batch, ["3"])
    alone = [Teachers([network])(batch, ["3"]) for network in networks]
    geometric = torch.stack([(one.outputs[0] / 2).softmax(1) for one in alone]).log().mean(0).exp()
    torch.testing.assert_close((said.outputs[0] / 2).softmax(1), geometric / geometric.sum(1, keepdim=True))
    torch.testing.assert_close(said.features["3"], alone[0].features["3"])
    with pytest.raises(ModelError, match="cannot be averaged") as caught:
        Teachers([networks[0], convolutions(classes=4)])(batch)
    assert (caught.value.got, caught.value.want) == ("float32[6,4]", "float32[6,3], as of the first teacher")


@pytest.mark.parametrize("kind", ["hint", "attention"])
def test_features_are_learned(tmp_path: Path, kind: str) -> None:
    """The term falls; the adapter of a hint is trained and thrown away."""
    bench = Bench(tmp_path, digits_like(tmp_path / "d.npz"))
    loss = {"kind": kind, "student": "4", "teacher": "4"}
    given = bench.open(source("convolutions", args={"width": 4}))
    made = bench.run(Distill(teacher=TEACHER, losses=losses(loss), epochs=8, batch_size=8, learning_rate=0.01), given)
    epochs = bench.facts["epochs"]
    assert epochs[-1]["loss"] < 0.7 * epochs[0]["loss"]
    assert bench.facts["teacher_runs"] == "on every batch"
    assert load_network(made)[0].state_dict().keys() == convolutions(4).state_dict().keys()


def test_a_hint_adapts_what_it_must() -> None:
    """A 1x1 convolution for maps of any size, a linear layer for tokens and vectors; the seed decides its start."""
    maps = student_of({"kind": "hint", "student": "0", "teacher": "3"})
    assert [tuple(p.shape) for p in maps.adapters["hint"].parameters()] == [(12, 4, 1, 1), (12,)]
    vectors = student_of({"kind": "hint", "student": "7", "teacher": "7"})
    assert [tuple(p.shape) for p in vectors.adapters["hint"].parameters()] == [(12, 8), (12,)]
    text = samples_of(shape=(4, 2)).take(torch.arange(2))
    hint = losses({"kind": "hint", "student": "hidden", "teacher": "hidden"})
    student, teacher = Tokens(5), Teachers([Tokens(7)])
    made = [Student(student, hint, "tokens", text, teachers=teacher, seed=seed).adapters["hint"] for seed in (3, 3, 4)]
    weights = [next(iter(adapter.parameters())).detach() for adapter in made]
    assert weights[0].shape == (7, 5)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    value = functional.mse_loss(made[0](student.hidden(text.inputs[0])), teacher.networks[0].hidden(text.inputs[0]))
    found = Student(student, hint, "tokens", text, teachers=teacher, seed=3)(text)["hint"]
    torch.testing.assert_close(found, value)


def test_features_of_pooled_maps_meet_at_the_smaller_size() -> None:
    """A teacher that halves height and width can be learned from."""
    half = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(54, 3))
    for kind in ("hint", "attention"):
        terms = student_of({"kind": kind, "student": "3", "teacher": "0"}, teacher=half)(
            samples_of().take(torch.arange(3))
        )
        assert terms[kind].requires_grad


@pytest.mark.parametrize(
    ("loss", "what", "fix"),
    [
        ({"kind": "attention", "student": "7", "teacher": "7"}, "'7' and '7' do not fit", "same thing"),
        ({"kind": "hint", "student": "3", "teacher": "7"}, "'3' and '7' do not fit", "same thing"),
    ],
)
def test_features_that_do_not_fit_are_refused(loss: dict[str, Any], what: str, fix: str) -> None:
    """Before training."""
    with pytest.raises(ModelError, match=what) as caught:
        student_of(loss)
    assert fix in str(caught.value.fix)


def test_one_value_has_no_direction() -> None:
    """The cosine of two numbers is 1 or -1, and nothing can be learned from it."""
    batch, networks = samples_of(shape=(4,)).take(torch.arange(2)), [nn.Linear(4, 1), nn.Linear(4, 1)]
    with pytest.raises(ModelError, match="no direction"):
        Student(networks[0], losses({"kind": "cosine"}), "embedding", batch, teachers=Teachers(networks[1:]))


def test_a_misspelt_module_is_suggested() -> None:
    """On both sides."""
    batch, networks = samples_of().take(torch.arange(2)), [torch_models.Residual(), torch_models.Residual()]
    for side in ("student", "teacher"):
        loss = {"kind": "hint", "student": "head", "teacher": "head", side: "heads"}
        with pytest.raises(ConfigError, match=f"`hint.{side}` names 'heads', and the network has no such") as caught:
            Student(networks[0], losses(loss), "classification", batch, teachers=Teachers(networks[1:]))
        assert caught.value.fix == "did you mean 'head'?"


def test_a_module_that_does_not_run_is_refused() -> None:
    """It has no output to learn."""
    network = convolutions()
    network.register_module("spare", nn.Linear(1, 1))
    network.forward = nn.Sequential(*list(network.children())[:-1]).forward
    with pytest.raises(ModelError, match="'spare' does not run"):
        student_of({"kind": "hint", "student": "3", "teacher": "spare"}, teacher=network)


def test_a_users_loss_counts_like_ours(tmp_path: Path) -> None:
    """The same function as `mse` gives the same bytes; it sees every output, and labels where there are any."""
    digests = set()
    for index, loss in enumerate(({"kind": "mse"}, {"kind": "entry", "entry": f"{__name__}:squared"})):
        bench = Bench(tmp_path / str(index), digits_like(tmp_path / "d.npz"))
        given = bench.open(source("convolutions", args={"width": 4}))
        digests.add(bench.run(Distill(teacher=TEACHER, losses=losses(loss), epochs=2), given).digest)
    assert len(digests) == 1
    bare = Bench(tmp_path / "bare", digits_like(tmp_path / "bare.npz", labels=False))
    settings = Distill(
        teacher=taught_by(torch_models.Residual, tmp_path),
        losses=losses({"kind": "entry", "entry": f"{__name__}:features_too"}),
        epochs=3,
    )
    bare.run(settings, bare.open(source("Residual")))
    assert bare.facts["epochs"][-1]["loss"] < bare.facts["epochs"][0]["loss"]
    assert bare.facts["teacher_runs"] == "once"


@pytest.mark.parametrize(
    ("entry", "args", "what"),
    [
        (f"{__name__}:not_reduced", {}, "gives no scalar"),
        (f"{__name__}:detached", {}, "does not depend on the student"),
        (f"{__name__}:failing", {"power": 3}, "no power 3"),
        (f"{__name__}:failing", {}, "missing 1 required"),
        (f"{__name__}:squarred", {}, "has no 'squarred'"),
    ],
)
def test_a_users_mistake_is_found_before_training(entry: str, args: dict[str, int], what: str) -> None:
    """The loss is tried on two samples."""
    with pytest.raises((ModelError, ConfigError), match=what):
        student_of({"kind": "entry", "entry": entry, "args": args})


def test_decoupled_distillation_learns_and_needs_labels(tmp_path: Path) -> None:
    """It ends near the labels that the teacher knows; data without labels are refused."""
    bench = Bench(tmp_path, digits_like(tmp_path / "d.npz"))
    given = bench.open(source("convolutions", args={"width": 4}))
    teacher = Bench(tmp_path / "t", digits_like(tmp_path / "d.npz"))
    trained = teacher.run(Finetune(epochs=8, batch_size=8, learning_rate=0.01), teacher.open(source("convolutions")))
    save_file(load_network(trained)[0].state_dict(), tmp_path / "t.safetensors")
    taught = Teacher(factory="torch_models:convolutions", weights=tmp_path / "t.safetensors")
    settings = Distill(teacher=taught, losses=losses({"kind": "dkd"}), epochs=10, batch_size=8, learning_rate=0.01)
    bench.run(settings, given)
    assert bench.facts["teacher_agreement"] >= 0.8
    bare = Bench(tmp_path / "bare", digits_like(tmp_path / "bare.npz", labels=False))
    with pytest.raises(DataError, match="labels are needed"):
        bare.run(settings, bare.open(source("convolutions")))


def test_tokens_are_learned(tmp_path: Path) -> None:
    """Classes of tokens with the default losses; tokens without label count in no figure."""
    labels = np.arange(96).reshape(24, 4) % 3
    labels[:, 3] = -100
    facts = ran(tmp_path, tokens, "tokens", labels, (24, 4, 2), epochs=20)
    assert [loss["kind"] for loss in facts["losses"]] == ["kl", "labels"]
    assert facts["epochs"][-1]["loss"] < 0.9 * facts["epochs"][0]["loss"]
    assert facts["teacher_agreement"] >= 0.5
    assert 0 < facts["train_accuracy"] < 1


def test_values_are_learned(tmp_path: Path) -> None:
    """Regression with the default losses; labels may be whole numbers."""
    facts = ran(tmp_path, values, "regression", np.zeros((24, 2), np.int64), (24, 1, 6, 6), epochs=12)
    assert [loss["kind"] for loss in facts["losses"]] == ["mse", "labels"]
    assert facts["epochs"][-1]["loss"] < 0.6 * facts["epochs"][0]["loss"]
    assert facts["teacher_rmse"] < facts["train_rmse"]
    assert facts["epochs"][0]["terms"].keys() == {"mse", "labels"}
    assert sum(facts["epochs"][0]["terms"].values()) == pytest.approx(facts["epochs"][0]["loss"], abs=2e-6)


def test_embeddings_are_learned(tmp_path: Path) -> None:
    """By their cosine to the teacher's, without labels; the figure is that cosine."""
    facts = ran(tmp_path, values, "embedding", None, (24, 1, 6, 6), epochs=30)
    assert [loss["kind"] for loss in facts["losses"]] == ["cosine"]
    assert facts["teacher_cosine"] >= 0.9
    assert "train_accuracy" not in facts


@pytest.mark.parametrize(
    ("task", "labels", "what"),
    [
        ("tokens", np.full((24, 4), 3), "the label of token 0 of sample 0 is 3, and the model has 3 classes"),
        ("tokens", np.zeros(24, int), "wrong shape"),
        ("tokens", np.zeros((24, 4)), "no class numbers"),
        ("regression", np.zeros((24, 4)), "do not have the shape"),
        ("regression", np.full((24, 4, 3), np.nan), "holds nan"),
    ],
)
def test_labels_must_fit_the_task(tmp_path: Path, task: Task, labels: Array, what: str) -> None:
    """Before training, with the first bad place."""
    with pytest.raises(DataError, match=what):
        ran(tmp_path, tokens, task, labels, (24, 4, 2))


@pytest.mark.parametrize(
    ("network", "shape", "task", "fix"),
    [
        (Tokens(), (4, 2), "classification", "set `task` to regression or tokens"),
        (values(), (1, 6, 6), "tokens", "set `task` to classification or regression or embedding"),
        (nn.Conv2d(1, 2, 3), (1, 6, 6), "embedding", "set `task` to regression"),
        (values(1), (1, 6, 6), "classification", "set `task` to regression or embedding"),
    ],
)
def test_an_output_of_another_task_is_refused(network: nn.Module, shape: tuple[int, ...], task: Task, fix: str) -> None:
    """With the tasks that would fit."""
    with pytest.raises(ModelError, match="does not fit task") as caught:
        Student(network, (), task, samples_of(shape=shape).take(torch.arange(2)))
    assert caught.value.fix == fix
