from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx_models import cnn, samples_of
from ruamel.yaml import YAML

import onnxshrink.regress
from onnxshrink.regress.check import write_baseline

README = (Path(onnxshrink.regress.__file__).parent / "README.md").read_text(encoding="utf-8")
GITHUB, GITLAB = (YAML(typ="safe").load(block) for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project as the snippets have it: a bundle among the tests, and a build of the same model."""
    folder = tmp_path_factory.mktemp("project")
    bundle = folder / "tests" / "model.bundle"
    (folder / "build").mkdir()
    bundle.mkdir(parents=True)
    for place in (bundle, folder / "build"):
        onnx.save(cnn(), str(place / "model.onnx"))
    session = {"provider": "CPUExecutionProvider", "options": {}, "threads": 1}
    samples = [{"x": sample[None]} for sample in samples_of(cnn(), 2)["x"]]
    write_baseline(bundle, {"session": session, "versions": {}, "metrics": [], "config": None}, samples)
    return folder


def steps(job: dict[str, Any]) -> list[str]:
    """The shell commands of a job, of GitHub's form or GitLab's."""
    return job.get("script") or [step["run"] for step in job["steps"] if "run" in step]


def test_github_runs_the_check_and_keeps_what_it_found(project: Path) -> None:
    """The command of the snippet exits with 0, and writes the files that the steps after it upload."""
    job = GITHUB["jobs"]["check"]
    uploaded = [step["with"] for step in job["steps"] if step.get("if") == "always()"]
    written = ran(project, job)
    assert {options.get("path") or options["sarif_file"] for options in uploaded} == written
    assert GITHUB["permissions"]["security-events"] == "write"


def test_gitlab_runs_the_check_and_keeps_what_it_found(project: Path) -> None:
    """The same, and the report is the one that GitLab is told of."""
    job = GITLAB["check model"]
    assert {job["artifacts"]["reports"]["junit"]} == ran(project, job)


def ran(project: Path, job: dict[str, Any]) -> set[str]:
    """Run what a job runs, but its installation; the files that are new."""
    before = set(project.iterdir())
    for command in steps(job):
        program, *arguments = shlex.split(command)
        if program == "pip":
            assert arguments == ["install", "numpy", "onnxruntime"]
            continue
        assert program == "python"
        subprocess.run([sys.executable, *arguments], cwd=project, check=True, capture_output=True)
    new = set(project.iterdir()) - before
    names = {path.name for path in new}
    for path in new:
        path.unlink()
    return names


def test_the_commands_of_the_first_page_work(project: Path) -> None:
    """Every line of the README's first block of commands exits with 0, in the order they stand in."""
    block = next(text for text in re.findall(r"```\n(.*?)```", README, re.DOTALL) if "check.py" in text)
    lines = [line.partition("#")[0] for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        program, *arguments = shlex.split(line)
        start = [sys.executable] if program == "python" else [sys.executable, "-m", program]
        folder = project / "tests"
        arguments = [str(project / argument) if argument.startswith("build/") else argument for argument in arguments]
        done = subprocess.run([*start, *arguments], cwd=folder, check=False, capture_output=True, text=True)
        assert done.returncode == 0, line + done.stdout + done.stderr
