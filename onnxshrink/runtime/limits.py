"""What this process may use of the machine: cores, memory and disk, with the limits that containers set.

Source: Linux, admin-guide/cgroup-v2 (``cpu.max``, ``memory.max``, ``memory.current``) and cgroup-v1
(``cpu.cfs_quota_us``, ``memory.limit_in_bytes``); proc_meminfo(5), ``MemAvailable``.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 where there is no limit


@dataclass(frozen=True, slots=True)
class Limits:
    """Cores, memory and disk.

    Attributes:
        cores: Of the machine.
        usable_cores: That this process may run on.
        quota_cores: Cores' worth of time that a container grants, or None without a limit.
        load: Processes that wanted to run in the last minute, or None where the system does not tell.
        memory_bytes: Of the machine.
        free_memory_bytes: What could be had now without swapping, or None where the system does not tell.
        memory_limit_bytes: What a container grants, or None without a limit.
        disk_free_bytes: On the disk where the store would lie.
        disk: The folder that was asked about.
    """

    cores: int
    usable_cores: int
    quota_cores: float | None
    load: float | None
    memory_bytes: int
    free_memory_bytes: int | None
    memory_limit_bytes: int | None
    disk_free_bytes: int
    disk: str

    @property
    def threads(self) -> int:
        """Threads that can really run at once."""
        return max(1, min(self.usable_cores, int(self.quota_cores or self.usable_cores)))


def find_limits(store: Path, *, cgroup: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> Limits:
    """Look at what the system says now.

    Args:
        store: Where the store lies or would lie; it need not be there.
        cgroup: Root of the control groups' file system.
        proc: Root of the process file system.
    """
    store = store.absolute()
    disk = next(path for path in (store, *store.parents) if path.exists())
    limit = _memory_limit(cgroup)
    free = _free_memory(proc)
    if limit is not None and free is not None:
        used = _number(cgroup / "memory.current") or _number(cgroup / "memory" / "memory.usage_in_bytes") or 0
        free = min(free, max(0, limit - used))
    return Limits(
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        quota_cores=_quota(cgroup),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        free_memory_bytes=free,
        memory_limit_bytes=limit,
        disk_free_bytes=shutil.disk_usage(disk).free,
        disk=str(disk),
    )


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time: quota by period."""
    words = _text(cgroup / "cpu.max").split()
    if len(words) == 2 and words[0].isdecimal():
        return int(words[0]) / int(words[1])
    quota, period = (_number(cgroup / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota / period if quota and period and quota > 0 else None


def _memory_limit(cgroup: Path) -> int | None:
    limit = _number(cgroup / "memory.max") or _number(cgroup / "memory" / "memory.limit_in_bytes")
    return limit if limit and limit < _UNLIMITED else None


def _free_memory(proc: Path) -> int | None:
    rows = _text(proc / "meminfo").splitlines()
    return next((1024 * int(row.split()[1]) for row in rows if row.startswith("MemAvailable:")), None)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):  # not this system, or not ours to read
        return ""
