"""What to try next: a pure function of the space, the budget and what is known, so that a search can be repeated.

A *trunk* is a point without its scheme: what must be trained, where anything is. Trunks are dear and schemes cheap, so:

```
predict the bytes of every trunk, untrained ─▶ choose a trunk ─▶ probe its schemes ─▶ evaluate the best of them
                                                    ▲                                     │
                                                    └──────── until the goal is met ──────┘
then, the most that the front may gain first: other models of these trunks, other trunks, schemes that train or search
```

The first trunk is the largest that fits. Then the choice closes in, by size, on the border between the smallest that
keeps the quality and the largest that does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from onnxshrink.search.attempt import Depth, Task
from onnxshrink.search.known import Known, at, is_dear, is_mixture, is_static
from onnxshrink.search.record import objectives
from onnxshrink.search.space import Option
from onnxshrink.search.trial import SCHEME, Point, Trial, size_of
from onnxshrink.search.worth import Gain, drift_of, gains, is_hopeless, time_of, unbeaten

__all__ = ["Known", "propose"]

_PATIENCE = 3
"""So many of the largest trunks must miss the quality before none is expected to keep it: training is noisy."""

_STRIDE = 0.7
"""So much smaller the next of them is: a smaller trunk may fit in a form that is larger and nearer to the reference."""

_Wish: TypeAlias = tuple[Point, Depth]


def propose(known: Known) -> list[Task]:
    """The next tasks, which may run side by side; none when nothing is left to try."""
    number = 1 + max((trial.number for trial in known.trials), default=-1)
    known = known.without_copies()
    wishes = next((wishes for step in (_predictions, _goal, _rest) if (wishes := list(step(known)))), [])
    return [Task(number + index, point, depth) for index, (point, depth) in enumerate(wishes)]


def _predictions(known: Known) -> Iterator[_Wish]:
    """Bytes of one trunk in every scheme, then of every trunk in the scheme that was smallest."""
    if len(known.trunks) == 1:
        return
    middle = known.trunks[len(known.trunks) // 2]
    unknown = [at(middle, option) for option in known.cheap if not _is_sized(known, at(middle, option))]
    yield from ((point, "predict") for point in unknown)
    sizes = known.of(middle, "predicted", "probed", "evaluated")
    if unknown or not sizes:
        return
    smallest = min(sizes, key=size_of).point[SCHEME]
    for trunk in known.trunks:
        point = {**trunk, SCHEME: smallest}
        if not _is_sized(known, point):
            yield point, "predict"


def _is_sized(known: Known, point: Point) -> bool:
    return known.find(point, "predicted", "probed", "evaluated", "failed") is not None


def _goal(known: Known) -> Iterator[_Wish]:
    """Close in on the smallest trunk that keeps the quality; what was begun is finished first."""
    usual = _usual(known)
    wishes = [wish for trunk in known.trunks if known.is_begun(trunk) for wish in _of_trunk(known, trunk, usual)]
    yield from wishes
    chosen: list[Point] = []
    while not wishes and len(chosen) < known.width and (trunk := _next_trunk(known, chosen)) is not None:
        chosen.append(trunk)
    for trunk in chosen:
        yield from _of_trunk(known, trunk, usual)


def _of_trunk(known: Known, trunk: Point, usual: Sequence[Option]) -> Iterator[_Wish]:
    """What the goal needs of a trunk: probes of the schemes that may be best, then a look at the best of them."""
    unseen = _unseen(known, trunk, usual)
    if unseen and len(known.trunks) > 1 and not known.is_begun(trunk):
        yield unseen[0], "probe"  # trains; the others find it in the store
    elif unseen:
        yield from ((point, "probe") for point in unseen)
    else:
        yield from ((trial.point, "evaluate") for trial in _best_left(known, trunk))


def _unseen(known: Known, trunk: Point, options: Sequence[Option]) -> list[Point]:
    points = (at(trunk, option) for option in options)
    return [point for point in points if not known.find(point, "probed", "evaluated", "failed")]


def _usual(known: Known) -> Sequence[Option]:
    """The cheap schemes that were not beaten on every trunk that has probes of all; all of them, where none has."""
    complete = [trunk for trunk in known.trunks if not _unseen(known, trunk, known.cheap)]
    tried = {probe.point[SCHEME] for trunk in complete for probe in unbeaten(known, trunk, inside=False)}
    return [option for option in known.cheap if option.label in tried] or known.cheap


def _front_of(known: Known, trunk: Point) -> list[Trial]:
    """The probes of a trunk that no other beats: of those that fit, where any does."""
    return unbeaten(known, trunk, inside=True) or unbeaten(known, trunk, inside=False)


def _best_left(known: Known, trunk: Point) -> list[Trial]:
    """The next models of a trunk to measure fully: the best by the goal, unless the nearest of them is not good."""
    candidates = [probe for probe in _front_of(known, trunk) if not is_hopeless(known, probe)]
    good = {trial.point[SCHEME] for trial in known.good(trunk)}
    best = min((_rank(known, probe) for probe in candidates if probe.point[SCHEME] in good), default=math.inf)
    left = [probe for probe in candidates if _is_left(known, probe) and _rank(known, probe) < best]
    left.sort(key=lambda probe: (_rank(known, probe), probe.number))
    if not left or good or not known.of(trunk, "evaluated"):
        return left[: known.width]
    nearest = min(candidates, key=lambda probe: (drift_of(probe), probe.number))
    if _is_left(known, nearest):
        return [nearest]
    seen = known.find(nearest.point, "evaluated")
    return left[: known.width] if seen is not None and known.keeps(seen) else []


def _is_left(known: Known, probe: Trial) -> bool:
    return known.find(probe.point, "evaluated", "failed") is None


def _rank(known: Known, probe: Trial) -> float:
    """What the budget wants small, as far as a probe tells."""
    match known.budget.minimize:
        case "size":
            return size_of(probe)
        case "latency":
            return time_of(probe)
        case "accuracy_drop":
            return drift_of(probe)


def _next_trunk(known: Known, chosen: Sequence[Point]) -> Point | None:
    """The next trunk to begin on the way to the goal; None where the border is closed.

    First the largest that fit. Where they miss the quality, the border is sought among all, for what it would cost.
    """
    free = [trunk for trunk in known.trunks if trunk not in chosen and not known.is_begun(trunk)]
    if len(known.trunks) == 1:
        return free[0] if free else None
    free = [trunk for trunk in free if known.smallest(trunk) is not None]
    seen = [trunk for trunk in known.trunks if known.of(trunk, "evaluated")]
    good = [trunk for trunk in seen if known.good(trunk)]
    if known.has_good:
        return None if known.budget.minimize == "accuracy_drop" else _between(known, free, good, seen)
    for inside in (True, False):
        keeping = [] if inside else [trunk for trunk in seen if any(map(known.keeps, known.of(trunk, "evaluated")))]
        if keeping:
            return _between(known, free, keeping, seen)
        able = [trunk for trunk in free if known.may_fit(trunk) == inside]
        missing = [known.size(trunk) for trunk in seen if known.may_fit(trunk) == inside]
        if able and len(missing) < _PATIENCE:
            below = [trunk for trunk in able if known.size(trunk) <= _STRIDE * min(missing, default=math.inf)]
            return max(below or able, key=known.size)
    return None


def _between(known: Known, free: Sequence[Point], keeping: Sequence[Point], seen: Sequence[Point]) -> Point | None:
    """The trunk between the border's two sides that is nearest to the middle of the ratio of their sizes."""
    top = min(map(known.size, keeping))
    bottom = max((known.size(trunk) for trunk in seen if trunk not in keeping and known.size(trunk) < top), default=0.0)
    between = [trunk for trunk in free if bottom < known.size(trunk) < top]
    if not between:
        return None
    middle = math.sqrt(top * max(bottom, min(map(known.size, between))))
    return min(between, key=lambda trunk: abs(math.log(known.size(trunk) / middle)))


