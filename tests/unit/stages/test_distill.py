from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch_models import Bench, convolutions, digits_like, source

from onnxshrink.config.stages import Distill
from onnxshrink.config.training import FeatureHint, LabelLoss, SoftenedKl, Teacher, Training
from onnxshrink.core.errors import ConfigError, DataError, ModelError
from onnxshrink.runtime.torch_model import load_network
from onnxshrink.stages.distill import teacher_of
from onnxshrink.stages.samples import read_samples

TRAINED = Teacher(factory="torch_models:convolutions", train=Training(epochs=8, batch_size=8, learning_rate=0.01))


def test_a_student_learns_its_teachers_answers(tmp_path: Path) -> None:
    """With and without labels; without them the teacher has all the weight, and the facts say so."""
    bench = Bench(tmp_path, digits_like(tmp_path / "d.npz"))
    settings = Distill(teacher=TRAINED, epochs=12, batch_size=8, learning_rate=0.01)
    student = bench.open(source("convolutions", args={"width": 4}))
    bench.run(settings, student)
    assert bench.facts["teacher_agreement"] >= 0.9
    assert bench.facts["train_accuracy"] >= 0.9
    assert [loss["kind"] for loss in bench.facts["losses"]] == ["kl", "labels"]
    assert "declined" not in bench.facts
    assert len(bench.facts["epochs"]) == 12
    given = tmp_path / "teacher.safetensors"
    save_file(load_network(teacher_of(TRAINED, student, bench.context))[0].state_dict(), given)
    bare = Bench(tmp_path / "bare", digits_like(tmp_path / "bare.npz", labels=False))
    weighted = Teacher(factory="torch_models:convolutions", weights=given)
    bare.run(settings.model_copy(update={"teacher": weighted}), bare.open(source("convolutions", args={"width": 4})))
    assert bare.facts["teacher_agreement"] >= 0.9
    assert [loss["kind"] for loss in bare.facts["losses"]] == ["kl"]
    assert "no" in bare.facts["declined"][0]
    assert "train_accuracy" not in bare.facts


def test_a_teacher_comes_from_weights_or_from_training(tmp_path: Path) -> None:
    """Weights are taken as they are; `train` learns from labels alone, by the stage that users have too."""
    bench = Bench(tmp_path, digits_like(tmp_path / "d.npz"))
    student = bench.open(source("convolutions", args={"width": 2}))
    state = {name: value + 1 for name, value in convolutions().state_dict().items()}
    save_file(state, tmp_path / "t.safetensors")
    given = Teacher(factory="torch_models:convolutions", weights=tmp_path / "t.safetensors")
    network, architecture = load_network(teacher_of(given, student, bench.context))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert architecture.inputs == source("convolutions").specs
    bench.ran.clear()
    trained, _ = load_network(teacher_of(TRAINED, student, bench.context))
    assert bench.ran == ["source", "finetune"]
    samples = read_samples(bench.context, architecture.inputs, labels="needed")
    assert samples.labels is not None
    with torch.no_grad():
        answers = trained(*samples.take(torch.arange(len(samples))).inputs)
    accuracy = float((answers.argmax(1) == samples.labels).double().mean())
    assert accuracy == pytest.approx(bench.facts["train_accuracy"], abs=1e-6)


def test_a_teacher_without_labels_to_train_it_is_refused(tmp_path: Path) -> None:
    """A teacher that is trained in place needs labels, whatever the losses are."""
    bench = Bench(tmp_path, digits_like(tmp_path / "d.npz", labels=False))
    with pytest.raises(DataError, match="labels"):
        bench.run(Distill(teacher=TRAINED, losses=(SoftenedKl(kind="kl"),)), bench.open(source("convolutions")))


@pytest.mark.parametrize("training", [None, TRAINED.train])
def test_a_teacher_of_other_classes_is_refused_before_training(tmp_path: Path, training: Training | None) -> None:
    """Logits that do not pair up cannot be compared; a teacher that is trained in place is not trained for that."""
    bench = Bench(tmp_path, digits_like(tmp_path / "d.npz"))
    teacher = Teacher(factory="torch_models:convolutions", args={"classes": 5}, train=training)
    with pytest.raises(ModelError, match="does not fit the student's") as caught:
        bench.run(Distill(teacher=teacher), bench.open(source("convolutions")))
    assert (caught.value.got, caught.value.want) == ("float32[2,5]", "float32[2,3], as the student's")
    assert bench.ran == ["source", "source"]


def test_a_module_that_is_not_there_is_told_before_a_teacher_is_trained(tmp_path: Path) -> None:
    """A misspelt name of a hint's module costs no training of a teacher."""
    bench = Bench(tmp_path, digits_like(tmp_path / "d.npz"))
    settings = Distill(teacher=TRAINED, losses=(FeatureHint(kind="hint", student="0", teacher="misspelt"),))
    with pytest.raises(ConfigError, match="misspelt"):
        bench.run(settings, bench.open(source("convolutions")))
    assert bench.ran == ["source", "source"]


def test_only_the_named_losses_count(tmp_path: Path) -> None:
    """With the labels alone the teacher does not matter at all; with its outputs alone it does."""
    data = digits_like(tmp_path / "d.npz")
    results = {}
    for loss in (LabelLoss(kind="labels"), SoftenedKl(kind="kl")):
        for width in (8, 2):
            bench = Bench(tmp_path / f"{loss.kind}-{width}", data)
            teacher = Teacher(factory="torch_models:convolutions", args={"width": width})
            given = bench.open(source("convolutions", args={"width": 4}))
            results[loss.kind, width] = bench.run(Distill(teacher=teacher, losses=(loss,), epochs=1), given).digest
    assert results["labels", 8] == results["labels", 2]
    assert results["kl", 8] != results["kl", 2]
