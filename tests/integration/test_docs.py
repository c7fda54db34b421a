"""The pages are true: YAML validates, commands and Python run, and headings of errors are messages of the source.

The blocks of a page are taken from top to bottom in one folder with small models and samples. A block whose first line
is ``# file: NAME`` is written to that file. One behind ``<!-- not run: reason -->`` is left out, and `LEFT_OUT` counts
those.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import environment
from onnx_models import cnn, samples_of
from ruamel.yaml import YAML

from onnxshrink.cli import app
from onnxshrink.config.load import validate

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {
    "README.md": 0,
    "onnxshrink/core/ERRORS.md": 1,
    "onnxshrink/recipes/README.md": 1,
    "onnxshrink/report/README.md": 0,
    "onnxshrink/stages/README.md": 0,
    "tools/COMPARISON.md": 1,
}
"""Every page, with the number of its blocks that are not run; regress/README.md has a test of its own."""

BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NETWORK = """\
from torch import nn


def build(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
"""


@dataclass(frozen=True, slots=True)
class Block:
    """What stands between two fences."""

    language: str
    text: str
    is_run: bool
    line: int


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield Block(found[2], found[3], found[1] is None, text[: found.start()].count("\n") + 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a model, samples of it, a network with weights, a folder of images."""
    folder = tmp_path_factory.mktemp("prepared")
    model = cnn()
    onnx.save(model, str(folder / "model.onnx"))
    labels = np.arange(24) % 10
    for seed, name in enumerate(("calib", "test", "train")):
        np.savez(folder / f"{name}.npz", **samples_of(model, 24, seed=seed), labels=labels)
    (folder / "photos").mkdir()
    for module in ("mine", "mypkg/models"):
        path = folder / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(NETWORK)
    for name in ("weights.pth", "weights.safetensors"):
        (folder / name).touch()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", LEFT_OUT)
def test_every_block_of_a_page_holds(page: str, prepared: Path, tmp_path: Path) -> None:
    """It is run to exit status 0, or is a config or a part of one that validates; the exceptions are counted."""
    if page == "onnxshrink/recipes/README.md":
        pytest.importorskip("torch", reason="the tutorial starts from a torch network")
    folder = tmp_path / "project"
    shutil.copytree(prepared, folder)
    left_out = 0
    for block in blocks(page):
        if not block.is_run:
            left_out += 1
        elif (named := re.match(r"# file: (\S+)\n", block.text)) and block.language == "python":
            (folder / named[1]).write_text(block.text)
        elif block.language == "yaml":
            if named:
                (folder / named[1]).write_text(block.text)
            validated(block.text, folder)
        elif block.language == "sh":
            for line in filter(None, (text.partition(" #")[0].strip() for text in block.text.splitlines())):
                ran(shlex.split(line), folder, f"{page}:{block.line}: {line}")
        elif block.language == "python":
            ran(["python", "-c", block.text], folder, f"{page}:{block.line}")
        else:
            assert block.language == "", f"{page}:{block.line}: nobody looks at {block.language}"
    assert left_out == LEFT_OUT[page]


def ran(words: list[str], folder: Path, where: str) -> None:
    """Run a command as it stands; of what installs only the names are looked at."""
    if "&&" in words:
        at = words.index("&&")
        ran(words[:at], folder, where)
        ran(words[at + 1 :], folder, where)
        return
    match words:
        case ["git", "clone", *_] | ["cd", _]:
            return
        case ["pip", "install", *wanted]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            asked = re.findall(r"\[(\w+)\]", " ".join(wanted))
            assert set(asked) <= set(extras), where
            return
        case ["python", "tools/dev.py", task, *_]:
            assert f"python tools/dev.py {task} " in (ROOT / "tools/dev.py").read_text(), where
            return
    assert words[0] == "python", where
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"


def validated(text: str, folder: Path) -> None:
    """A whole config, roles of data, or a list of stages; what a part leaves out is put around it."""
    document: Any = YAML(typ="safe").load(text)
    data: dict[str, Any] = {role: {"npz": "test.npz"} for role in ("train", "calibration", "evaluation")}
    if isinstance(document, list):
        kinds = {stage["kind"] for stage in document}
        torch = {"distill", "prune_channels", "prune_weights", "finetune", "export"}
        source: dict[str, Any] = {"onnx": "model.onnx"}
        if kinds & torch:
            source = {"factory": "mine:build", "inputs": {"x": {"shape": ["batch", 3, 16, 16]}}}
            document = document if "export" in kinds else [*document, {"kind": "export"}]
        document = {"model": source, "data": data, "variants": {"v": document}}
    elif "model" not in document:
        document = {"model": {"onnx": "model.onnx"}, **document}
    validate(document, base=folder)


@pytest.mark.parametrize("page", [*LEFT_OUT, "onnxshrink/regress/README.md"])
def test_commands_in_the_prose_exist(page: str) -> None:
    """``onnxshrink WORD`` in a line of text or code names a command."""
    known = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|-m |^)onnxshrink\s([a-z]+)", text, re.MULTILINE))
    assert named <= known


@pytest.mark.parametrize("page", LEFT_OUT)
def test_links_and_programs_exist(page: str) -> None:
    """Relative links lead to files, and so do names of our own programs and tests."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for path in re.findall(r"`((?:tools|tests|onnxshrink|calib_data)/[\w/.]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for bench in re.findall(r"`(bench_\w+)`", text):
        assert (ROOT / "tools" / f"{bench}.py").exists(), bench


def test_each_heading_of_the_errors_is_a_message_of_the_source() -> None:
    """Word for word, with … where the message has a value."""
    text = (ROOT / "onnxshrink/core/ERRORS.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^### `(.*)`$", text, re.MULTILINE)) | set(
        re.findall(r"^### ``(.*)``$", text, re.MULTILINE)
    )
    assert len(headings) == text.count("\n### ")
    assert headings <= set(messages())


def messages() -> Iterator[str]:
    """The first argument of every error that is made in the package."""
    for path in (ROOT / "onnxshrink").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error")):
                continue
            match node.args[:1]:
                case [ast.Constant(value=str(text))]:
                    yield text
                case [ast.JoinedStr(values=parts)]:
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
