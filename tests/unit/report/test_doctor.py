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
from onnxshrink.report.doctor import Diagnosis, diagnose, print_diagnosis
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


@pytest.mark.parametrize(("wheels", "status"), [(("onnxruntime 1",), 0), (("onnxruntime 1", "onnxruntime-gpu 1"), 1)])
def test_the_exit_status_says_it(monkeypatch: pytest.MonkeyPatch, wheels: tuple[str, ...], status: int) -> None:
    """1 with something known to be bad; JSON has everything."""
    monkeypatch.setattr(doctor, "wheels_of", lambda: wheels)
    monkeypatch.setattr(doctor, "try_libraries", lambda: ())
    monkeypatch.setattr(doctor, "try_providers", lambda: ())
    result = CliRunner().invoke(app, ["doctor", "--json"], standalone_mode=False)
    assert result.return_value == status, result.output
    document = json.loads(result.stdout)
    assert document["is_fine"] is (status == 0)
    assert document["limits"]["threads"] >= 1
    assert document["wheels"] == list(wheels)


def test_a_broken_onnxruntime_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers cannot be tried then, and the reason is a finding."""
    monkeypatch.setattr(doctor, "try_libraries", lambda: (Library("onnxruntime", "1", "ImportError: no libfoo"),))
    diagnosis = diagnose()
    assert diagnosis.providers == ()
    assert any("libfoo" in finding.what for finding in diagnosis.findings)
    assert not diagnosis.is_fine
