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

from onnxshrink.core.device_memory import DeviceMemory, Look, device_memory, gpu_look
from onnxshrink.core.machine import peak_memory_bytes, reset_peak_memory

FIRST_RUNS = 3
"""After which what is held on a GPU is looked at; only the first of them is timed."""


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Load time, time of the first run, and how far the process grew at most, on the host and on a GPU.

    Args:
        settings: ``model`` and ``inputs`` (an ``.npz`` that the model takes as it is), paths; ``providers``, name and
            options; ``threads``; ``level``, ONNX Runtime's graph optimization level as a number; ``config``, session
            config entries; ``affinity``, cores or null; ``gpu``, the UUID of the one that the session is on, or null.

    Returns:
        ``load_ms``, ``first_run_ms``, and ``peak_memory_bytes``, null where the system does not tell; with a GPU also
        ``device_memory_bytes`` of the loaded session and ``peak_device_memory_bytes``, null where they are not known,
        and ``device_memory_note``, which says where they come from or why they are not.
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
    look: Look | None = gpu_look(settings["gpu"]) if settings["gpu"] is not None else None
    looks = [look()] if look else []
    reset_peak_memory()
    before = peak_memory_bytes()
    start = time.perf_counter_ns()
    session = ort.InferenceSession(settings["model"], options, providers=[tuple(p) for p in settings["providers"]])
    loaded = time.perf_counter_ns()
    looks += [look()] if look else []
    begun = time.perf_counter_ns()
    session.run(None, inputs)
    done = time.perf_counter_ns()
    after = peak_memory_bytes()
    figures = {
        "load_ms": (loaded - start) / 1e6,
        "first_run_ms": (done - begun) / 1e6,
        "peak_memory_bytes": after - before if after is not None and before is not None else None,
    }
    if look is None:
        return figures
    looks.append(look())
    for _ in range(FIRST_RUNS - 1):
        session.run(None, inputs)
        looks.append(look())
    return figures | _on_gpu(device_memory(looks[0], looks[1], looks[2:]))


def _on_gpu(held: DeviceMemory) -> dict[str, Any]:
    return {
        "device_memory_bytes": held.loaded_bytes,
        "peak_device_memory_bytes": held.peak_bytes,
        "device_memory_note": held.note,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
