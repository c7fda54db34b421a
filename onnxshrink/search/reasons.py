"""Why each trial is not on the front, or was looked at no closer: the policy's own grounds, in words."""

from __future__ import annotations

from collections.abc import Iterator

from onnxshrink.search.attempt import PROBE_SAMPLES
from onnxshrink.search.constraints import misses
from onnxshrink.search.known import SIZES, Known
from onnxshrink.search.pareto import dominates
from onnxshrink.search.record import objectives
from onnxshrink.search.space import Space
from onnxshrink.search.state import State
from onnxshrink.search.trial import Trial, describe, key_of, name_of, trunk_of
from onnxshrink.search.wording import breaks
from onnxshrink.search.worth import beaten_by, is_hopeless


def reasons(space: Space, state: State) -> Iterator[tuple[int, str]]:
    """The number of each trial that needs one, and its reason; also which limits a trial on the front breaks.

    Args:
        space: Where the trials lie.
        state: What was found.
    """
    trunks = {key_of(trunk_of(trial.point)): trunk_of(trial.point) for trial in state.trials}
    known = Known(space, state.budget, list(trunks.values()), state.trials)
    deepest = {key_of(trial.point): trial for trial in state.deepest}
    on_front = {trial.number for trial in state.front}
    for trial in state.trials:
        deeper = deepest[key_of(trial.point)]
        if deeper.number != trial.number:
            yield trial.number, f"looked at more closely as trial {deeper.number}"
        elif trial.status == "evaluated":
            too_much = "; ".join(map(breaks, misses(state.budget, trial, timed=False)))
            better = "" if trial.number in on_front else _better(state, trial)
            if reason := "; ".join(filter(None, (better, too_much))):
                yield trial.number, reason
        elif trial.status != "failed":
            yield trial.number, _why_no_closer(known, trial)


def _better(state: State, trial: Trial) -> str:
    mine = objectives(trial)
    other = next(t for t in state.front if objectives(t) == mine or dominates(objectives(t), mine))
    return f"{name_of(other)} is no larger and as good"


def _why_no_closer(known: Known, trial: Trial) -> str:
    """Why a model was not made, or not measured on all samples."""
    copy = known.copies.get(key_of(trunk_of(trial.point)))
    if copy is not None:
        return f"its network is that of {describe(trunk_of(copy.point))}, byte for byte"
    missed = misses(known.budget, trial, timed=False)
    too_large = [breaks(miss) for miss in missed if miss.limit in SIZES]
    if trial.status == "predicted":
        if too_large and known.has_good and not known.may_fit(trunk_of(trial.point)):
            return too_large[0]
        return "; ".join(["the search ended before it was made", *too_large])
    if known.has_good and too_large:
        return too_large[0]
    if known.has_good and is_hopeless(known, trial):
        return f"on {PROBE_SAMPLES} samples at most, " + "; ".join(
            breaks(miss) for miss in missed if miss.limit not in SIZES
        )
    if (other := beaten_by(known, trial)) is not None:
        near = f"{describe(other.point)} is no larger and as near to the reference"
        return f"on {PROBE_SAMPLES} samples at most, {near}"
    return "the search ended before it was measured fully"