def _rest(known: Known) -> Iterator[_Wish]:
    """What the front may gain most by; what it can gain nothing by comes last, and what is dear after its like."""
    gain, usual = gains(known), _usual(known)
    offers = [offer for trunk in known.trunks for offer in _offers(known, trunk, usual, gain)]
    offers.sort(key=lambda offer: (offer[0] <= 0, offer[1], -offer[0]))
    yield from (wish for _, _, wish in offers[: known.width])


def _offers(known: Known, trunk: Point, usual: Sequence[Option], gain: Gain) -> Iterator[tuple[float, bool, _Wish]]:
    """All that can be done on a trunk: what it may gain, whether it is dear, and the task."""
    if known.has_good and not known.may_fit(trunk):
        return
    unseen = _unseen(known, trunk, usual)
    if unseen and not known.is_begun(trunk):
        yield gain(known.size(trunk), None), False, (unseen[0], "probe")
        return
    best = min((objectives(trial)[1] for trial in known.of(trunk, "evaluated")), default=None)
    for probe in unbeaten(known, trunk, inside=known.has_good):
        if _is_left(known, probe) and not (known.has_good and is_hopeless(known, probe)):
            quality = objectives(probe)[1] if probe.worst("accuracy_drop") is None else best
            yield gain(size_of(probe), quality), False, (probe.point, "evaluate")
    yield from ((0.0, False, (point, "probe")) for point in _unseen(known, trunk, known.cheap))
    for option in known.schemes:
        if is_dear(option) and _unseen(known, trunk, [option]) and not _is_needless(known, trunk, option):
            yield gain(known.size(trunk), best), True, (at(trunk, option), "probe")


def _is_needless(known: Known, trunk: Point, option: Option) -> bool:
    """True for a mixture, where size counts and a model is good that leaves nothing in float: a mixture is larger.

    A good one that is smaller does as well; where only float itself is good, a mixture may be the smallest of all.
    """
    if not is_mixture(option) or known.budget.minimize != "size":
        return False
    static = {option.label for option in known.cheap if is_static(option)}
    whole = [size_of(trial) for trial in known.of(trunk, "probed", "evaluated") if trial.point[SCHEME] in static]
    return any(size_of(trial) <= max(whole, default=0.0) for trial in known.good(trunk))
