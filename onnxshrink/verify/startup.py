"""What a model costs before it is warm: load time, first run and peak memory, each in a fresh process.

An application that starts pays for what a warm process has long forgotten, so each figure is that of a process of its
own, see `onnxshrink.verify.startup_probe`; reference and candidate take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from onnxshrink.config.gates import Target
from onnxshrink.core.artifact import Artifact
from onnxshrink.core.device_memory import gpu_uuid
from onnxshrink.core.errors import ModelError
from onnxshrink.core.report import Metric
from onnxshrink.core.tensors import Batch, TensorSpec
from onnxshrink.runtime.providers import CPU, find_provider, memory_of, provider_options
from onnxshrink.runtime.session import LEVELS, Session

Figures: TypeAlias = dict[str, list[Any]]
"""Name of a figure to its value in each process, None where it is not known; ``device_memory_note`` has texts."""

PROCESSES = 6
"""Of each model. The median lies between the least and the most of six with a probability of 1 - 2 / 2**6 = 96.9%."""

_UNITS = {"load_ms": "ms", "first_run_ms": "ms", "peak_memory_bytes": "bytes"}
_GPU_UNITS = {"device_memory_bytes": "bytes", "peak_device_memory_bytes": "bytes"}
_NOTE = "device_memory_note"
_NO_PLUGINS = "not measured: the provider comes as a plugin"
_NO_MEMORY = "this system does not tell the memory of a process"


def measure_startup(
    artifact: Artifact, reference: Artifact, target: Target, batch: Batch, specs: tuple[TensorSpec, ...]
) -> tuple[tuple[Metric, ...], dict[str, Figures]]:
    """Load time, first run and peak memory of a model and of its reference.

    Files are in the system's cache by then. Memory is what the process grew by at most, over the one that has loaded
    ONNX Runtime and the inputs: weights, ONNX Runtime's copies and arenas, outputs; on the host, whatever the provider.
    Where that is CUDA or TensorRT, what the process holds on the GPU is told beside it, after the session is loaded and
    at most after its first runs: CUDA's context and the kernels that were loaded are in it.

    Args:
        artifact: The model, kind ``onnx``.
        reference: What it is compared with; measured once where it is the same.
        target: Provider, threads, spinning and cores.
        batch: One inference's inputs, as the target's latency is measured on.
        specs: What they are called, see `Session`.

    Returns:
        ``load_ms``, ``first_run_ms``, ``peak_memory_bytes``, on a GPU ``device_memory_bytes`` and
        ``peak_device_memory_bytes``, and the same with ``reference_``: medians over processes, from the least to the
        most of them; and every process's figures by model, plain JSON. Of a GPU these have ``device_memory_note``:
        where each process's figures come from, see `onnxshrink.core.device_memory`, or why there are none.

    Raises:
        ModelError: A process failed; the message is its last line.

    Source: Conover, "Practical Nonparametric Statistics", 1999, section 3.2: the interval of a median.
    """
    if find_provider(target).devices:
        return tuple(
            Metric(name, None, unit, target=target.name, note=_NO_PLUGINS) for name, unit in units_of(target).items()
        ), {}
    models = {"candidate": artifact} | ({} if artifact.digest == reference.digest else {"reference": reference})
    figures: dict[str, Figures] = {name: {} for name in models}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            name: probe_settings(model.model_path, target, batch, specs, Path(folder)) for name, model in models.items()
        }
        for turn in range(PROCESSES):
            for name in sorted(models, reverse=bool(turn % 2)):
                for figure, value in probe(settings[name], where=str(models[name].path)).items():
                    figures[name].setdefault(figure, []).append(value)
    figures.setdefault("reference", figures["candidate"])
    return startup_metrics(figures, target), figures


def units_of(target: Target) -> dict[str, str]:
    """What is measured on a target, and its unit: what is held on a GPU, where CUDA's tensors lie."""
    return _UNITS | (_GPU_UNITS if gpu_of(target) is not None else {})


def gpu_of(target: Target) -> int | None:
    """CUDA's number of the GPU that a target computes on; None of any other provider."""
    memory, device_id = memory_of(target)
    return device_id if memory == "cuda" else None


def startup_metrics(figures: Mapping[str, Figures], target: Target) -> tuple[Metric, ...]:
    """The metrics of `measure_startup` from every process's figures, by ``candidate`` and ``reference``."""
    return tuple(
        _metric(
            prefix + figure, figures[name][figure], unit, target, figures[name][_NOTE] if figure in _GPU_UNITS else []
        )
        for name, prefix in (("candidate", ""), ("reference", "reference_"))
        for figure, unit in units_of(target).items()
    )


def probe_settings(
    model: Path,
    target: Target,
    batch: Batch,
    specs: tuple[TensorSpec, ...],
    folder: Path,
    *,
    config: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What the probe is told: the session as `Session` opens it.

    Args:
        model: The ``.onnx`` or ``.ort`` file.
        target: Provider, threads, spinning and cores.
        batch: One inference's inputs.
        specs: What they are called, see `Session`.
        folder: Where the inputs are written for the probe.
        config: Session config entries besides the target's.
    """
    provider, gpu = find_provider(target), gpu_of(target)
    session = Session(model, target, like=specs)
    inputs = Path(tempfile.mkdtemp(dir=folder)) / "inputs.npz"
    arrays: dict[str, Any] = dict(session.interface.feed(batch, where=str(model)))
    np.savez(inputs, **arrays)
    return {
        "model": str(model),
        "inputs": str(inputs),
        "providers": [(provider.name, provider_options(target))] + [(CPU, {})] * (provider.name != CPU),
        "threads": target.threads,
        "level": int(LEVELS[target.optimization]),
        "config": {"session.intra_op.allow_spinning": str(int(target.spinning)), **(config or {})},
        "affinity": list(target.affinity) if target.affinity else None,
        "gpu": None if gpu is None else gpu_uuid(gpu),
    }


def probe(settings: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The figures of one process, see `onnxshrink.verify.startup_probe.main`.

    Raises:
        ModelError: It failed; the message is its last line.
    """
    path = os.pathsep.join(filter(None, sys.path))  # what this process can import, the other can
    done = subprocess.run(  # noqa: S603  our own module, by the same interpreter
        [sys.executable, "-m", "onnxshrink.verify.startup_probe", json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise ModelError(f"the model cannot be started in a process of its own: {lines[-1]}", where=where)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _metric(name: str, values: list[float | None], unit: str, target: Target, notes: list[str]) -> Metric:
    """A figure over the processes. ``notes``, one for each, say where it comes from, or why it is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        why = f"not measured: {notes[values.index(None)]}" if notes else _NO_MEMORY
        return Metric(name, None, unit, target=target.name, note=why)
    note = "; ".join([f"median, least and most of {len(values)} fresh processes", *dict.fromkeys(notes)])
    return Metric(name, float(np.median(known)), unit, min(known), max(known), target=target.name, note=note)
