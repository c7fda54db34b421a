"""What the search tries, in which order, and what it does not try."""

from __future__ import annotations

from dataclasses import replace

from search_worlds import World, searched

from onnxshrink.config.budget import Budget
from onnxshrink.search.attempt import Task
from onnxshrink.search.record import objectives
from onnxshrink.search.trial import SCHEME, Trial

SCHEMES = {"fp32": (4.0, 200.0), "fp16": (2.0, 70.0), "static": (1.0, 30.0), "weights_4": (0.5, 15.0)}
DEAR = {"mixed": (1.5, 40.0), "trained_static": (1.0, 50.0)}


def test_a_trunk_that_is_too_large_is_never_made() -> None:
    """Bytes are known before training: of what cannot fit nothing is made, where something does that is good."""
    world = World((10, 20, 30, 90, 100), SCHEMES)
    trials = searched(world, Budget(max_size=2000, max_accuracy_drop=0.2))
    made = {trial.point["width"] for trial in trials if trial.status in ("probed", "evaluated")}
    assert made == {"10", "20", "30"}
    assert {trial.point["width"] for trial in trials if trial.status == "predicted"} == {str(w) for w in world.widths}


def test_the_border_is_found_by_halving() -> None:
    """The smallest trunk that keeps the quality is evaluated after few others."""
    world = World(tuple(range(10, 42)), SCHEMES)
    trials = searched(world, Budget(max_size=1600, max_accuracy_drop=0.06))
    evaluated = [trial for trial in trials if trial.status == "evaluated"]
    good = [trial for trial in evaluated if objectives(trial)[0] <= 1600 and objectives(trial)[1] <= 0.06]
    smallest = min(good, key=objectives)
    before = [trial.point["width"] for trial in evaluated[: evaluated.index(smallest)]]
    assert len(set(before)) <= 8
    assert objectives(smallest)[0] == min(objectives(t)[0] for t in world.all() if objectives(t)[1] <= 0.06)


def test_what_misses_the_limit_by_far_is_not_measured_fully() -> None:
    """A probe far below the limit is enough, where another model is good; one within the margin is looked at."""
    schemes = {"static": (1.0, 30.0), "near": (0.8, 18.5), "weights_4": (0.5, 10.0)}
    trials = searched(World((20,), schemes, labelled=False), Budget(min_sqnr_db=19))
    assert {t.point[SCHEME] for t in trials if t.status == "evaluated"} == {"static", "near"}


HARD = [1.0, 50.0, 2.0, 9.0] * 100
"""Squared errors of samples, some of which are hard for any model."""


def test_what_a_probe_shows_to_be_worse_is_not_measured_fully() -> None:
    """Two thirds of a decibel are enough where two models err alike on the same samples, and one is not where not."""
    alike = {"a": [1e-5 * e for e in HARD], "b": [1.1e-5 * e + 1e-5 * (n % 3) for n, e in enumerate(HARD)]}
    apart = {"a": alike["a"], "b": [1.25e-5 * e for e in (*HARD[2:], *HARD[:2])]}
    for errors, n_evaluated in ((alike, 1), (apart, 2)):
        world = World((20,), {"a": (1.0, 0.0), "b": (1.5, 0.0)}, labelled=False, errors=errors)
        found = searched(world, Budget(max_size=10**6))
        assert [trial.status for trial in found].count("evaluated") == n_evaluated


def test_where_nothing_fits_the_nearest_misses_are_measured() -> None:
    """A limit that nothing keeps is met with models that say what it would cost: in bytes, and in quality."""
    trials = searched(World((20,), SCHEMES, labelled=False), Budget(max_size=350, min_sqnr_db=29))
    assert {"static", "weights_4"} <= {t.point[SCHEME] for t in trials if t.status == "evaluated"}


def test_what_is_dear_waits_for_what_is_cheap() -> None:
    """Schemes that train or search are begun when every trunk of worth has been tried with cheap ones."""
    trials = searched(World((20, 30, 40), SCHEMES | DEAR), Budget(max_size=10**6, max_accuracy_drop=0.2))
    dear = [index for index, trial in enumerate(trials) if trial.point[SCHEME] in DEAR]
    made = {trial.point["width"] for trial in trials[: dear[0]] if trial.status == "evaluated"}
    assert made == {"20", "30", "40"}


def test_no_mixture_where_a_uniform_scheme_does() -> None:
    """A mixture leaves nodes in float, so it is larger: where size counts it is tried only if nothing smaller does."""
    world = World((20,), SCHEMES | DEAR, labelled=False)
    assert "mixed" not in {t.point[SCHEME] for t in searched(world, Budget(min_sqnr_db=29))}
    assert "mixed" in {t.point[SCHEME] for t in searched(world, Budget(min_sqnr_db=29, minimize="accuracy_drop"))}
    assert "mixed" in {t.point[SCHEME] for t in searched(world, Budget(max_size=800, min_sqnr_db=39))}


def test_a_mixture_is_tried_where_only_float_is_good() -> None:
    """It is smaller than that: of all that keep the limit it is found to be the smallest."""
    world, budget = World((20,), SCHEMES | DEAR, labelled=False), Budget(min_sqnr_db=35)
    good = [t for t in searched(world, budget) if t.status == "evaluated" and objectives(t)[1] <= -35]
    assert {"fp16", "mixed"} <= {t.point[SCHEME] for t in good}


def test_workers_begin_different_trunks() -> None:
    """With two workers two trunks are trained at a time, and no trunk twice."""
    world = World((20, 30, 40), SCHEMES)
    one, two = (searched(world, Budget(max_size=10**6), width=width) for width in (1, 2))
    assert {(str(t.point), t.status) for t in one} == {(str(t.point), t.status) for t in two}


class Rounded(World):
    """Widths above 25 leave the same channels: their models are equal byte for byte."""

    def answer(self, task: Task) -> Trial:
        """Of the network that there really is."""
        width = min(int(task.point["width"]), 30)
        trial = super().answer(replace(task, point={**task.point, "width": str(width)}))
        made = task.depth != "predict"
        return replace(trial, point=task.point, digest=f"{width} {task.point[SCHEME]}" if made else None)


def test_a_trunk_that_turns_out_to_be_another_one_is_left_alone() -> None:
    """One model of it tells; nothing of it is measured fully, and the front is the same."""
    trials = searched(Rounded((10, 20, 30, 40, 50), SCHEMES), Budget(max_size=10**6, max_accuracy_drop=0.2))
    equal = [trial for trial in trials if trial.point["width"] in ("30", "40", "50")]
    kept = {trial.point["width"] for trial in equal if trial.status == "evaluated"}
    assert len(kept) == 1
    for width in {"30", "40", "50"} - kept:
        assert [trial.status for trial in equal if trial.point["width"] == width].count("probed") <= 1
    best = Rounded((10, 20, 30), SCHEMES).all()
    assert {objectives(trial) for trial in trials if trial.status == "evaluated"} <= {objectives(t) for t in best}
