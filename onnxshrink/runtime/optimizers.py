"""Which of ONNX Runtime's own graph optimizers change a model. It says so in its log alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort

from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.session import LEVELS, Optimization

_OPEN = """\
import sys, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 1
options.intra_op_num_threads = 1
options.graph_optimization_level = ort.GraphOptimizationLevel(int(sys.argv[2]))
ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
"""
_APPLIED = re.compile(r"GraphTransformer (\S+) modified: (\d) with status")


def applied_optimizers(model: Path, optimization: Optimization) -> tuple[str, ...]:
    """The optimizers that change the graph at a level on the CPU, in the order in which they first do.

    Each name can be given to `Session` as one to leave out. What acts at every level, ``disabled`` too, ONNX Runtime
    cannot do without, whether it is named there or not.

    Args:
        model: Path of the ``.onnx`` file.
        optimization: The level.

    Raises:
        ModelError: The log does not name one optimizer, changed or not: it reads otherwise than it did.
    """
    # A process of its own: the log goes to the standard error stream of the whole process, past Python.
    opened = subprocess.run(  # noqa: S603  our own interpreter, our own script
        [sys.executable, "-W", "ignore", "-c", _OPEN, str(model.resolve()), str(int(LEVELS[optimization]))],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    log = _APPLIED.findall(opened.stderr)
    if opened.returncode or not log:
        raise ModelError(
            "the optimizers that change the model cannot be told from ONNX Runtime's log",
            where=str(model),
            got=f"exit status {opened.returncode}, {len(opened.stderr)} characters",
            want=f"lines such as 'GraphTransformer ConstantFolding modified: 1', by onnxruntime {ort.__version__}",
        )
    return tuple(dict.fromkeys(name for name, changed in log if changed == "1"))
