"""What the trials of a search have shown so far, asked by trunk: the point without its scheme."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from onnxshrink.config.budget import Budget
from onnxshrink.core.report import Outcome
from onnxshrink.search.constraints import judge
from onnxshrink.search.space import Option, Space
from onnxshrink.search.trial import SCHEME, Point, Trial, key_of, size_of, trunk_of
from onnxshrink.verify.gates import at_points

SIZES = frozenset({"max_size", "max_compressed_size"})
"""Limits of bytes: of them a prediction tells, before any training."""


@dataclass(frozen=True)
class Known:
    """What the trials have shown.

    Attributes:
        space: Where they lie.
        budget: What they are for.
        trunks: Every trunk that the search may come to.
        trials: In the order in which they were begun; a point has one for each depth it was tried at.
        width: How many tasks to begin at a time, where each is dear.
    """

    space: Space
    budget: Budget
    trunks: Sequence[Point]
    trials: Sequence[Trial]
    width: int = 1

    @cached_property
    def _by_trunk(self) -> dict[str, dict[tuple[str, str], Trial]]:
        found: dict[str, dict[tuple[str, str], Trial]] = defaultdict(dict)
        for trial in self.trials:
            found[key_of(trunk_of(trial.point))][trial.point[SCHEME], trial.status] = trial
        return found

    @cached_property
    def _outcomes(self) -> dict[int, dict[str, Outcome]]:
        return {id(trial): judge(self.budget, trial, timed=False) for trial in self.trials}

    @cached_property
    def _points(self) -> dict[int, dict[str, Outcome]]:
        exact = ((trial, replace(trial, metrics=at_points(trial.metrics))) for trial in self.trials)
        return {id(trial): judge(self.budget, point, timed=False) for trial, point in exact}

    @cached_property
    def cheap(self) -> tuple[Option, ...]:
        """The schemes that neither train nor search, the cheapest to try first."""
        return tuple(option for option in self.schemes if not is_dear(option))

    @property
    def schemes(self) -> tuple[Option, ...]:
        """The options of the last dimension."""
        return self.space.dimensions[-1].options

    @cached_property
    def copies(self) -> dict[str, Trial]:
        """The trunks that gave, byte for byte, a model of another one, by `key_of`; and that model's first trial.

        Different ratios may leave the same channels; what is known of the first such trunk holds for all.
        """
        first: dict[tuple[str, str], Trial] = {}
        found: dict[str, Trial] = {}
        for trial in self.trials:
            if trial.digest is None:
                continue
            earlier = first.setdefault((trial.point[SCHEME], trial.digest), trial)
            if trunk_of(earlier.point) != trunk_of(trial.point):
                found.setdefault(key_of(trunk_of(trial.point)), earlier)
        return found

    def without_copies(self) -> Known:
        """The same, of trunks that differ."""
        return replace(self, trunks=[trunk for trunk in self.trunks if key_of(trunk) not in self.copies])

    def find(self, point: Point, *statuses: str) -> Trial | None:
        """The trial of a point with the first of these statuses that it has."""
        mine, label = self._by_trunk.get(key_of(trunk_of(point)), {}), point[SCHEME]
        return next((mine[label, status] for status in statuses if (label, status) in mine), None)

    def of(self, trunk: Point, *statuses: str) -> list[Trial]:
        """The trials of a trunk's points, each with the first of these statuses that it has."""
        mine = self._by_trunk.get(key_of(trunk), {})
        found = (
            next((mine[option.label, status] for status in statuses if (option.label, status) in mine), None)
            for option in self.schemes
        )
        return [trial for trial in found if trial is not None]

    def smallest(self, trunk: Point) -> Trial | None:
        """A trunk's smallest model, as far as bytes are known; None where nothing is."""
        sized = [trial for trial in self.of(trunk, "evaluated", "probed", "predicted") if size_of(trial) < math.inf]
        return min(sized, key=size_of, default=None)

    def size(self, trunk: Point) -> float:
        """Bytes of a trunk's smallest model; infinite where nothing is known."""
        smallest = self.smallest(trunk)
        return math.inf if smallest is None else size_of(smallest)

    def may_fit(self, trunk: Point) -> bool:
        """False if even a trunk's smallest model is too large."""
        smallest = self.smallest(trunk)
        return smallest is None or self.fits(smallest)

    def is_begun(self, trunk: Point) -> bool:
        """True if one of a trunk's models was made."""
        return bool(self.of(trunk, "probed", "evaluated"))

    def keeps(self, trial: Trial) -> bool:
        """True if a trial breaks no limit but those of bytes and of the clock.

        Limits are held against what was measured: that it may keep them within its noise makes no search stop.
        """
        return all(out != "failed" for name, out in self._points[id(trial)].items() if name not in SIZES)

    def fits(self, trial: Trial) -> bool:
        """True if a trial keeps the limits of bytes."""
        return all(out == "passed" for name, out in self._outcomes[id(trial)].items() if name in SIZES)

    def good(self, trunk: Point) -> list[Trial]:
        """The evaluated models of a trunk that keep every limit that no clock decides."""
        return [trial for trial in self.of(trunk, "evaluated") if self.keeps(trial) and self.fits(trial)]

    @cached_property
    def has_good(self) -> bool:
        """True if one of all models keeps every limit that no clock decides."""
        return any(self.good(trunk) for trunk in self.trunks)


def at(trunk: Point, option: Option) -> Point:
    """The point of a trunk with a scheme."""
    return {**trunk, SCHEME: option.label}


def is_dear(option: Option) -> bool:
    """True for schemes that train, or search themselves."""
    return option.simulate or is_mixture(option)


def is_mixture(option: Option) -> bool:
    """True for schemes that choose node by node what is quantized."""
    return any(stage["kind"] == "quantize_mixed" for stage in option.tail or ())


def is_static(option: Option) -> bool:
    """True for schemes that quantize weights and activations of every node alike."""
    return any(stage["kind"] == "quantize_static" for stage in option.tail or ()) and not option.simulate
