#!/usr/bin/env python3
"""The one task runner; needs nothing but Python 3.11 and the network's package index.

python tools/dev.py demo    install, and run the digits recipe: teacher to verified int8 model
python tools/dev.py test    install, and run every test
python tools/dev.py check   format, lint, types and import layers
python tools/dev.py ci      test and check, as the continuous integration does
python tools/dev.py bench   run the benchmarks (all, or the names that follow)
python tools/dev.py docs    write the reference of the Python API, as HTML, into build/api
python tools/dev.py fix     format, and mend what the linter can mend

What follows `demo`, `test` or `bench` is passed on: `python tools/dev.py test tests/unit -k store`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CONSTRAINTS = ROOT / "tools" / "constraints.txt"


def main(arguments: list[str]) -> int:
    """Run one task; the exit status is that of the first command that failed."""
    if sys.version_info < (3, 11):  # noqa: UP036  the script must say so itself: it runs before anything is installed
        print(f"onnxshrink needs Python 3.11 or newer; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    tasks = {"demo": demo, "test": test, "check": check, "ci": ci, "bench": bench, "docs": docs, "fix": fix}
    if not arguments or arguments[0] not in tasks:
        print(__doc__)
        return 0 if arguments[:1] in ([], ["help"], ["-h"], ["--help"]) else 2
    return tasks[arguments[0]](arguments[1:])


def demo(more: list[str]) -> int:
    """Run the shipped recipe as a user would."""
    install("torch")
    status = run("-m", "onnxshrink", "run", "onnxshrink/recipes/digits.yaml", *more)
    if status == 0:  # what the run says to do next needs the environment
        activate = r".venv\Scripts\activate" if os.name == "nt" else ". .venv/bin/activate"
        print(f"to go on: {activate}", flush=True)
    return status


def test(more: list[str]) -> int:
    """Every test, or those that are named; what measures time runs alone, afterwards."""
    install("torch,dev")
    if more:
        return run("-m", "pytest", *more)
    workers = str(max(1, min(4, os.cpu_count() or 1)))
    return run("-m", "pytest", "-n", workers, "--dist", "worksteal", "-m", "not serial", threads="1") or run(
        "-m", "pytest", "-m", "serial"
    )


def check(_: list[str]) -> int:
    """Everything that can be said of the code without running it."""
    install("torch,dev")
    return (
        run("-m", "ruff", "format", "--check", ".")
        or run("-m", "ruff", "check", ".")
        or run("-m", "mypy")
        or run("-c", "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())")
    )


def ci(_: list[str]) -> int:
    """What must pass before a change lands: the checks first, for they are quick."""
    return check([]) or test([])


def docs(_: list[str]) -> int:
    """The docstrings of what ``import onnxshrink`` offers, as pages."""
    install("torch,dev")
    return run("-m", "pdoc", "--docformat", "google", "--output-directory", "build/api", "onnxshrink")


def bench(more: list[str]) -> int:
    """Run ``tools/bench_<name>.py`` for each name, or all of them."""
    install("torch,dev")
    names = more or sorted(path.stem.removeprefix("bench_") for path in (ROOT / "tools").glob("bench_*.py"))
    return next((status for name in names if (status := run(f"tools/bench_{name}.py"))), 0)


def fix(_: list[str]) -> int:
    """Format and mend."""
    install("torch,dev")
    return run("-m", "ruff", "check", "--fix", ".") or run("-m", "ruff", "format", ".")


def install(extras: str) -> None:
    """Make ``.venv`` and install the project with ``extras`` into it, unless that was done for these same files."""
    text = b"".join(path.read_bytes() for path in (ROOT / "pyproject.toml", CONSTRAINTS))
    stamp = f"{hashlib.sha256(text).hexdigest()} {sys.version.split()[0]}"
    marks = [VENV / f".installed-{names}" for names in dict.fromkeys((extras, "torch,dev"))]
    if PYTHON.exists() and any(mark.exists() and mark.read_text() == stamp for mark in marks):
        return
    start = time.monotonic()
    make_environment()
    print(f"installing onnxshrink[{extras}] (the first time takes minutes) …", flush=True)
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "-c", CONSTRAINTS, "-e", f"{ROOT}[{extras}]"], check=True, cwd=ROOT)
    marks[0].write_text(stamp)
    print(f"installed in {time.monotonic() - start:.0f} s", flush=True)


def make_environment() -> None:
    """Make ``.venv``, anew where an interrupted attempt left one without pip."""
    if (
        PYTHON.exists()
        and subprocess.run([PYTHON, "-m", "pip", "--version"], check=False, capture_output=True).returncode == 0
    ):
        return
    print(f"making {VENV.name} with Python {sys.version.split()[0]} …", flush=True)
    venv.create(VENV, with_pip=True, clear=True)


def run(*arguments: str, threads: str | None = None) -> int:
    """Run the environment's Python in the repository's root; ``threads`` of each process where many run at once."""
    print("$ python", *arguments, flush=True)
    surroundings = {**os.environ, **({"OMP_NUM_THREADS": threads} if threads else {})}
    return subprocess.run([PYTHON, *arguments], check=False, cwd=ROOT, env=surroundings).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        print(f"the installation failed with status {error.returncode}; see above", file=sys.stderr)
        sys.exit(2)
