"""What to try next: a pure function of the space, the budget and what is known, so that a search can be repeated.

A *trunk* is a point without its scheme: what must be trained, where anything is. Trunks are dear and schemes cheap, so:

```
predict the bytes of every trunk, untrained ─▶ choose a trunk ─▶ probe its schemes ─▶ evaluate those worth it
                                                    ▲                                     │
                                                    └──────── while trunks are left ──────┘
```

The first trunk is the largest that fits. Then the choice closes in, by size, on the border between the smallest that
keeps the quality and the largest that does not; what remains of the time goes to the trunks nearest to the best one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from onnxshrink.config.budget import Budget
from onnxshrink.search.attempt import Depth, Task
from onnxshrink.search.constraints import judge
from onnxshrink.search.pareto import Objectives, dominates
from onnxshrink.search.space import Option, Space
from onnxshrink.search.trial import SCHEME, Point, Trial, key_of, size_of

_SIZES = {"max_size", "max_compressed_size"}
_INTEGER_COST = 0.5
"""Time of a multiply-accumulate in integers relative to float: it only orders models that no clock has seen."""

_MARGIN_DB = 1.0
"""So much worse a probe must be than another that all samples are not worth it: it sees only a few of them."""

_Wish: TypeAlias = tuple[Point, Depth]


@dataclass(frozen=True)
class Known:
    """What the trials have shown.

    Attributes:
        space: Where they lie.
        budget: What they are for.
        trunks: Every trunk that the search may come to.
        trials: In the order in which they were begun; a point has one for each depth it was tried at.
        width: How many trunks to begin at a time.
    """

    space: Space
    budget: Budget
    trunks: Sequence[Point]
    trials: Sequence[Trial]
    width: int = 1

    @cached_property
    def _by_key(self) -> dict[tuple[str, str], Trial]:
        return {(key_of(trial.point), trial.status): trial for trial in self.trials}

    @property
    def schemes(self) -> tuple[Option, ...]:
        """The options of the last dimension, the cheapest to try first."""
        return self.space.dimensions[-1].options

    def find(self, point: Point, *statuses: str) -> Trial | None:
        """The trial of a point with the first of these statuses that it has."""
        key = key_of(point)
        return next((self._by_key[key, status] for status in statuses if (key, status) in self._by_key), None)

    def of(self, trunk: Point, *statuses: str) -> list[Trial]:
        """The trials of a trunk's points, each with the first of these statuses that it has."""
        found = (self.find(at(trunk, option), *statuses) for option in self.schemes)
        return [trial for trial in found if trial is not None]

    def size(self, trunk: Point) -> float:
        """Bytes of a trunk's smallest model, as far as they are known; infinite where nothing is."""
        return min(map(size_of, self.of(trunk, "evaluated", "probed", "predicted")), default=math.inf)

    def keeps(self, trial: Trial) -> bool:
        """True if a trial breaks no limit but those of size and of the clock, as far as its noise lets one say."""
        outcomes = judge(self.budget, trial, timed=False)
        return all(outcome != "failed" for name, outcome in outcomes.items() if name not in _SIZES)

    def fits(self, trial: Trial) -> bool:
        """True if a trial keeps the limits of size."""
        outcomes = judge(self.budget, trial, timed=False)
        return all(outcome == "passed" for name, outcome in outcomes.items() if name in _SIZES)

    def is_good(self, trunk: Point) -> bool:
        """True if one of a trunk's models keeps every limit that no clock decides."""
        return any(self.keeps(trial) and self.fits(trial) for trial in self.of(trunk, "evaluated"))


def at(trunk: Point, option: Option) -> Point:
    """The point of a trunk with a scheme."""
    return {**trunk, SCHEME: option.label}


def propose(known: Known) -> list[Task]:
    """The next tasks, which may run side by side; none when nothing is left to try."""
    number = len(known.trials)
    wishes = next((wishes for step in (_predictions, _goal, _rest) if (wishes := list(step(known)))), [])
    return [Task(number + index, point, depth) for index, (point, depth) in enumerate(wishes)]


