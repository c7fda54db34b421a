"""What a process holds on an NVIDIA GPU, as the driver's management library (NVML) tells it.

NVML comes with the driver, its Python binding with the package nvidia-ml-py. It knows what each process holds, but in a
container or under Windows often not which process is which, or not how much; it then still knows the GPU's total.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a GPU.

    Attributes:
        device_bytes: What all processes together hold of it; None where NVML does not tell.
        own_bytes: What this process holds of it; None where NVML does not list the process, or lists it without.
    """

    device_bytes: int | None
    own_bytes: int | None


Look: TypeAlias = Callable[[], Reading | str]
"""Looks at a GPU: a reading, or why there is none."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a process came to hold on a GPU.

    Attributes:
        loaded_bytes: When its session was open; None where that is not known.
        peak_bytes: The most that was seen then and after each run; None where that is not known.
        note: Where the figures come from, or why there are none.
    """

    loaded_bytes: int | None
    peak_bytes: int | None
    note: str


OF_PROCESS = "what NVML tells of the process"
OF_DEVICE = "what the use of the GPU grew by, for NVML tells nothing of the process: others' growth meanwhile is in it"
NOT_INSTALLED = "nvidia-ml-py is not installed: pip install 'onnxshrink[cuda]'"
UNNUMBERED = "the CUDA driver does not tell which of NVML's GPUs it is"
UNTOLD = "NVML tells neither what the process holds nor what the GPU's total is"
SHRUNK = "NVML tells nothing of the process, and the use of the GPU did not grow: others gave memory back meanwhile"


def device_memory(before: Reading | str, loaded: Reading | str, after_runs: Sequence[Reading | str]) -> DeviceMemory:
    """The figures of a process from what was seen on its way.

    What NVML tells of the process is taken where it had not listed it before: a process that uses no GPU is not listed,
    so that an entry of its number belongs to another, which has that number outside of this container.

    Args:
        before: Before it used the GPU.
        loaded: When its session was open.
        after_runs: After each of its first runs. ONNX Runtime's arena gives nothing back between runs, so what is held
            after them is the most that the arena held in them; what a library took and gave back within one call, as
            TensorRT does where it builds an engine, is not seen.
    """
    then = [loaded, *after_runs]
    readings = [look for look in then if not isinstance(look, str)]
    if isinstance(before, str) or len(readings) < len(then):
        return DeviceMemory(None, None, next(look for look in (before, *then) if isinstance(look, str)))
    own = [reading.own_bytes for reading in readings if reading.own_bytes]
    if before.own_bytes is None and len(own) == len(readings):
        return DeviceMemory(own[0], max(own), OF_PROCESS)
    totals = [reading.device_bytes for reading in readings if reading.device_bytes is not None]
    if before.device_bytes is None or len(totals) < len(readings):
        return DeviceMemory(None, None, UNTOLD)
    grown = [total - before.device_bytes for total in totals]
    return DeviceMemory(grown[0], max(grown), OF_DEVICE) if min(grown) > 0 else DeviceMemory(None, None, SHRUNK)


def own_bytes(processes: Iterable[tuple[int, int | None]], own_id: int) -> int | None:
    """What a process holds, of pairs of process number and bytes; None where it is not listed, or once without."""
    own = [held for number, held in processes if number == own_id]
    known = [held for held in own if held is not None]
    return sum(known) if own and len(known) == len(own) else None


def gpu_look(number: str) -> Look:
    """What looks at a GPU; nothing is raised where that cannot be, but said by every look.

    Args:
        number: As of `gpu_uuid`.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return lambda: NOT_INSTALLED
    if not number:
        return lambda: UNNUMBERED
    try:
        nvml.nvmlInit()
        return partial(_read, nvml, _handle(nvml, number))
    except (nvml.NVMLError, nvml.NVMLLibraryMismatchError) as e:
        reason = f"NVML cannot be asked: {e}"
        return lambda: reason


def gpu_uuid(device_id: int) -> str:
    """What a GPU is called by CUDA and by NVML alike; of a MIG instance its own. Empty where CUDA does not tell.

    Their numbers differ: ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` change CUDA's alone. No context is opened,
    so nothing is held on the GPU for it; but the driver is initialized, and what is timed as a start has that in it.

    Args:
        device_id: CUDA's number.

    Source: CUDA Driver API, Device Management, ``cuDeviceGetUuid_v2``.
    """
    device, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        failed = (
            driver.cuInit(ctypes.c_uint(0))
            or driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(device_id))
            or driver.cuDeviceGetUuid_v2(ctypes.byref(found), device)
        )
    except (AttributeError, OSError):  # a driver older than CUDA 11.4, or none
        return ""
    return "" if failed else str(uuid.UUID(bytes=bytes(found)))


def _handle(nvml: Any, number: str) -> Any:
    """NVML's handle of a GPU, or of a MIG instance."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{number}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{number}")


def _read(nvml: Any, handle: Any) -> Reading:
    total: int | None = None
    listed: Sequence[Any] = ()
    with suppress(nvml.NVMLError):  # not every device, nor every user, is told of processes
        listed = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    with suppress(nvml.NVMLError):  # a GPU that shares the host's memory has no total of its own
        total = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
    return Reading(total, own_bytes(((entry.pid, entry.usedGpuMemory) for entry in listed), os.getpid()))
