"""Checkpoints are read back as they were written, or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onnxshrink.core.artifact import digest_file
from onnxshrink.core.events import Silent
from onnxshrink.stages.checkpoint import Checkpoints, copy_of, digest_tensors, restore, tensors_of

STATE = {
    "weights": {"w": torch.arange(5000.0), "half": torch.ones(2, dtype=torch.bfloat16)},
    "groups": [{"betas": (0.9, 0.999), "lr": 1e-3, "fused": None, "nesterov": True}],
    "name": "x",
}


class Warnings(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warned(self, text: str) -> None:
        """Append."""
        self.texts.append(text)


def checkpoints(folder: Path, part: str = "p", identity: str = "me") -> tuple[Checkpoints, Warnings]:
    warnings = Warnings()
    return Checkpoints(folder, part, {"who": identity}, warnings), warnings


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors as lists, to be compared."""
    return {
        **{name: value for name, value in state.items() if name not in {"weights", "identity"}},
        "weights": {name: (value.dtype, value.tolist()) for name, value in state["weights"].items()},
    }


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    """Types, dtypes and values; the newest stands alone."""
    kept, warnings = checkpoints(tmp_path / "a" / "b")
    assert kept.load() is None
    kept.save(9, {**STATE, "name": "old"})
    kept.save(10, STATE)
    found = kept.load()
    assert found is not None
    assert plain(found) == plain(STATE)
    assert [path.name[:12] for path in (tmp_path / "a" / "b").iterdir()] == ["p-000000010-"]
    assert warnings.texts == []


def test_no_folder_keeps_nothing() -> None:
    """Where a stage has no place for it."""
    kept = Checkpoints(None, "p", {}, Silent())
    kept.save(1, STATE)
    assert kept.load() is None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_one_is_ignored_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    """One flipped bit in the middle of the weights is enough; it is told."""
    kept, warnings = checkpoints(tmp_path)
    kept.save(1, {**STATE, "name": "before"})
    before = next(tmp_path.iterdir())
    content = before.read_bytes()
    kept.save(2, STATE)
    newest = next(tmp_path.iterdir())
    before.write_bytes(content)
    whole = newest.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    newest.write_bytes({"cut": whole[:-100], "flip": flipped, "empty": b""}[damage])
    found = kept.load()
    assert found is not None
    assert found["name"] == "before"
    assert len(warnings.texts) == 1
    assert "damaged" in warnings.texts[0]


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    """Even under a name that fits its bytes."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "run",)

    unnamed = tmp_path / "x"
    for write in (lambda: unnamed.write_bytes(pickle.dumps(Evil())), lambda: torch.save({"a": Evil()}, unnamed)):
        write()
        unnamed.rename(tmp_path / f"p-000000001-{digest_file(unnamed)}.pt")
    kept, warnings = checkpoints(tmp_path)
    assert kept.load() is None
    assert not (tmp_path / "run").exists()
    assert len(warnings.texts) == 2


def test_only_its_own_training_goes_on_from_it(tmp_path: Path) -> None:
    """Another identity is told of it; another part, whatever its name, does not even look."""
    kept, _ = checkpoints(tmp_path)
    kept.save(3, STATE)
    stranger, warnings = checkpoints(tmp_path, identity="you")
    assert stranger.load() is None
    assert "another training" in warnings.texts[0]
    for part in ("p-1", "q", "*"):
        other, warnings = checkpoints(tmp_path, part)
        assert other.load() is None
        other.save(1, STATE)
        assert warnings.texts == []
    assert len(list(tmp_path.iterdir())) == 4
    assert kept.load() is not None


def test_what_cannot_be_written_is_told_and_no_more(tmp_path: Path) -> None:
    """Training goes on; what was half-written by a killed run is removed by the next."""
    (tmp_path / "file").write_bytes(b"")
    kept, warnings = checkpoints(tmp_path / "file" / "inside")
    kept.save(1, STATE)
    assert "no checkpoint was written" in warnings.texts[0]
    (tmp_path / "xyz.part").write_bytes(b"half")
    kept, _ = checkpoints(tmp_path)
    kept.load()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tensors_are_put_back_into_their_places() -> None:
    """Parameters, buffers and those that a state dict leaves out; tied weights stay tied; copies are copies."""
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    network[2].weight = network[0].weight
    network.register_buffer("hidden", torch.ones(2), persistent=False)
    kept, digest = copy_of(network), digest_tensors(tensors_of(network))
    assert "hidden" in kept
    place = network[0].weight.data_ptr()
    for tensor in tensors_of(network).values():
        tensor.add_(1)
    assert digest_tensors(tensors_of(network)) != digest
    restore(network, kept)
    assert digest_tensors(tensors_of(network)) == digest
    assert network[2].weight.data_ptr() == network[0].weight.data_ptr() == place


def test_a_digest_covers_names_shapes_and_types() -> None:
    """Equal bytes are not enough."""
    zeros = torch.zeros(4)
    digests = {
        digest_tensors(tensors)
        for tensors in (
            {"a": zeros},
            {"b": zeros},
            {"a": zeros.reshape(2, 2)},
            {"a": zeros.int()},
            {"a": zeros[:2], "b": zeros[2:]},
        )
    }
    assert len(digests) == 5