def _predictions(known: Known) -> Iterator[_Wish]:
    """Bytes of one trunk in every scheme, then of every trunk in the scheme that was smallest."""
    if len(known.trunks) == 1:
        return
    middle = known.trunks[len(known.trunks) // 2]
    quick = [option for option in known.schemes if not is_dear(option)]
    missing = [option for option in quick if known.find(at(middle, option), "predicted", "failed") is None]
    yield from ((at(middle, option), "predict") for option in missing)
    sizes = known.of(middle, "predicted")
    if missing or not sizes:
        return
    smallest = min(sizes, key=size_of).point[SCHEME]
    for trunk in known.trunks:
        point = {**trunk, SCHEME: smallest}
        if known.find(point, "predicted", "failed") is None:
            yield point, "predict"


def _goal(known: Known) -> Iterator[_Wish]:
    """Close in on the smallest trunk that keeps the quality, or on the quality of the largest that fits."""
    begun = [trunk for trunk in known.trunks if known.of(trunk, "probed", "evaluated")]
    wishes = [wish for trunk in begun for wish in _of_trunk(known, trunk, dear=False)]
    yield from wishes  # a trunk that was begun is finished first
    chosen: list[Point] = []
    while not wishes and len(chosen) < known.width and (trunk := _next_trunk(known, chosen)) is not None:
        chosen.append(trunk)
    for trunk in chosen:
        yield from _of_trunk(known, trunk, dear=False)


def _next_trunk(known: Known, chosen: Sequence[Point]) -> Point | None:
    """The trunk between the border's two sides, in the middle of the ratio of their sizes; None where it is closed."""
    free = [t for t in known.trunks if t not in chosen and not _is_tried(known, t)]
    able = [t for t in free if math.isfinite(known.size(t)) or _only(known)]
    limit = known.budget.max_size or math.inf
    good = [known.size(t) for t in known.trunks if known.is_good(t)]
    bad = [known.size(t) for t in known.trunks if known.of(t, "evaluated") and not known.is_good(t)]
    if not good:
        inside = [t for t in able if known.size(t) <= limit]
        if inside and len([size for size in bad if size <= limit]) < 3:
            return max(inside, key=known.size)
        keeping = any(known.keeps(trial) for t in known.trunks for trial in known.of(t, "evaluated"))
        outside = [t for t in able if known.size(t) > limit]
        # What comes nearest above: wanted to say which limit to relax.
        return min(outside, key=known.size) if outside and not keeping else None
    if known.budget.minimize == "accuracy_drop":
        return None
    top = min(good)
    bottom = max((size for size in bad if size < top), default=0.0)
    between = [t for t in able if bottom < known.size(t) < top]
    if not between:
        return None
    middle = math.sqrt(top * max(bottom, min(map(known.size, between))))
    return min(between, key=lambda t: abs(math.log(known.size(t) / middle)))


def _rest(known: Known) -> Iterator[_Wish]:
    """What is left: the dear schemes of the trunks that were tried, then other trunks, those near the best first."""
    best = min((known.size(t) for t in known.trunks if known.is_good(t)), default=known.budget.max_size or math.inf)

    def distance(trunk: Point) -> float:
        size = known.size(trunk)
        return abs(math.log(size / best)) if math.isfinite(size) and 0 < best < math.inf else size

    n_begun = 0
    for trunk in sorted(known.trunks, key=lambda t: (not _is_tried(known, t), distance(t))):
        wishes = list(_of_trunk(known, trunk, dear=True))
        yield from wishes
        n_begun += bool(wishes)
        if n_begun == known.width:
            return


def _of_trunk(known: Known, trunk: Point, *, dear: bool) -> Iterator[_Wish]:
    """What is left to do on a trunk: probe its schemes, then evaluate those that no other beats."""
    options = [option for option in known.schemes if dear or not is_dear(option)]
    unseen = [option for option in options if not known.find(at(trunk, option), "probed", "evaluated", "failed")]
    if unseen and len(known.trunks) > 1 and not known.of(trunk, "probed", "evaluated"):
        yield at(trunk, unseen[0]), "probe"  # trains; the others find it in the store
    elif unseen:
        yield from ((at(trunk, option), "probe") for option in unseen)
    else:
        yield from ((trial.point, "evaluate") for trial in worthy(known, trunk))


def worthy(known: Known, trunk: Point) -> list[Trial]:
    """The probed trials of a trunk that all samples are worth: none beats them in size, drift and likely time.

    With limits of size, of those that break them only the smallest is kept: it can tell what the quality would cost.
    """
    probes = known.of(trunk, "probed")
    if known.budget.limits.keys() & _SIZES:
        outside = sorted((trial for trial in probes if not known.fits(trial)), key=size_of)
        probes = [trial for trial in probes if known.fits(trial)] or outside[:1]
    left = [trial for trial in probes if known.find(trial.point, "evaluated") is None]
    return [trial for trial in left if not any(_beats(other, trial) for other in probes if other is not trial)]


def _beats(better: Trial, other: Trial) -> bool:
    mine, theirs = _likely(better), _likely(other)
    if mine[1] > theirs[1] - _MARGIN_DB and mine[1] != theirs[1]:
        return False
    return dominates(mine, theirs) or (mine == theirs and better.number < other.number)


def _likely(trial: Trial) -> Objectives:
    """Bytes, drift and likely time of a probed trial, all to be small."""
    sqnr, macs, coverage = (trial.worst(name) for name in ("sqnr_db", "macs", "integer_coverage"))
    drift = -math.inf if sqnr is None or sqnr.value is None else -sqnr.value
    share = (coverage.value or 0.0) if coverage else 0.0
    time = ((macs.value or 0.0) if macs else 0.0) * (1 - share * (1 - _INTEGER_COST))
    return size_of(trial), drift, time


def is_dear(option: Option) -> bool:
    """True for schemes that train, or search themselves."""
    return option.simulate or any(stage["kind"] == "quantize_mixed" for stage in option.tail or ())


def _is_tried(known: Known, trunk: Point) -> bool:
    return bool(known.of(trunk, "probed", "evaluated", "failed"))


def _only(known: Known) -> bool:
    return len(known.trunks) == 1
