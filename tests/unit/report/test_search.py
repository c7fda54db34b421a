"""What a search shows while it works, and what it prints at its end."""

from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console

from onnxshrink.config.budget import Budget
from onnxshrink.core.report import Metric
from onnxshrink.report.search import LiveSearch, PlainSearch, print_search
from onnxshrink.search.attempt import Task
from onnxshrink.search.state import State
from onnxshrink.search.trial import Status, Trial

WIDTH, RATIO = "model.args.width", "stages[1].pruning_ratio"
BUDGET = Budget.model_validate({"max_size": "10 kB", "max_accuracy_drop": 0.01, "time_limit": "4 min"})


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        """The time, in seconds."""
        return self.now


def trial(number: int, scheme: str, size: float, drop: float, status: Status = "evaluated") -> Trial:
    """A trial of the network of width 16 whose drop is exact."""
    metrics = (
        Metric("size_bytes", size, "bytes"),
        Metric("accuracy_drop", drop, "ratio", drop, drop, target="cpu"),
        Metric("sqnr_db", 22.14, "dB", target="cpu", output="y"),
    )
    point = {WIDTH: "16", RATIO: "0.35", "scheme": scheme}
    return Trial(number, point, status, metrics, digest=f"{number}", seconds=3.0)


FOUND = (
    trial(0, "fp32", 40_000, 0.0),
    trial(1, "static_per_tensor", 30_000, 0.01, "probed"),
    trial(2, "static_per_tensor_compact", 9_400, 0.004),
    trial(3, "weights_4", 7_900, 0.2),
)
STATE = State(BUDGET, FOUND, 20.0, n_points=60, at_work=(Task(4, {**FOUND[0].point, "scheme": "mixed"}, "probe"),))


def panel(state: State, *, color: bool, width: int = 80) -> str:
    """What a terminal shows at the end."""
    text = io.StringIO()
    console = Console(
        file=text, width=width, force_terminal=True, color_system="standard" if color else None, legacy_windows=False
    )
    live = LiveSearch(console, Clock())
    live.watch(state)
    console.print(*live._above())  # what rich's own thread draws
    return text.getvalue()


def test_the_panel_fits_80_columns_and_tells_the_front_the_best_and_the_time_left() -> None:
    """Of every model on the front: its size, its quality, what it is and what it breaks; the best is marked."""
    lines = panel(STATE, color=False).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[-1] for line in lines[4::2]] == ["weights_4", "static_per_tensor_compact", "fp32"]
    text = " ".join(panel(STATE, color=False, width=120).split())
    assert "4 of 60 models tried (3 fully), about 56 to go, 3:40 min left" in text
    assert "probing width 16, pruning_ratio 0.35, mixed" in text
    assert "7.9 kB +20.0 22.1 width 16, pruning_ratio 0.35, weights_4" in text
    assert "▸ 9.4 kB +0.4 22.1" in text
    assert "\x1b" not in text
    assert text.count("breaks max_size") == 1
    assert text.count("breaks max_accuracy_drop") == 1


def test_what_noise_hides_is_not_called_kept() -> None:
    """A drop below its limit whose interval is not: neither the panel nor a log claims that the limit is kept."""
    size, _, sqnr = FOUND[2].metrics
    noisy = replace(FOUND[2], metrics=(size, Metric("accuracy_drop", 0.004, "ratio", -0.01, 0.02, target="cpu"), sqnr))
    state = replace(STATE, trials=(noisy,))
    assert "inconclusive: max_accuracy_drop" in " ".join(panel(state, color=False, width=120).split())
    text = io.StringIO()
    plain = PlainSearch(Console(file=text, width=200), Clock())
    plain.watch(replace(state, trials=()))
    plain.watch(state)
    assert "22.1 dB, inconclusive: max_accuracy_drop" in text.getvalue()
    assert "keeps every limit" not in text.getvalue().replace("none keeps every limit", "")


def test_colour_changes_no_character_of_the_panel() -> None:
    """Whoever sees no colour reads the same."""
    bare = re.sub(r"\x1b\[[0-9;]*m", "", panel(STATE, color=True))
    assert bare == panel(STATE, color=False)


