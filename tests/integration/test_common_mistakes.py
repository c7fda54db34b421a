"""The commonest mistakes: the command line says what, where, got, want and fix, and exits with 2.

Every test goes through `onnxshrink.__main__.main` in this process and reads what was printed for people. It also looks
at the store: a mistake that can be known beforehand is told before the first step, so that no training is lost to it.
"""

from __future__ import annotations

import errno
import resource
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from common_mistakes import MISTAKES, NETS, ONNX, STATIC, TORCH, Mistake, X, Y, config
from onnx_models import cnn

from onnxshrink.__main__ import main

PARTS = ["what", "where", "got", "want", "fix"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, where all is right: a model, samples, a network."""
    onnx.save(cnn(), str(tmp_path / "model.onnx"))
    for file in ("calib.npz", "test.npz"):
        np.savez(tmp_path / file, x=X, labels=Y)
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The message that a command line ends with, part by part; the exit status is 2 and nothing else is said."""
    monkeypatch.setattr(sys, "argv", ["onnxshrink", *arguments, "--quiet"])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (2, ""), printed.err
    what, *rows = printed.err.splitlines()
    assert what.startswith("error: "), printed.err
    parts = {"what": what.removeprefix("error: ")}
    for row in rows:
        name = row[2:9].strip()
        if name:
            parts[name] = row[9:]
        else:
            parts[list(parts)[-1]] += f"\n{row[9:]}"
    return parts


def steps_done(folder: Path) -> int | None:
    """Steps that the store has kept; None if there is no store."""
    memo = folder / "runs" / ".store" / "memo"
    return len(list(memo.iterdir())) if memo.exists() else None


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_message_says_all_five(
    mistake: Mistake, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What, where, got, want and fix are all there with the words that matter, before work that could be lost."""
    parts = told(mistake.make(folder), monkeypatch, capsys)
    assert list(parts) == PARTS
    for name, text in parts.items():
        assert getattr(mistake, name) in text, f"{name}: {text}"
    assert steps_done(folder) == mistake.steps
    assert not (folder / "boo").exists()


@pytest.mark.parametrize(
    ("module", "text", "says"),
    [
        ("torch", TORCH, ("needs torch", "packages of", "no torch", "the torch extra", "pip install")),
        (
            "PIL.Image",
            ONNX.replace("{npz: calib.npz}", "{images: photos}"),
            ("images need Pillow", "photos", "no pillow", "the images extra", "pip install pillow"),
        ),
    ],
)
def test_a_missing_extra_is_named(
    module: str,
    text: str,
    says: tuple[str, ...],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A package that is not installed (hidden from the import system here) is named with how to install it."""
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").touch()
    monkeypatch.setitem(sys.modules, module, None)
    parts = told(config(text)(folder), monkeypatch, capsys)
    assert list(parts) == PARTS
    assert all(word in part for word, part in zip(says, parts.values(), strict=True)), parts
    assert steps_done(folder) is None


def test_a_file_that_may_not_grow_is_told_as_a_full_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system really refuses to write here (RLIMIT_FSIZE): the store says so, and keeps nothing half-written."""
    arguments, limits = config(ONNX)(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        parts = told(arguments, monkeypatch, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(parts) == PARTS
    assert "File too large" in parts["what"]
    assert "free some space" in parts["fix"]
    assert steps_done(folder) == 0
    assert not list((folder / "runs" / ".store" / "work").iterdir())


@pytest.mark.parametrize("seam", ["onnxshrink.core.store._sync", "onnxshrink.core.run_folder.os.sync"])
def test_a_full_disk_is_told_with_the_room_that_is_left(
    seam: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No space (ENOSPC, raised by hand where bytes reach the disk): the room that is left, and where else to go."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(seam, full)
    parts = told(config(ONNX, STATIC)(folder), monkeypatch, capsys)
    assert list(parts) == PARTS
    assert "No space left on device" in parts["what"]
    assert "MB free on the disk of" in parts["got"]
    assert "--runs PATH" in parts["fix"]
    assert not (folder / "runs" / "r").exists()


def test_a_misspelt_option_of_a_command_is_told_with_the_right_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What typer itself refuses keeps its form: usage, the option, the nearest one; the status is 2 as well."""
    monkeypatch.setattr(sys, "argv", ["onnxshrink", *config(ONNX)(folder), "--quite"])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "No such option: --quite" in said
    assert "--quiet" in said
