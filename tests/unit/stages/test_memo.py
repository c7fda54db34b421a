from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from onnxshrink.config.data import DataRoles
from onnxshrink.core.artifact import Kind
from onnxshrink.core.errors import DependencyError
from onnxshrink.core.events import Silent
from onnxshrink.core.store import Store
from onnxshrink.stages.memo import Memo, require_torch


@pytest.mark.parametrize("missing", ["torch", "torch_pruning", "safetensors"])
def test_a_missing_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """The torch extra is optional; the message names what is missing and how to get it, before any import fails."""
    real = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == missing else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    require_torch({"onnx"}, "optimize")
    with pytest.raises(DependencyError, match="distill") as caught:
        require_torch({"torch"}, "distill")
    assert "pip install" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("declined", "told"),
    [
        ("nothing to do", ["step: nothing to do"]),
        (["head: tied", "stem: ignored"], ["step: head: tied", "step: stem: ignored"]),
        ({"head": "tied"}, ["step: head: tied"]),
        ([], []),
        ({}, []),
    ],
)
def test_what_was_declined_is_told_in_sentences(tmp_path: Path, declined: object, told: list[str]) -> None:
    """One warning for each thing that a step declined, whatever form its facts have; never Python's own notation."""

    def work(folder: Path) -> dict[str, object]:
        (folder / "file").write_text("", encoding="utf-8")
        return {"declined": declined}

    memo = Memo(Store(tmp_path), DataRoles(), 0, Silent())
    memo.once("step", "kind", {}, "ranges", work, uses={"onnx"})
    assert list(memo.warnings) == told


@pytest.mark.parametrize(("kind", "counted"), [("torch", 7), ("onnx", 12), ("ort", 12), ("ranges", None)])
def test_every_step_that_gives_a_model_says_what_it_weighs(tmp_path: Path, kind: Kind, counted: int | None) -> None:
    """A network's weights, a model's files, nothing for what is no model; found again it says the same."""

    def work(folder: Path) -> dict[str, object]:
        (folder / "weights.safetensors").write_bytes(b"weights")
        (folder / "other").write_bytes(b"other")
        return {"told": 1}

    for _ in range(2):
        memo = Memo(Store(tmp_path), DataRoles(), 0, Silent())
        memo.once("step", "kind", {}, kind, work, uses={"onnx"})
        assert memo.steps[0].facts == {"told": 1} | ({} if counted is None else {"size_bytes": counted})


def test_a_run_that_finds_a_step_shows_the_steps_within_it(tmp_path: Path) -> None:
    """Two levels deep, in the same order and with the same facts as where the work was done, under its own name."""

    def told(memo: Memo, name: str) -> list[tuple[str, str, object]]:
        def inner(folder: Path) -> dict[str, object]:
            (folder / "file").write_text("inner", encoding="utf-8")
            return {"depth": 3}

        def middle(folder: Path) -> dict[str, object]:
            memo.once(f"{name} ▸ middle ▸ inner", "in", {"at": 3}, "ranges", inner, uses={"onnx"})
            (folder / "file").write_text("middle", encoding="utf-8")
            return {"depth": 2}

        def outer(folder: Path) -> dict[str, object]:
            for _ in range(2):
                memo.once(f"{name} ▸ middle", "mid", {"at": 2}, "ranges", middle, uses={"onnx"})
            (folder / "file").write_text("outer", encoding="utf-8")
            return {"depth": 1}

        memo.once(name, "out", {"at": 1}, "ranges", outer, uses={"onnx"})
        return [(step.name, step.kind, step.facts) for step in memo.steps]

    fresh = told(Memo(Store(tmp_path), DataRoles(), 0, Silent()), "a")
    assert [name for name, _, _ in fresh] == ["a ▸ middle ▸ inner", "a ▸ middle", "a"]
    assert [facts for _, _, facts in fresh] == [{"depth": 3}, {"depth": 2}, {"depth": 1}]
    assert told(Memo(Store(tmp_path), DataRoles(), 0, Silent()), "a") == fresh
    renamed = told(Memo(Store(tmp_path), DataRoles(), 0, Silent()), "b")
    assert [name for name, _, _ in renamed] == ["b ▸ middle ▸ inner", "b ▸ middle", "b"]
