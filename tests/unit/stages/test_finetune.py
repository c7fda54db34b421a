from pathlib import Path

import pytest
from torch_models import Bench, digits_like, source

from onnxshrink.config.stages import Finetune
from onnxshrink.config.training import Teacher
from onnxshrink.core.errors import DataError


def test_finetuning_learns_from_labels(tmp_path: Path) -> None:
    """A fresh network tells the three classes apart afterwards, and running it again gives the same artifact."""
    data = digits_like(tmp_path / "d.npz")
    digests = set()
    for name in ("a", "b"):
        bench = Bench(tmp_path / name, data)
        digests.add(
            bench.run(Finetune(epochs=10, batch_size=8, learning_rate=0.01), bench.open(source("convolutions"))).digest
        )
        assert bench.facts["train_accuracy"] >= 0.9
        assert "teacher_agreement" not in bench.facts
    assert len(digests) == 1


def test_finetuning_may_have_a_teacher(tmp_path: Path) -> None:
    """Then it needs no labels."""
    bench = Bench(tmp_path, digits_like(tmp_path / "d.npz", labels=False))
    teacher = Teacher(factory="torch_models:convolutions")
    bench.run(Finetune(teacher=teacher, epochs=1), bench.open(source("convolutions")))
    assert [loss["kind"] for loss in bench.facts["losses"]] == ["kl"]


def test_finetuning_alone_needs_labels(tmp_path: Path) -> None:
    """There is nothing else to learn from."""
    bench = Bench(tmp_path, digits_like(tmp_path / "d.npz", labels=False))
    with pytest.raises(DataError, match="labels"):
        bench.run(Finetune(), bench.open(source("convolutions")))
