"""What a process holds on a GPU, from what NVML told: arithmetic and words, which need no GPU."""

from __future__ import annotations

import ctypes
import sys

import pytest

from onnxshrink.core.device_memory import (
    NOT_INSTALLED,
    OF_DEVICE,
    OF_PROCESS,
    SHRUNK,
    UNNUMBERED,
    UNTOLD,
    DeviceMemory,
    Reading,
    device_memory,
    gpu_look,
    gpu_uuid,
    own_bytes,
)

MB = 1 << 20
BEFORE = Reading(1000 * MB, None)


def grown(*totals: int, own: tuple[int | None, ...] = ()) -> list[Reading | str]:
    """What was seen once the session was loaded, and after each run, in MB."""
    figures = own or (None,) * len(totals)
    return [Reading(t * MB, None if o is None else o * MB) for t, o in zip(totals, figures, strict=True)]


def test_what_is_known_of_the_process_goes_before_the_total() -> None:
    """However the total moves: others use the GPU as well."""
    loaded, *runs = grown(1500, 900, 2000, own=(400, 460, 450))
    assert device_memory(BEFORE, loaded, runs) == DeviceMemory(400 * MB, 460 * MB, OF_PROCESS)


def test_without_the_process_it_is_what_the_total_grew_by() -> None:
    """The peak is the most of all that was seen, once loaded too; the note says whose it may be."""
    loaded, *runs = grown(1500, 1420, 1480)
    assert device_memory(BEFORE, loaded, runs) == DeviceMemory(500 * MB, 500 * MB, OF_DEVICE)
    loaded, *runs = grown(1500, 1720, 1620)
    found = device_memory(BEFORE, loaded, runs)
    assert (found.loaded_bytes, found.peak_bytes) == (500 * MB, 720 * MB)
    assert "others' growth meanwhile is in it" in found.note


def test_a_process_that_was_listed_before_it_began_is_another() -> None:
    """Its number is ours in another namespace: what it holds is not what the session holds."""
    loaded, *runs = grown(1500, 1600, own=(9000, 9000))
    found = device_memory(Reading(1000 * MB, 9000 * MB), loaded, runs)
    assert found == DeviceMemory(500 * MB, 600 * MB, OF_DEVICE)


@pytest.mark.parametrize("own", [(400, None), (None, 400), (0, 0)])
def test_a_process_that_is_not_always_told_is_not_mixed_with_the_total(own: tuple[int | None, ...]) -> None:
    """Both figures are of one source."""
    loaded, *runs = grown(1500, 1600, own=own)
    assert device_memory(BEFORE, loaded, runs) == DeviceMemory(500 * MB, 600 * MB, OF_DEVICE)


@pytest.mark.parametrize("totals", [(900, 1600), (1500, 1000)])
def test_a_total_that_did_not_grow_is_no_figure(totals: tuple[int, ...]) -> None:
    """Never a negative one, and none that is nothing: somebody gave memory back."""
    loaded, *runs = grown(*totals)
    assert device_memory(BEFORE, loaded, runs) == DeviceMemory(None, None, SHRUNK)


def test_what_nobody_tells_is_no_figure() -> None:
    """No total and no process; a process alone is enough."""
    blind = Reading(None, None)
    assert device_memory(blind, blind, [blind]) == DeviceMemory(None, None, UNTOLD)
    assert device_memory(BEFORE, blind, [blind]) == DeviceMemory(None, None, UNTOLD)
    assert device_memory(blind, Reading(None, 3), [Reading(None, 4)]) == DeviceMemory(3, 4, OF_PROCESS)


@pytest.mark.parametrize("place", range(3))
def test_the_reason_of_a_look_is_the_reason_of_the_figure(place: int) -> None:
    """Whichever look it was."""
    looks: list[Reading | str] = [BEFORE, *grown(1500, 1600)]
    looks[place] = "the driver is gone"
    assert device_memory(looks[0], looks[1], looks[2:]) == DeviceMemory(None, None, "the driver is gone")


def test_the_entries_of_one_process_are_added() -> None:
    """It may be listed once for each instance of a divided GPU; one entry without a figure leaves none."""
    assert own_bytes([(7, 10), (8, 99), (7, 5)], 7) == 15
    assert own_bytes([(7, 10), (7, None)], 7) is None
    assert own_bytes([(8, 99)], 7) is None
    assert own_bytes([], 7) is None


def test_without_the_package_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra of ours, and no error: the rest of the start is measured all the same."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_look("0")() == NOT_INSTALLED
    assert "onnxshrink[cuda]" in NOT_INSTALLED


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="this machine has a CUDA driver")
def test_without_a_driver_no_gpu_is_named() -> None:
    """And a GPU that is not named cannot be looked at."""
    assert gpu_uuid(0) == ""
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    assert gpu_look("")() == UNNUMBERED
    assert str(gpu_look("00000000-0000-0000-0000-000000000000")()).startswith("NVML cannot be asked: ")
