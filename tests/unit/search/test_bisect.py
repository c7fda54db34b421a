"""The search: every monotone pattern of up to 64 steps, within the bound that is promised."""

from __future__ import annotations

import math

import pytest

from onnxshrink.search.bisect import bisect


@pytest.mark.parametrize("n_steps", range(1, 65))
def test_the_first_broken_step_is_found_within_the_bound(n_steps: int) -> None:
    """Whichever step breaks, it is named after at most ceil(log2 n) + 1 checks, each of another step."""
    for breaks in range(n_steps):
        asked: list[int] = []

        def is_broken(step: int, breaks: int = breaks, asked: list[int] = asked) -> bool:
            asked.append(step)
            return step >= breaks

        found = bisect(n_steps, is_broken)
        assert found.first == breaks
        assert len(asked) == len(set(asked)) == len(found.checked) <= math.ceil(math.log2(n_steps)) + 1
        assert list(found.checked) == asked


def test_some_pattern_needs_every_check_of_the_bound() -> None:
    """The bound is not loose: for each number of steps one pattern takes as many checks."""
    for n_steps in range(1, 65):
        most = max(len(bisect(n_steps, lambda step, at=at: step >= at).checked) for at in range(n_steps))
        assert most == math.ceil(math.log2(n_steps)) + 1


@pytest.mark.parametrize("n_steps", [1, 2, 13, 64])
def test_nothing_broken_takes_one_check(n_steps: int) -> None:
    """The last step is looked at first, and if it is whole no other is."""
    found = bisect(n_steps, lambda _: False)
    assert found.first is None
    assert found.checked == {n_steps - 1: False}
    assert found.unseen == tuple(range(n_steps - 1))


def test_the_steps_that_were_not_looked_at_are_named() -> None:
    """A step that breaks and is mended later is not seen, and stands among the unseen."""
    found = bisect(8, lambda step: step in {1, 6, 7})
    assert found.first == 6
    assert 1 in found.unseen
    assert set(found.unseen).isdisjoint(found.checked)
