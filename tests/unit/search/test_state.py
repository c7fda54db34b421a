"""What the search calls its best is what the report selects."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxshrink.config.budget import Budget
from onnxshrink.config.gates import Target
from onnxshrink.core.report import Candidate, Metric
from onnxshrink.search.state import State
from onnxshrink.search.trial import Trial, name_of
from onnxshrink.verify.gates import judge, select

MODEL = st.tuples(st.integers(50, 150), st.sampled_from([-0.02, 0.0, 0.008, 0.012, 0.03, 0.2]), st.booleans())


def trial(number: int, size: int, drop: float, *, noisy: bool) -> Trial:
    """A model whose drop is exact, or known to three points."""
    spread = 0.03 if noisy else 0.0
    metrics = (
        Metric("size_bytes", float(size), "bytes"),
        Metric("accuracy_drop", drop, "ratio", drop - spread, drop + spread, target="cpu"),
        Metric("latency_ratio", 1.0, "ratio", 1.0, 1.0, target="cpu"),
    )
    return Trial(number, {"scheme": "s"}, "evaluated", metrics)


@settings(derandomize=True, deadline=None)
@given(st.lists(MODEL, min_size=1, max_size=8, unique_by=lambda model: model[0]))
def test_the_best_of_a_search_wins(models: list[tuple[int, float, bool]]) -> None:
    """The smallest that keeps the limits as measured; one that keeps them only within noise after it."""
    budget = Budget(max_size=120, max_accuracy_drop=0.01)
    trials = tuple(trial(n, size, drop, noisy=noisy) for n, (size, drop, noisy) in enumerate(models))
    best = State(budget, trials, 0.0).best
    rows = [
        Candidate(name_of(t), "variant", "", "", t.metrics, judge(budget.as_gates, t.metrics, (Target(),)))
        for t in trials
    ]
    assert select(rows, "smallest")[0] == (None if best is None else name_of(best))
    sure = [size for size, drop, _ in models if size <= 120 and drop <= 0.01]
    assume(sure)
    assert best is not None
    assert best.metrics[0].value == min(sure)
