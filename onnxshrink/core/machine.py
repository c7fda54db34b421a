"""Where a run took place: what a reader of the report must know to compare its figures."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

ONNX_RUNTIMES = (
    "onnxruntime", "onnxruntime-cann", "onnxruntime-directml", "onnxruntime-gpu", "onnxruntime-migraphx",
    "onnxruntime-openvino", "onnxruntime-qnn",
)  # fmt: skip
"""Packages that ONNX Runtime or one of its providers comes in."""

_LIBRARIES = (
    "onnxshrink", "numpy", "onnx", "onnx-ir", *ONNX_RUNTIMES, "onnxscript", "onnxslim", "pydantic", "safetensors",
    "torch", "torch-pruning",
)  # fmt: skip
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")


def machine() -> dict[str, Any]:
    """Processor, instruction sets that matter for int8, cores this process may use, memory and operating system."""
    _, model = _cpuinfo()
    return {
        "processor": model or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "features": processor_features(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def processor_features() -> list[str]:
    """The instruction sets of this processor that decide which integer kernels run."""
    flags, _ = _cpuinfo()
    return [name for name in _FEATURES if name in flags]


def reset_peak_memory() -> None:
    """Let `peak_memory_bytes` count from now on, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int | None:
    """The most memory that this process has held since `reset_peak_memory`; None where the system does not tell.

    Resident pages, shared ones and mapped files as well.

    Source: proc_pid_status(5), ``VmHWM``; proc_pid_clear_refs(5), ``5``.
    """
    path = Path("/proc/self/status")
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((1024 * int(row.split()[1]) for row in rows if row.startswith("VmHWM:")), None)


def versions(names: tuple[str, ...] = _LIBRARIES) -> dict[str, str]:
    """Installed versions of the libraries that a result depends on; those that are not installed are left out."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> tuple[set[str], str | None]:
    """Feature flags and the model name; empty where the system does not tell."""
    path = Path("/proc/cpuinfo")
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    fields: dict[str, str] = {}
    for row in rows:
        name, _, value = row.partition(":")
        fields.setdefault(name.strip(), value.strip())  # the first processor stands for all
    return set((fields.get("flags") or fields.get("Features") or "").split()), fields.get("model name")
