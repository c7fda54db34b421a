"""What a search leaves: every trial with its reason, the front, the best over time, and what to relax."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onnxshrink.config.budget import Budget
from onnxshrink.core.errors import StoreError
from onnxshrink.core.report import Candidate, Metric, Report
from onnxshrink.core.run_folder import SEARCH_FILE, SEARCH_TABLE, publish
from onnxshrink.search.document import conclude, read_search
from onnxshrink.search.finalists import first_finalists
from onnxshrink.search.space import Dimension, Option, Space
from onnxshrink.search.state import State
from onnxshrink.search.trial import Status, Trial, name_of, trial_of

SCHEMES = ("fp32", "fp16", "static", "weights_8", "weights_4")
SPACE = Space(
    {},
    (
        Dimension("model.args.width", (Option("8"), Option("16"))),
        Dimension("scheme", tuple(Option(name, tail=()) for name in SCHEMES)),
    ),
)
BUDGET = Budget.model_validate({"max_size": "10 kB", "max_accuracy_drop": 0.01})


def trial(number: int, scheme: str, status: Status, size: int, drop: float = 0.0, *, width: int = 16) -> Trial:
    """A trial whose drop is exact; its drift is worse the smaller it is."""
    metrics = (
        Metric("size_bytes", float(size), "bytes"),
        Metric("compressed_bytes", size / 2, "bytes"),
        Metric("accuracy_drop", drop, "ratio", drop, drop, target="cpu"),
        Metric("sqnr_db", size / 1000, "dB", target="cpu", output="y"),
        Metric("sqnr_db", size / 1000 + 1, "dB", target="cpu", output="z"),
    )
    known = metrics[:2] if status == "predicted" else metrics
    return Trial(number, {"model.args.width": str(width), "scheme": scheme}, status, known, seconds=2.0)


TRIALS = (
    trial(0, "static", "predicted", 9_000),
    trial(1, "static", "predicted", 30_000, width=8),
    trial(2, "fp32", "probed", 40_000),
    trial(3, "static", "probed", 9_000),
    trial(4, "weights_8", "probed", 9_500),
    trial(5, "weights_4", "probed", 7_000),
    trial(6, "fp16", "evaluated", 20_000, 0.001),
    trial(7, "static", "evaluated", 9_000, 0.002),
    trial(8, "weights_8", "evaluated", 9_500, 0.004),
    trial(9, "weights_4", "evaluated", 7_000, 0.2),
)
STATE = State(BUDGET, TRIALS, 21.0, n_points=10)


def report_of(state: State, *finalists: int, winner: int | None, ratio: float = 0.8) -> Report:
    """The report of a run of these trials, with their latency."""
    trials = {one.number: one for one in state.trials}
    rows = tuple(
        Candidate(
            name_of(trials[number]),
            "variant",
            f"variants/{name_of(trials[number])}/model.onnx",
            "1",
            (*trials[number].metrics, Metric("latency_ratio", ratio, "ratio", ratio, ratio, target="cpu")),
        )
        for number in finalists
    )
    name = None if winner is None else name_of(trials[winner])
    return Report("small", {}, rows, (), name, "selected by its gates", {}, {}, 1.0)


def left(state: State, report: Report) -> tuple[Report, dict[str, Any], list[dict[str, str]]]:
    """The report as it is published, and both files read again."""
    report, texts = conclude(SPACE, state, report)
    return report, json.loads(texts[SEARCH_FILE]), list(csv.DictReader(io.StringIO(texts[SEARCH_TABLE])))


def test_every_trial_has_its_reason_and_the_finalists_their_latency() -> None:
    """Why it was not looked at more closely, why it is not on the front, which limit it breaks and by how much."""
    _, document, _ = left(STATE, report_of(STATE, 7, winner=7))
    reasons = [row["reason"] for row in document["trials"]]
    assert reasons == [
        "looked at more closely as trial 7",
        "30 kB breaks max_size 10 kB by 20 kB",
        "40 kB breaks max_size 10 kB by 30 kB",
        "looked at more closely as trial 7",
        "looked at more closely as trial 8",
        "looked at more closely as trial 9",
        "20 kB breaks max_size 10 kB by 10 kB",
        None,
        "static-7 is no larger and as good",
        "0.2 breaks max_accuracy_drop 0.01 by 0.19",
    ]
    assert [row["number"] for row in document["trials"] if row["number"] in document["front"]] == [6, 7, 9]
    known = {m.name for m in trial_of(document["trials"][7]).metrics}
    assert "latency_ratio" in known
    assert document["trials"][7]["limits"] == {"max_size": "passed", "max_accuracy_drop": "passed"}
    assert (document["winner"], document["best"], document["finalists"]) == (7, 7, [7])
    assert document["counts"] == {"evaluated": 4, "failed": 0, "probed": 1, "predicted": 1}


def reasons_of(state: State) -> list[str | None]:
    """Of each trial."""
    return [row["reason"] for row in left(state, report_of(state, 7, winner=7))[1]["trials"]]


def test_a_probe_that_was_ruled_out_says_what_ruled_it_out() -> None:
    """The limit that it breaks, the model that beats it, or the network that it is; nothing of a search that ended."""
    good = trial(7, "static", "evaluated", 9_000, 0.002)
    beaten = trial(2, "fp16", "probed", 9_600)
    sqnr = [m for m in beaten.metrics if m.name != "sqnr_db"]
    beaten = replace(beaten, metrics=(*sqnr, Metric("sqnr_db", 5.0, "dB", target="cpu", output="y")))
    trials = (
        trial(0, "static", "probed", 9_000),
        trial(1, "weights_4", "probed", 7_000, 0.3),
        beaten,
        replace(trial(3, "fp32", "probed", 9_700), digest="d"),
        trial(4, "weights_8", "predicted", 9_900),
        replace(trial(5, "fp32", "probed", 9_700, width=8), digest="d"),
        good,
    )
    assert reasons_of(replace(STATE, trials=trials)) == [
        "looked at more closely as trial 7",
        "on 32 samples at most, 0.3 breaks max_accuracy_drop 0.01 by 0.29",
        "on 32 samples at most, width 16, static is no larger and as near to the reference",
        "the search ended before it was measured fully",
        "the search ended before it was made",
        "its network is that of width 16, byte for byte",
        None,
    ]


def test_where_nothing_fits_the_smallest_there_is_and_what_it_loses_are_told() -> None:
    """The most accurate that fits does not exist; what would be lost at the smallest size does, and is timed."""
    state = replace(STATE, budget=Budget.model_validate({"max_size": "1 kB", "max_accuracy_drop": 0.01}))
    report, _, _ = left(state, report_of(state, 7, winner=None))
    assert report.selection == (
        "no model found keeps every limit; relax max_size to 9 kB: static-7 (width 16) keeps the rest; "
        "nothing found fits max_size 1 kB: the smallest found is weights_4-9 (width 16) with 7 kB, accuracy drop 0.2"
    )
    n_evaluated = len(state.evaluated)
    whole, _, _ = left(replace(state, n_points=n_evaluated), report_of(state, 7, winner=None))
    assert whole.selection == report.selection.replace(" found", "")
    cut, document, _ = left(replace(state, is_whole=False), report_of(state, 7, winner=None))
    assert cut.selection == report.selection + (
        "; the search ended before all was tried: with more time or trials it goes on"
    )
    assert document["is_whole"] is False
    made = tuple(replace(trial, digest=str(trial.number)) for trial in TRIALS)
    assert [trial.number for trial in first_finalists(replace(state, trials=made))] == [7, 9]


def test_the_history_tells_when_each_best_was_found() -> None:
    """By the work done until then, so that it is the same however often the search was killed."""
    first = trial(3, "fp16", "evaluated", 9_900)
    state = replace(STATE, trials=(*TRIALS[:3], first, *TRIALS[4:]))
    _, document, _ = left(state, report_of(state, 7, winner=7))
    assert [(step["trial"], step["work_seconds"]) for step in document["history"]] == [(3, 8.0), (7, 16.0)]
    assert [step["size_bytes"] for step in document["history"]] == [9900, 9000]


def test_the_table_has_a_row_for_each_trial() -> None:
    """The point in columns, numbers bare, the worst of several outputs, empty where nothing was measured."""
    _, _, rows = left(STATE, report_of(STATE, 7, winner=7))
    assert list(rows[0]) == [
        *("number", "model.args.width", "scheme", "status"),
        *("size_bytes", "compressed_bytes", "sqnr_db", "accuracy_drop", "latency_ratio", "on_front", "reason"),
    ]
    assert [int(row["number"]) for row in rows] == list(range(10))
    assert list(rows[7].values()) == ["7", "16", "static", "evaluated", "9000", "4500", "9", "0.002", "0.8", "1", ""]
    assert list(rows[1].values())[4:10] == ["30000", "15000", "", "", "", "0"]


def test_a_winner_is_told_in_the_words_of_its_gates() -> None:
    """The search adds nothing to a selection."""
    report, document, _ = left(STATE, report_of(STATE, 7, winner=7))
    assert report.selection == document["selection"] == "selected by its gates"
    assert document["nearest"] == []


def test_without_a_winner_each_way_out_is_told() -> None:
    """The smallest found that keeps the accuracy, and the most accurate that fits; what to write in the budget."""
    state = replace(STATE, trials=(*TRIALS[:7], TRIALS[9]))
    report, document, _ = left(state, report_of(state, 6, 9, winner=None))
    assert report.selection == (
        "no model found keeps every limit; relax max_size to 20 kB: fp16-6 (width 16) keeps the rest; "
        "or relax max_accuracy_drop to 0.2: weights_4-9 (width 16) keeps the rest"
    )
    assert [(near["trial"], [miss["limit"] for miss in near["misses"]]) for near in document["nearest"]] == [
        (6, ["max_size"]),
        (9, ["max_accuracy_drop"]),
    ]


def test_where_one_limit_is_not_enough_the_nearest_model_says_all_of_them() -> None:
    """Of models that break two limits, the one whose worst miss is least."""
    state = replace(STATE, budget=Budget.model_validate({"max_size": "5 kB", "max_accuracy_drop": 0.0}))
    report, _, _ = left(state, report_of(state, 7, winner=None))
    assert "relax max_accuracy_drop to 0.00" in report.selection
    assert "and max_size to" in report.selection


def test_latency_is_missed_only_by_those_that_a_clock_has_seen() -> None:
    """A limit on latency: nothing is promised of a model that was not timed."""
    state = replace(STATE, budget=Budget.model_validate({"max_size": "10 kB", "max_latency_ratio": 0.5}))
    report, _, _ = left(state, report_of(state, 7, winner=None))
    assert (
        report.selection
        == "no model found keeps every limit; relax max_latency_ratio to 0.8: static-7 (width 16) keeps the rest"
    )


def test_the_files_are_published_with_the_report_and_go_with_it(tmp_path: Path) -> None:
    """Nobody sees a report beside another run's search; a user's notes stay."""
    report, texts = conclude(SPACE, STATE, report_of(STATE, winner=None))
    publish(report, {}, tmp_path / "small", texts=texts)
    (tmp_path / "small" / "notes.txt").write_text("mine")
    assert read_search(tmp_path / "small" / SEARCH_FILE)["schema"] == 1
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        *("notes.txt", "report.json", "search.csv", "search.json")
    ]
    publish(report, {}, tmp_path / "small")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["notes.txt", "report.json"]


@pytest.mark.parametrize(
    ("text", "says"), [("{", "cannot be read"), ('{"schema": 2}', "newer"), ("[]", "cannot be read")]
)
def test_what_is_no_search_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """Half a file, something else, or a later layout: told, with the path."""
    (tmp_path / SEARCH_FILE).write_text(text)
    with pytest.raises(StoreError, match=says) as caught:
        read_search(tmp_path / SEARCH_FILE)
    assert SEARCH_FILE in str(caught.value.where)
