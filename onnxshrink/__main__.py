"""``python -m onnxshrink``: the command line, with every error in the form that errors have."""

from __future__ import annotations

import json
import os
import sys
import traceback

from onnxshrink.core.errors import DependencyError, ShrinkError

_INTERRUPTED = 130
"""What a shell gives a process that Ctrl-C ended."""


def main() -> None:
    """Run the command line and exit: 0 passed, 1 a gate failed, 2 the user can fix it, 3 our bug."""
    # Torch's OpenMP threads spin while they wait for each other. Where another process has one of the cores, that made
    # training up to seven times slower than on one thread; threads that sleep cost nothing that can be measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(_status(sys.argv[1:]))


def _status(arguments: list[str]) -> int:
    try:
        from typer import Abort

        from onnxshrink.cli import app
    except ModuleNotFoundError as e:
        return _tell(_not_installed(e), arguments)
    from onnxshrink.runtime.processes import let_the_first_speak

    try:
        status = int(app(args=arguments, standalone_mode=False) or 0)
        return _interrupted() if status == _INTERRUPTED else status  # what typer makes of Ctrl-C
    except ShrinkError as e:
        let_the_first_speak()
        return _tell(e, arguments)
    except (KeyboardInterrupt, Abort):  # Abort: at a question, by Ctrl-C or where nobody answers
        return _interrupted()
    except BrokenPipeError:
        return 1
    except Exception as e:  # noqa: BLE001  anything else is our bug, and the traceback is what a report of it needs
        let_the_first_speak()
        if hasattr(e, "show") and hasattr(e, "exit_code"):  # click's usage errors
            if hasattr(e, "message"):
                e.message = e.message.removeprefix("Value error, ")  # pydantic's, which typer checks choices with
            e.show()
            return 2
        traceback.print_exc()
        print("\nthis is a bug in onnxshrink: please report it with the lines above", file=sys.stderr)
        return 3


def _not_installed(error: ModuleNotFoundError) -> DependencyError:
    return DependencyError(
        f"this Python does not have what onnxshrink needs: {error.msg}",
        where=f"the packages of {sys.executable}",
        got=f"no {error.name}",
        want="onnxshrink, installed with what it depends on",
        fix=". .venv/bin/activate in the checkout, where tools/dev.py has made it; pip install -e . there otherwise",
    )


def _interrupted() -> int:
    print("\ninterrupted: what was finished is kept, the same command goes on from there", file=sys.stderr)
    return _INTERRUPTED


def _tell(error: ShrinkError, arguments: list[str]) -> int:
    if "--json" in arguments:
        fields = {name: getattr(error, name) for name in ("what", "where", "got", "want", "fix")}
        print(json.dumps({"error": {"kind": type(error).__name__, **fields}}, indent=2))
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    main()
