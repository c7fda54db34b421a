"""Worlds that a search can be tried in without a model: every point has bytes, drift and accuracy by arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnxshrink.config.budget import Budget
from onnxshrink.core.report import Metric
from onnxshrink.search.attempt import PROBE_SAMPLES, Task
from onnxshrink.search.known import Known
from onnxshrink.search.policy import propose
from onnxshrink.search.space import Dimension, Option, Space
from onnxshrink.search.trial import SCHEME, Point, Status, Trial, key_of, trunk_of

_STATUS: Mapping[str, Status] = {"predict": "predicted", "probe": "probed", "evaluate": "evaluated"}
_TAILS = {"static": ({"kind": "quantize_static"},), "mixed": ({"kind": "quantize_mixed"},)}


@dataclass
class World:
    """Answers tasks, and counts them.

    Attributes:
        widths: One trunk for each; bytes grow with it, and accuracy.
        schemes: Name to the bytes of a weight and the drift in dB.
        failing: Points that cannot be made, by `key_of`.
        noise: Of a probe, in dB.
        errors: Name of a scheme to the squared error of each sample, of which a probe sees the first few; its drift
            follows from them.
        labelled: Whether accuracy is measured.
    """

    widths: tuple[int, ...]
    schemes: Mapping[str, tuple[float, float]]
    failing: frozenset[str] = frozenset()
    noise: float = 0.0
    labelled: bool = True
    errors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def space(self) -> Space:
        """The space of its points."""
        trunks = (
            [Dimension("width", tuple(Option(str(width)) for width in self.widths))] if len(self.widths) > 1 else []
        )
        options = tuple(
            Option(name, tail=_TAILS.get(name, ()), simulate=name.startswith("trained")) for name in self.schemes
        )
        return Space({}, (*trunks, Dimension(SCHEME, options)))

    def answer(self, task: Task) -> Trial:
        """What `attempt` would find."""
        key = key_of(task.point)
        self.asked[key, task.depth] += 1
        if key in self.failing:
            return Trial(task.number, task.point, "failed", reason="cannot be made")
        width = int(task.point.get("width", self.widths[0]))
        share, drift = self.schemes[task.point[SCHEME]]
        errors = tuple(self.errors.get(task.point[SCHEME], ()))
        errors = errors[:PROBE_SAMPLES] if task.depth == "probe" else errors
        drift = -10 * math.log10(math.fsum(errors) / len(errors)) if errors else drift
        metrics = [Metric("size_bytes", 100 + share * width**2, "bytes")]
        if task.depth != "predict":
            shake = self.noise * math.sin(sum(map(ord, key))) if task.depth == "probe" else 0.0
            metrics.append(Metric("sqnr_db", drift + shake, "dB", output="y"))
        if task.depth != "predict" and self.labelled:
            drop = 1 / width + 10 ** (-drift / 20)
            spread = 0.2 if task.depth == "probe" else 0.0
            metrics.append(Metric("accuracy_drop", drop, "ratio", drop - spread, drop + spread))
        seen = errors if task.depth == "probe" else ()
        return Trial(task.number, task.point, _STATUS[task.depth], tuple(metrics), errors=seen)

    def all(self) -> list[Trial]:
        """Every point, measured fully; this is not counted."""
        other = World(self.widths, self.schemes, self.failing, self.noise, self.labelled, self.errors)
        found = [other.answer(Task(n, point, "evaluate")) for n, point in enumerate(self.space.points())]
        return [trial for trial in found if trial.status == "evaluated"]


def searched(world: World, budget: Budget, *, width: int = 1, most: int = 10_000) -> list[Trial]:
    """The trials of a whole search, in order."""
    space = world.space
    trunks: dict[str, Point] = {key_of(trunk): trunk for trunk in map(trunk_of, space.points())}
    trials: list[Trial] = []
    while tasks := propose(Known(space, budget, list(trunks.values()), trials, width)):
        trials += [world.answer(task) for task in tasks]
        if len(trials) > most:
            raise AssertionError("the search does not end")
    return trials
