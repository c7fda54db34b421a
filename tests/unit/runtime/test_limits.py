"""What a process may use, containers' limits included."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxshrink.runtime.limits import find_limits


def files(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_limits_of_a_container_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2: one and a half cores and 2 GB, of which half is used."""
    files(tmp_path, cpu_dot_max="150000 100000\n", memory_dot_max="2000000000\n", memory_dot_current="1000000000\n")
    files(tmp_path, meminfo="MemTotal: 64000000 kB\nMemAvailable:   32000000 kB\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    found = find_limits(tmp_path / "not" / "there", cgroup=tmp_path, proc=tmp_path)
    assert (found.quota_cores, found.usable_cores, found.threads) == (1.5, 8, 1)
    assert (found.memory_limit_bytes, found.free_memory_bytes) == (2_000_000_000, 1_000_000_000)
    assert found.disk == str(tmp_path)
    assert found.disk_free_bytes > 0


def test_the_older_control_groups_are_read(tmp_path: Path) -> None:
    """Version 1 has other files, and a huge number where there is no limit."""
    root = files(tmp_path / "cpu", cpu_dot_cfs_quota_us="400000", cpu_dot_cfs_period_us="100000").parent
    files(tmp_path / "memory", memory_dot_limit_in_bytes=str(2**63 - 4096))
    found = find_limits(tmp_path, cgroup=root, proc=tmp_path)
    assert found.quota_cores == 4.0
    assert found.memory_limit_bytes is None


@pytest.mark.parametrize("text", ["max 100000\n", "", "nonsense"])
def test_no_limit_is_no_limit(tmp_path: Path, text: str) -> None:
    """`max`, no file and what cannot be read are all without a limit."""
    files(tmp_path, cpu_dot_max=text, memory_dot_max=text)
    found = find_limits(tmp_path, cgroup=tmp_path, proc=tmp_path)
    assert (found.quota_cores, found.memory_limit_bytes, found.free_memory_bytes) == (None, None, None)
    assert found.threads == found.usable_cores
