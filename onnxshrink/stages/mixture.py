"""The search for the fastest mixture that is near enough: a multiple-choice knapsack, by gain for time.

It starts from the fastest single scheme, gives groups the schemes that take most noise away for the time they take
(Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27, 1979), and takes back what turns
out not to be needed. Gains do not add up, so each step is measured and kept only if it helps. Last the mixture has to
beat every single scheme that reaches the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxshrink.config.stages import NodeScheme, QuantizeMixed
from onnxshrink.core.errors import ModelError
from onnxshrink.core.report import finite
from onnxshrink.stages.context import Context
from onnxshrink.stages.sensitivity import Mixture, Sensitivity, Trials, measure_sensitivity

_NEGLIGIBLE_GAIN = 1e-3
_CLEAR_SAVING = 2e-3
"""A smaller share of the float model's time is within what a profile is wrong by."""
_SLACK = 1.1
"""A step is measured although the sum of the gains predicts up to this much too much noise."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the search came to.

    Attributes:
        mixture: What each group becomes.
        base: The single scheme that it differs least from, or is.
        decision: Why this and no other, in a sentence.
        is_given: There was no choice, and nothing was measured.
        base_db: SQNR of the outputs of the single scheme ``base``.
        time_ratio: Time over that of the float model, measured in pairs, with its interval.
        singles: Each scheme alone.
        table: What each group's change does.
    """

    mixture: Mixture
    base: NodeScheme
    decision: str
    is_given: bool = False
    base_db: float = math.nan
    time_ratio: Sequence[float] = ()
    singles: Mapping[str, Any] = field(default_factory=dict)
    table: tuple[Sensitivity, ...] = ()


@dataclass(frozen=True, slots=True)
class Single:
    """One scheme wherever it can be.

    Attributes:
        scheme: The scheme.
        mixture: What each group becomes.
        noise: Error power over signal power.
        time_ratio: Time over that of the float model, with its interval.
    """

    scheme: NodeScheme
    mixture: Mixture
    noise: float
    time_ratio: tuple[float, float, float]


def find_mixture(trials: Trials, settings: QuantizeMixed, ctx: Context) -> Found:
    """The fastest mixture within the limits that reaches the drift, or the nearest one if none does.

    Args:
        trials: Measures mixtures.
        settings: The drift to reach, and the schemes there are.
        ctx: The run.

    Raises:
        ModelError: No scheme gives a model that runs.
    """
    if len(settings.schemes) == 1 or not trials.groups:
        only = settings.schemes[0]
        return Found(trials.single(only), only, "there was no choice", is_given=True)
    target = 10 ** (-settings.min_sqnr_db / 10)
    singles = measure_singles(trials, settings)
    base = min(singles, key=lambda one: (max(0.0, trials.float_ratio(one.mixture) - trials.limit), one.time_ratio[0]))
    table = measure_sensitivity(trials, base.mixture, base.time_ratio[0], ctx)
    mixture = climb(trials, base.mixture, table, target)
    if trials.trial(mixture).noise <= target:
        mixture = save_time(trials, base.mixture, mixture, table, target)
    mixture, decision = settle(trials, mixture, singles, target)
    chosen = next((one for one in singles if one.mixture == mixture), None)
    origin = chosen or base
    return Found(
        mixture,
        origin.scheme,
        decision,
        base_db=trials.trial(origin.mixture).sqnr_db,
        time_ratio=chosen.time_ratio if chosen else trials.ratio(trials.single("float"), mixture),
        singles={
            one.scheme: {
                "sqnr_db": finite(trials.trial(one.mixture).sqnr_db),
                "time_ratio": list(one.time_ratio),
                "float_ratio": trials.float_ratio(one.mixture),
            }
            for one in singles
        },
        table=table,
    )


def measure_singles(trials: Trials, settings: QuantizeMixed) -> list[Single]:
    """Each scheme alone, but for those that no node can take or that cannot run.

    Raises:
        ModelError: None is left.
    """
    in_float = trials.single("float")
    found: list[Single] = []
    for scheme in settings.schemes:
        mixture = trials.single(scheme)
        if scheme != "float" and mixture == in_float:
            continue
        noise = trials.trial(mixture).noise
        if noise == math.inf and not trials.trial(mixture).kernels:
            continue
        ratio = (1.0, 1.0, 1.0) if mixture == in_float else trials.ratio(in_float, mixture)
        found.append(Single(scheme, mixture, noise, ratio))
    if not found:
        raise ModelError(
            f"the model runs with none of the schemes: {', '.join(settings.schemes)}",
            where=trials.plan.step,
            fix="let `schemes` hold float as well, or name the nodes at fault in exclude_nodes",
        )
    return found


