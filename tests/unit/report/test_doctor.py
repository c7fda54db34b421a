"""The command `doctor`: what is here, in words and as JSON, and its exit status."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from onnxshrink.cli import app
from onnxshrink.report import doctor
from onnxshrink.report.doctor import Diagnosis, diagnose, print_diagnosis, scarce
from onnxshrink.runtime.installation import Finding, Library, Loaded
from onnxshrink.runtime.limits import Limits

GOLDEN = Path(__file__).parents[2] / "golden"
ROOM = Limits(8, 4, 2.5, 0.1, 16_000_000_000, 8_000_000_000, 4_000_000_000, 50_000_000_000, "/home/me")


def found(*findings: Finding) -> Diagnosis:
    return Diagnosis(
        python="3.11.7",
        machine={"system": "Linux", "processor": "A processor", "architecture": "x86_64", "features": ["avx2"]},
        versions={"onnx": "1.20.0", "onnx-ir": "0.2.0"},
        wheels=("onnxruntime 1.24.0",),
        libraries=(Library("onnx", "1.20.0", None), Library("torch", None, None)),
        providers=(
            Loaded("cpu", loads=True, why="", built_in=True),
            Loaded("cuda", loads=False, why="libcudnn.so.9 is missing", built_in=True),
            Loaded("openvino", loads=False, why="pip install onnxruntime-openvino", built_in=False),
            Loaded("dnnl", loads=False, why="no package on PyPI has it: build ONNX Runtime with it", built_in=False),
        ),
        isa="x86_avx2",
        int8=("x86_avx2: `types: auto` is u8s8",),
        limits=ROOM,
        missing_extras={"torch": "distil, prune, fine-tune and export torch networks"},
        findings=findings,
    )


def shown(diagnosis: Diagnosis) -> str:
    text = io.StringIO()
    print_diagnosis(diagnosis, Console(file=text, width=80))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def test_the_page_is_as_its_golden_file_shows() -> None:
    """80 columns; what is wrong stands last, with what to do and who says so."""
    bad = Finding("bad", "a 1 and b 2 are installed together", "pip uninstall a b", "their docs")
    text = shown(found(bad))
    assert text == (GOLDEN / "doctor.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 80


def test_only_what_is_bad_is_a_problem() -> None:
    """A note is none."""
    assert found(Finding("note", "w", "f", "s")).is_fine
    assert not found(Finding("bad", "w", "f", "s")).is_fine
    assert "nothing here is known to go wrong" in shown(found())


def test_the_last_line_does_not_contradict_the_notes_above_it() -> None:
    """A note says what may go wrong, so the page does not end with nothing."""
    page = shown(found(Finding("note", "a", "f", "s"), Finding("note", "b", "f", "s")))
    assert page.endswith("no known problem; 2 notes above: what may go wrong\n")
    assert "nothing here" not in page


def test_the_exit_status_says_it() -> None:
    """1 with something known to be bad, and what there is little of is not that; JSON has everything."""
    busy = Limits(2, 2, None, 9.0, 16_000_000_000, 8_000_000, None, 5_000_000, "/home/me")
    notes = list(scarce(busy))
    assert [note.level for note in notes] == ["note"] * 3
    assert "load 9 on 2" in notes[-1].what
    assert found(*notes).exit_status == 0
    assert found(*notes, Finding("bad", "w", "f", "s")).exit_status == 1
    assert not list(scarce(ROOM))


def test_the_command_tells_of_the_machine_it_runs_on() -> None:
    """Whatever that is, the exit status and the JSON agree."""
    result = CliRunner().invoke(app, ["doctor", "--json"], standalone_mode=False)
    document = json.loads(result.stdout)
    assert result.return_value == (0 if document["is_fine"] else 1)
    assert document["is_fine"] is not any(finding["level"] == "bad" for finding in document["findings"])
    assert document["limits"]["threads"] >= 1


def test_a_broken_onnxruntime_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers cannot be tried then, and the reason is a finding."""
    monkeypatch.setattr(doctor, "try_libraries", lambda: (Library("onnxruntime", "1", "ImportError: no libfoo"),))
    diagnosis = diagnose()
    assert diagnosis.providers == ()
    assert any("libfoo" in finding.what for finding in diagnosis.findings)
    assert not diagnosis.is_fine
