"""Which of many steps was the first to break something, in as few checks as can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bisection:
    """What a search has seen.

    Attributes:
        n_steps: Steps there were.
        checked: Each step that was checked, in that order, and whether it was broken.
        first: A broken step whose predecessor is not broken, or None where the last step is not broken.
    """

    n_steps: int
    checked: dict[int, bool]
    first: int | None

    @property
    def unseen(self) -> tuple[int, ...]:
        """Steps before `first` (before the last, where nothing is broken) that were not checked.

        What breaks at one of them and is mended again before `first` has not been seen.
        """
        end = self.n_steps if self.first is None else self.first
        return tuple(step for step in range(end) if step not in self.checked)


def bisect(n_steps: int, is_broken: Callable[[int], bool]) -> Bisection:
    """Find the first broken step in at most ``ceil(log2(n_steps)) + 1`` checks: the last step, then halves.

    Before the first step nothing is broken. Where every step behind a broken one is broken too, the step found is the
    first. Where some are not, it is one of those that are broken while their predecessor is not: of the two, each that
    is a step was checked.

    Args:
        n_steps: Number of steps, at least 1.
        is_broken: Checks the step of an index; it is asked once a step.
    """
    checked: dict[int, bool] = {}

    def check(step: int) -> bool:
        checked[step] = is_broken(step)
        return checked[step]

    kept, broken = -1, n_steps - 1
    if not check(broken):
        return Bisection(n_steps, checked, None)
    while broken - kept > 1:
        middle = (kept + broken) // 2
        if check(middle):
            broken = middle
        else:
            kept = middle
    return Bisection(n_steps, checked, broken)
