"""Open a model in this process, run it once, and print what that took as JSON: ``python -m`` it with one JSON argument.

It loads little more than ONNX Runtime, as an application would; nothing of what measures is in the figures.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
import onnxruntime as ort

from onnxshrink.core.machine import peak_memory_bytes, reset_peak_memory


def main(settings: dict[str, Any]) -> dict[str, float | int | None]:
    """Load time, time of the first run, and how far the process grew at most.

    Args:
        settings: ``model`` and ``inputs`` (an ``.npz`` that the model takes as it is), paths; ``providers``, name and
            options; ``threads``; ``level``, ONNX Runtime's graph optimization level as a number; ``config``, session
            config entries; ``affinity``, cores or null.

    Returns:
        ``load_ms``, ``first_run_ms``, and ``peak_memory_bytes``, null where the system does not tell.
    """
    if settings["affinity"]:
        os.sched_setaffinity(0, settings["affinity"])
    with np.load(settings["inputs"]) as arrays:
        inputs = dict(arrays)
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel(settings["level"])
    options.log_severity_level = 3
    for key, value in settings["config"].items():
        options.add_session_config_entry(key, value)
    reset_peak_memory()
    before = peak_memory_bytes()
    start = time.perf_counter_ns()
    session = ort.InferenceSession(settings["model"], options, providers=[tuple(p) for p in settings["providers"]])
    loaded = time.perf_counter_ns()
    session.run(None, inputs)
    done = time.perf_counter_ns()
    after = peak_memory_bytes()
    return {
        "load_ms": (loaded - start) / 1e6,
        "first_run_ms": (done - loaded) / 1e6,
        "peak_memory_bytes": after - before if after is not None and before is not None else None,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
