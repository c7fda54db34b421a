"""Which models are worth their cost: what a probe rules out, and how much the front may gain at most by the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

from onnxshrink.core.intervals import ratio_margin_db
from onnxshrink.search.constraints import judge
from onnxshrink.search.known import SIZES, Known
from onnxshrink.search.pareto import Objectives, dominates, front, hypervolume
from onnxshrink.search.record import drift_db, objectives
from onnxshrink.search.trial import Point, Trial, size_of, trunk_of

MARGIN_DB = 1.0
"""So much worse than a limit a probe must be to be ruled out, for it sees only a few samples; and than another probe
where nothing is known of each sample."""

_INTEGER_COST = 0.5
"""Time of a multiply-accumulate in integers relative to float: it only orders models that no clock has seen."""

_TIMES = frozenset({"max_latency_ratio", "max_latency_ms"})
_EXACT_DB = 100.0
"""Nearer to the reference than this is as near as can be."""

_STEP = 1e-3
"""Between the worst quality shown and the corner that hypervolumes are measured from."""

Gain: TypeAlias = Callable[[float, float | None], float]
"""What the front may gain by a model of some bytes and quality."""


def unbeaten(known: Known, trunk: Point, *, inside: bool) -> list[Trial]:
    """The probes of a trunk's models that no other of them beats.

    Args:
        known: What is known.
        trunk: The trunk; drift of its models is against one reference, so their probes can be compared.
        inside: Look only at those that fit.
    """
    probes = _compared(known, trunk, inside=inside)
    return [probe for probe, _ in probes if _better(probe, probes) is None]


def beaten_by(known: Known, probe: Trial) -> Trial | None:
    """The probe of the same trunk that makes this one not worth all samples; None where there is none."""
    probes = _compared(known, trunk_of(probe.point), inside=known.fits(probe))
    return _better(probe, probes)


def _compared(known: Known, trunk: Point, *, inside: bool) -> list[tuple[Trial, Objectives]]:
    probes = (probe for probe in known.of(trunk, "probed") if not inside or known.fits(probe))
    return [(probe, likely_of(known, probe)) for probe in probes]


def _better(probe: Trial, probes: Sequence[tuple[Trial, Objectives]]) -> Trial | None:
    mine = next(likely for other, likely in probes if other is probe)
    return next((other for other, theirs in probes if _beats(other, theirs, probe, mine)), None)


def _beats(better: Trial, theirs: Objectives, probe: Trial, mine: Objectives) -> bool:
    """True if one probe is no larger, no slower and nearer by more than chance; of equal ones, the first."""
    if theirs == mine:
        return better.number < probe.number
    return dominates(theirs, mine) and theirs[1] <= mine[1] - _chance_db(better, probe)


def _chance_db(one: Trial, other: Trial) -> float:
    """How much of the difference between two probes may be chance: both saw the same samples, and so few of them."""
    if one.errors == other.errors and drift_of(one) == drift_of(other):
        return 0.0
    margin = _margin(one.errors, other.errors) if len(one.errors) == len(other.errors) else math.inf
    return margin if math.isfinite(margin) else MARGIN_DB


_margin = lru_cache(maxsize=1 << 16)(ratio_margin_db)
"""A search asks for the same pairs over and over."""


def is_hopeless(known: Known, probe: Trial) -> bool:
    """True if a probe breaks a limit of quality by more than its few samples can be wrong."""
    outcomes = judge(known.budget, probe, timed=False)
    broken = {name for name, outcome in outcomes.items() if outcome == "failed"} - SIZES
    sqnr, limit = probe.worst("sqnr_db"), known.budget.min_sqnr_db
    if sqnr is not None and sqnr.value is not None and limit is not None and sqnr.value >= limit - MARGIN_DB:
        broken.discard("min_sqnr_db")
    return bool(broken)


def likely_of(known: Known, probe: Trial) -> Objectives:
    """Bytes and drift of a probed model, and its likely time where the budget asks for it, all to be small."""
    drift = drift_of(probe)
    if known.budget.minimize != "latency" and not known.budget.limits.keys() & _TIMES:
        return size_of(probe), drift
    return size_of(probe), drift, time_of(probe)


def drift_of(trial: Trial) -> float:
    """The worst drift in dB below the signal, to be small."""
    return max(-_EXACT_DB, drift_db(trial))


def time_of(trial: Trial) -> float:
    """Multiply-accumulates, those in integers counted less."""
    macs, coverage = trial.worst("macs"), trial.worst("integer_coverage")
    share = (coverage.value or 0.0) if coverage else 0.0
    return ((macs.value or 0.0) if macs else 0.0) * (1 - share * (1 - _INTEGER_COST))


def gains(known: Known) -> Gain:
    """How much a model may at most add to the front of bytes and quality.

    Returns:
        A function of its bytes, or what they are likely to be, and its quality, to be small, at best: None where
        nothing is known but its bytes; then it is as good as the best model that is no smaller, for larger ones are
        seldom worse. It gives the hypervolume over the logarithm of bytes and quality; infinite before anything was
        measured.

    Source: the expected improvement of Emmerich et al., "Single- and multiobjective evolutionary optimization assisted
        by Gaussian random field metamodels", 2006, with the best in place of what is expected.
    """
    measured = [objectives(trial) for trial in known.trials if trial.status == "evaluated"]
    shown = [(math.log2(size), max(-_EXACT_DB, quality)) for size, quality in measured if 0 < size < math.inf]
    if not shown:
        return lambda _size, _quality: math.inf
    best = [shown[index] for index in front(shown)]
    sizes = [size_of(trial) for trial in known.trials]
    corner = (
        math.log2(max(size for size in sizes if size < math.inf)) + 1,
        max(quality for _, quality in shown) + _STEP,
    )
    volume = hypervolume(best, corner)

    def gain(size: float, quality: float | None) -> float:
        if not 0 < size < math.inf:
            return 0.0
        at = math.log2(size)
        if quality is None:
            quality = min([other for bytes_, other in best if bytes_ >= at] or [other for _, other in best])
        return hypervolume([*best, (at, max(-_EXACT_DB, quality))], corner) - volume

    return gain
