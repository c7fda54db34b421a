from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch_models import Bench, digits_like, source

from onnxshrink.config.data import DataRoles, NpzData
from onnxshrink.config.stages import Export, Finetune, QuantizeStatic, QuantizeWeights
from onnxshrink.config.training import Teacher
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import Array
from onnxshrink.runtime.torch_model import load_network


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


@pytest.mark.parametrize(
    ("labels", "fix"),
    [
        (np.eye(3)[np.arange(6) % 3], r"labels.argmax\(1\)"),
        (np.linspace(0, 1, 6), r"labels.astype\('int64'\)"),
        (np.array(["cat", "dog"] * 3), "np.unique"),
        (np.arange(6) % 3 + 1, "labels - 1"),
    ],
)
def test_labels_of_a_classification_must_be_class_numbers(tmp_path: Path, labels: Array, fix: str) -> None:
    """One-hot rows, fractions, text and numbers out of range are refused before training, with the way out."""
    np.savez(tmp_path / "d.npz", image=np.zeros((6, 1, 6, 6), np.float32), labels=labels)
    bench = Bench(tmp_path, NpzData(npz=tmp_path / "d.npz"))
    with pytest.raises(DataError, match="label") as caught:
        bench.run(Finetune(), bench.open(source("convolutions")))
    assert caught.match(fix)


@pytest.mark.parametrize("factory", ["convolutions", "Transformer"])
@pytest.mark.parametrize("scheme", [QuantizeStatic(), QuantizeWeights()], ids=["int8", "int4"])
def test_the_network_as_it_was_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, scheme: QuantizeStatic | QuantizeWeights
) -> None:
    """Where its outputs fit in memory they are kept, and the artifact is the same, byte for byte."""
    digests = {}
    for runs in ("once", "on every batch"):
        bench = Bench(tmp_path / runs)
        data = digits_like(tmp_path / "d.npz", labels=False)
        bench.context = replace(bench.context, data=DataRoles(calibration=data))
        if runs != "once":
            monkeypatch.setattr("onnxshrink.stages.teachers._KEPT_BYTES", 0)
        settings = Finetune(simulate=scheme, epochs=2)
        digests[runs] = bench.run(settings, bench.open(source(factory))).digest
        assert bench.facts["original_runs"] == runs
    assert len(set(digests.values())) == 1


@pytest.mark.slow
def test_attention_is_trained_for_four_bits(tmp_path: Path) -> None:
    """The real artifact of a transformer has a third of the noise, on samples that it has not seen."""
    data = digits_like(tmp_path / "d.npz", labels=False, count=64)
    bench = Bench(tmp_path)
    bench.context = replace(bench.context, data=DataRoles(calibration=data))
    scheme = QuantizeWeights(block_size=16, activations="float")
    original = bench.open(source("Transformer"))
    network, _ = load_network(original)
    x = np.load(digits_like(tmp_path / "unseen.npz", count=90).npz)["image"] + np.float32(0.05)
    with torch.no_grad():
        wanted = network(torch.from_numpy(x)).numpy()
    noise = []
    for artifact in (original, bench.run(Finetune(simulate=scheme, epochs=12), original)):
        model = bench.run(scheme, bench.run(Export(), artifact))
        session = onnxruntime.InferenceSession(model.model_path, providers=["CPUExecutionProvider"])
        noise.append(float(np.square(session.run(None, {session.get_inputs()[0].name: x})[0] - wanted).sum()))
    assert noise[1] < noise[0] / 3
