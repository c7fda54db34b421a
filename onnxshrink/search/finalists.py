"""Which models of a search are measured by the clock, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from onnxshrink.core.errors import ConfigError
from onnxshrink.search.constraints import nearest
from onnxshrink.search.pareto import front
from onnxshrink.search.record import objectives
from onnxshrink.search.state import State
from onnxshrink.search.trial import Trial
from onnxshrink.search.worth import time_of
from onnxshrink.verify.gates import TIMED

N_FINALISTS = 6
"""So many are measured at a time."""


def first_finalists(state: State) -> tuple[Trial, ...]:
    """What is measured first: the front within the limits, or what is likely to be fast where that is wanted.

    Where nothing is within the limits, the nearest miss of each, and the smallest model there is.

    Raises:
        ConfigError: The time was too short for a single model.
    """
    if not state.evaluated:
        raise ConfigError(
            "the search ended before a single model was measured",
            where="budget.time_limit",
            got=f"{state.budget.time_limit:g} s",
            fix="allow more time; what was tried is kept",
        )
    if not state.keeping:
        near = nearest(state.budget, state.evaluated, timed=False).values()
        return _ordered(list(_distinct([*near, *state.front[: 1 if near else 2]]))[:N_FINALISTS])
    if state.budget.minimize == "latency":
        return _ordered(list(_distinct(_by_time(state)))[: 2 * N_FINALISTS])
    points = [objectives(trial) for trial in state.keeping]
    best = sorted((state.keeping[index] for index in front(points)), key=state.rank)
    return _ordered(list(_distinct(best))[:N_FINALISTS])


def further_finalists(state: State, timed: Sequence[Trial]) -> tuple[Trial, ...]:
    """What is measured next where the clock lets none of ``timed`` pass: what is likely to be the fastest of the rest.

    At last what breaks one other limit, to say how far that is to be relaxed. Nothing where no limit is the clock's.
    """
    if not state.keeping or not state.budget.limits.keys() & TIMED:
        return ()
    rest = list(_distinct(_by_time(state), timed))
    if not rest:
        near = nearest(state.budget, state.evaluated, timed=False)
        rest = list(_distinct(near.values(), timed))
    return _ordered(rest[:N_FINALISTS])


def _by_time(state: State) -> list[Trial]:
    return sorted(state.keeping, key=lambda trial: (time_of(trial), *state.rank(trial)))


def _distinct(trials: Iterable[Trial], seen: Sequence[Trial] = ()) -> Iterator[Trial]:
    """The trials whose models, byte for byte, no other has."""
    digests = {trial.digest for trial in seen}
    for trial in trials:
        if trial.digest not in digests:
            digests.add(trial.digest)
            yield trial


def _ordered(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    return tuple(sorted(trials, key=lambda trial: trial.number))