def test_before_the_first_model_and_without_one_that_fits_the_panel_says_so() -> None:
    """No table without a front; no mark where nothing keeps every limit."""
    lines = panel(replace(STATE, trials=()), color=False).splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("0 of 60 models predicted, none made yet, 3:40 min left")
    text = panel(replace(STATE, trials=FOUND[:2]), color=False)
    assert "no model keeps every limit yet" in text
    assert "▸" not in text


def test_models_to_go_are_what_the_time_allows_at_the_pace_so_far() -> None:
    """An estimate: 12 s for four models, and 40 s left."""
    slow = replace(STATE, seconds=200.0)
    assert slow.n_left == 14
    assert replace(slow, n_points=10).n_left == 6
    assert replace(slow, trials=()).n_left == 60


def test_a_log_has_a_line_for_each_model_measured_and_one_now_and_then_for_the_whole() -> None:
    """A second search says that it goes on, and does not repeat what was known."""
    text, clock = io.StringIO(), Clock()
    plain = PlainSearch(Console(file=text, width=40), clock)
    plain.watch(replace(STATE, trials=FOUND[:2]))
    clock.now = 1.0
    plain.watch(replace(STATE, trials=FOUND[:3]))
    clock.now = 6.0
    plain.watch(replace(STATE, trials=(*FOUND, replace(FOUND[0], number=4, status="failed", reason="no such kernel"))))
    plain.finished("export", 1.0, cached=True)
    now, best = "probing width 16, pruning_ratio 0.35, mixed", "9.4 kB, drop +0.4 pt, 22.1 dB, keeps every limit"
    here, compact = "width 16, pruning_ratio 0.35", "static_per_tensor_compact"
    assert text.getvalue().splitlines() == [
        "search goes on from 2 trials that are known",
        f"2 of 60 models tried (1 fully), about 58 to go, 3:40 min left; none keeps every limit yet; {now}",
        f"trial 2: {here}, {compact}: {best}",
        f"trial 3: {here}, weights_4: 7.9 kB, drop +20.0 pt, 22.1 dB, breaks max_accuracy_drop",
        f"trial 4: {here}, fp32 could not be made: no such kernel",
        f"4 of 60 models tried (3 fully), about 56 to go, 3:40 min left; best {here}, {compact}: {best}; {now}",
    ]


def test_the_summary_says_what_each_name_stands_for() -> None:
    """The names of the report, each with its trunk; the winner marked; what the others break."""

    def row(one: Trial, name: str, limits: dict[str, str]) -> dict[str, object]:
        return {
            "number": one.number,
            "point": one.point,
            "status": one.status,
            "metrics": [{"name": m.name, "value": m.value, "unit": m.unit} for m in one.metrics],
            "name": name,
            "limits": limits,
            "new_in_a_later_version": 1,
        }

    document = {
        "n_points": 60,
        "counts": {"evaluated": 3, "probed": 1, "predicted": 50, "failed": 0},
        "winner": 2,
        "front": [3, 2],
        "finalists": [2, 0],
        "trials": [
            row(FOUND[0], "fp32-0", {"max_size": "failed"}),
            row(FOUND[2], "static_per_tensor_compact-2", {"max_size": "passed"}),
            row(FOUND[3], "weights_4-3", {"max_accuracy_drop": "failed"}),
        ],
    }
    text = io.StringIO()
    print_search(document, Console(file=text, width=110))
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert "tried 54 of 60 models: 3 measured fully, 1 on 32 samples at most, 50 by their bytes alone" in lines[1]
    assert lines[3] == "7.9 kB +20.0 22.1 weights_4-3: width 16, pruning_ratio 0.35 breaks max_accuracy_drop"
    assert lines[4] == "▸ 9.4 kB +0.4 22.1 static_per_tensor_compact-2: width 16, pruning_ratio 0.35"
    assert lines[5] == "40.0 kB +0.0 22.1 fp32-0: width 16, pruning_ratio 0.35 breaks max_size"
