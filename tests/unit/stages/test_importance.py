"""Which samples gradients are taken of."""

from pathlib import Path

import numpy as np
import pytest
from torch import nn
from torch_models import Bench

from onnxshrink.config.data import NpzData
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.stages import importance


def test_samples_of_all_classes_are_drawn_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored one class after the other, as folders are: the gradients are those of all of them."""
    labels = np.repeat(np.arange(3), 100)
    np.savez(tmp_path / "d.npz", image=np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32), labels=labels)
    monkeypatch.setattr(importance, "_MAX_SAMPLES", 90)
    counts = []
    for seed in (0, 0, 1):
        network = nn.Linear(4, 3)
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        context = Bench(tmp_path, NpzData(npz=tmp_path / "d.npz"), seed=seed).context
        specs = (TensorSpec("image", "float32", ("batch", 4)),)
        assert importance.take_gradients(network, specs, context) == 90
        assert network.bias.grad is not None
        # Every class has probability 1/3, and the gradient of a logit is that less the share of its label.
        counts.append(tuple((30 - network.bias.grad).round().int().tolist()))
    assert counts[0] == counts[1] != counts[2]
    assert all(sum(drawn) == 90 and min(drawn) > 15 for drawn in counts)


def test_whole_numbers_may_be_values(tmp_path: Path) -> None:
    """Integer labels of a network with one output are values to meet, not classes."""
    values = np.arange(8)
    np.savez(tmp_path / "d.npz", image=np.ones((8, 4), np.float32), labels=values)
    network = nn.Linear(4, 1)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    context = Bench(tmp_path, NpzData(npz=tmp_path / "d.npz")).context
    assert importance.take_gradients(network, (TensorSpec("image", "float32", ("batch", 4)),), context) == 8
    assert network.bias.grad is not None
    assert float(network.bias.grad) == pytest.approx(-2 * values.sum())


def test_tokens_that_do_not_count_have_no_gradient(tmp_path: Path) -> None:
    """Labels of -100 are left out, as in training."""
    labels = np.array([[0, -100], [2, -100]])
    np.savez(tmp_path / "d.npz", image=np.ones((2, 2, 4), np.float32), labels=labels)
    network = nn.Linear(4, 3)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    context = Bench(tmp_path, NpzData(npz=tmp_path / "d.npz")).context
    importance.take_gradients(network, (TensorSpec("image", "float32", ("batch", 2, 4)),), context)
    assert network.bias.grad is not None
    assert network.bias.grad.tolist() == pytest.approx([2 / 3 - 1, 2 / 3, 2 / 3 - 1])