def climb(trials: Trials, base: Mixture, table: Sequence[Sensitivity], target: float) -> Mixture:
    """Change one group after the other, the most worthwhile first, each only if the outputs get nearer by it.

    Args:
        trials: Measures mixtures.
        base: Where to start.
        table: What each group's change does, the most worthwhile first.
        target: Noise to come down to.
    """
    mixture, noise = base, trials.trial(base).noise
    gains: dict[int, float] = {}
    for one in table:
        if noise <= target:
            break
        if one.gain <= max(_NEGLIGIBLE_GAIN, gains.get(one.place, 0.0)):
            continue
        tried = _with(mixture, one.place, one.scheme)
        if trials.float_ratio(tried) > max(trials.limit, trials.float_ratio(base)) + 1e-9:
            continue
        reached = trials.trial(tried).noise
        if reached < noise:
            mixture, noise = tried, reached
            gains[one.place] = one.gain
    return mixture


def save_time(trials: Trials, base: Mixture, mixture: Mixture, table: Sequence[Sensitivity], target: float) -> Mixture:
    """Change groups to what takes less time, the largest saving first, as long as the drift stays reached.

    Args:
        trials: Measures mixtures.
        base: Where the search started.
        mixture: Reaches the target.
        table: What each group's change does to the base.
        target: Noise to stay below.
    """
    whole = trials.trial(base).noise
    effects = {(one.place, one.scheme): one for one in table}
    for place, scheme, saving, added in sorted(_savings(base, mixture, effects), key=lambda row: -row[2]):
        tried = _with(mixture, place, scheme)
        predicted = trials.trial(mixture).noise + added * whole
        if saving < _CLEAR_SAVING or predicted > _SLACK * target or not trials.allows(tried):
            continue
        if trials.trial(tried).noise <= target:
            mixture = tried
    return mixture


def _savings(
    base: Mixture, mixture: Mixture, effects: Mapping[tuple[int, NodeScheme], Sensitivity]
) -> Iterator[tuple[int, NodeScheme, float, float]]:
    """Place, scheme, share of the float model's time saved, share of the base's noise added; for every other choice."""
    for place, (was, now) in enumerate(zip(base, mixture, strict=True)):
        spent, gained = _effect(effects, place, now, was)
        for scheme in sorted({was, *(scheme for where, scheme in effects if where == place)} - {now}):
            time_ratio, gain = _effect(effects, place, scheme, was)
            yield place, scheme, spent - time_ratio, gained - gain


def _effect(
    effects: Mapping[tuple[int, NodeScheme], Sensitivity], place: int, scheme: NodeScheme, base: NodeScheme
) -> tuple[float, float]:
    if scheme == base:
        return 0.0, 0.0
    one = effects[place, scheme]
    return one.time_ratio, one.gain


def settle(trials: Trials, mixture: Mixture, singles: Sequence[Single], target: float) -> tuple[Mixture, str]:
    """The mixture, or a single scheme if that is no worse; and why.

    Args:
        trials: Measures mixtures.
        mixture: What the search found.
        singles: Each scheme alone.
        target: Noise to stay below.
    """
    same = next((one.scheme for one in singles if one.mixture == mixture), None)
    enough = [one for one in singles if one.noise <= target and trials.allows(one.mixture)]
    rival = min(enough, key=lambda one: one.time_ratio[0], default=None)
    noise = trials.trial(mixture).noise
    if noise > target:
        if rival:
            return rival.mixture, f"{rival.scheme} alone reaches the drift, no mixture does within the limit"
        allowed = [one for one in singles if trials.allows(one.mixture) and one.noise <= noise]
        nearest = min(allowed, key=lambda one: one.noise, default=None)
        if nearest and nearest.mixture != mixture:
            return nearest.mixture, f"{nearest.scheme} alone is nearest"
        return mixture, f"{same} alone is nearest" if same else "the mixture is nearest"
    if rival is None or rival.mixture == mixture:
        return mixture, f"{same} alone is fastest" if same else "no single scheme reaches the drift"
    ratio, lo, hi = trials.ratio(rival.mixture, mixture)
    measured = f"{ratio:.3f} ({lo:.3f} to {hi:.3f}) of its time"
    if hi < 1:
        return mixture, f"{rival.scheme} alone reaches the drift as well; the mixture takes {measured}"
    return rival.mixture, f"{rival.scheme} alone reaches the drift; the mixture takes {measured}"


def _with(mixture: Mixture, place: int, scheme: NodeScheme) -> Mixture:
    return (*mixture[:place], scheme, *mixture[place + 1 :])
