"""What the report promises: a record that reads back the same, today and by later versions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onnxshrink.core.errors import StoreError
from onnxshrink.core.report import SCHEMA, Candidate, Metric, Outcome, Report, Step, Verdict, finite, worst

METRICS = (
    Metric("latency_ratio", 0.6, "ratio", 0.55, 0.65, target="cpu"),
    Metric("sqnr_db", 20.0, "dB", target="cpu", output="logits"),
    Metric("sqnr_db", None, "dB", target="cpu x2", output="boxes", note="the outputs are identical"),
)


def report() -> Report:
    """A report with something in every field."""
    verdict = Verdict("min_sqnr_db", 15.0, "passed", "20.0 dB ≥ 15 dB", target="cpu")
    return Report(
        name="digits",
        config={"stages": [{"kind": "export"}], "gates": {"max_size": 60000}},
        candidates=(
            Candidate("teacher", "original", "teacher.onnx", "0" * 64),
            Candidate("int8", "variant", "int8.onnx", "1" * 64, METRICS, (verdict,)),
        ),
        steps=(Step("export", "export", "2" * 64, cached=True, seconds=1.5, facts={"opset": 20}),),
        winner="int8",
        selection="the smallest that passes",
        machine={"cpus": 2},
        versions={"numpy": "2.0"},
        seconds=3.25,
        warnings=("one", "two"),
    )


def test_a_report_reads_back_the_same(tmp_path: Path) -> None:
    """Text and file give the very report back, tuples and all."""
    assert Report.from_json(report().to_json()) == report()
    path = tmp_path / "report.json"
    path.write_text(report().to_json(), encoding="utf-8")
    assert Report.read(path) == report()
    assert json.loads(report().to_json())["schema"] == SCHEMA


def _edited(**changes: Any) -> dict[str, Any]:
    return json.loads(report().to_json()) | changes  # type: ignore[no-any-return]


def test_fields_of_a_later_version_are_left_out() -> None:
    """Fields that this version does not know, at any depth, do not disturb it."""
    raw = _edited(later={"x": 1})
    for row in (raw["candidates"][1], raw["candidates"][1]["metrics"][0], raw["candidates"][1]["verdicts"][0]):
        row["later"] = 1
    raw["steps"][0]["later"] = [1]
    assert Report.from_json(json.dumps(raw)) == report()


def test_optional_fields_that_are_missing_get_their_defaults() -> None:
    """An older report without the fields that came later is read with their defaults."""
    raw = _edited()
    del raw["warnings"], raw["schema"], raw["candidates"][0]["metrics"], raw["candidates"][0]["verdicts"]
    for metric in raw["candidates"][1]["metrics"]:
        del metric["note"]
    read = Report.from_json(json.dumps(raw))
    assert (read.warnings, read.schema, read.candidates[0]) == ((), SCHEMA, report().candidates[0])
    assert read.candidates[1].metrics[2].note is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"candidates": [3]}', '{"candidates": 1, "steps": []}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    """Text that is no report is a StoreError that names the file."""
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(StoreError, match="this is no report") as caught:
        Report.read(path)
    assert caught.value.where == str(path)


def test_a_missing_report_is_told(tmp_path: Path) -> None:
    """No file, or bytes that are no text, is a StoreError that names it."""
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name in ("missing", "bytes"):
        with pytest.raises(StoreError, match="the report cannot be read"):
            Report.read(tmp_path / name)


def test_a_newer_schema_is_refused() -> None:
    """A report whose fields may mean something else is not guessed at."""
    with pytest.raises(StoreError, match="a newer onnxshrink"):
        Report.from_json(json.dumps(_edited(schema=SCHEMA + 1)))


def test_numbers_that_json_cannot_hold_are_refused() -> None:
    """NaN and infinity never get into a report."""
    for value in (math.nan, math.inf):
        bad = Report("x", {"value": value}, (), (), None, "", {}, {}, 0.0)
        with pytest.raises(ValueError, match="not JSON compliant"):
            bad.to_json()


def test_metrics_are_found_by_name_target_and_output() -> None:
    """The first metric of a name, or the one of a target and output; None where there is none."""
    row = report().candidate("int8")
    assert row.metric("sqnr_db") is METRICS[1]
    assert row.metric("sqnr_db", target="cpu x2") == METRICS[2]
    assert row.metric("sqnr_db", output="boxes", target="cpu x2") == METRICS[2]
    assert row.metric("sqnr_db", output="boxes", target="cpu") is None


def test_a_metric_of_the_model_goes_before_those_of_its_outputs() -> None:
    """Drift and task both have a ``cosine``: without an output the task's is meant, else that of the output."""
    own, drift = Metric("cosine", 0.7, target="cpu"), Metric("cosine", 1.0, target="cpu", output="y")
    row = Candidate("int8", "variant", "", "", (drift, own))
    assert row.metric("cosine") is row.metric("cosine", target="cpu") is own
    assert row.metric("cosine", output="y") is drift
    assert Candidate("int8", "variant", "", "", (drift,)).metric("cosine") is drift


def test_candidates_are_found_by_name() -> None:
    """A row is found by its name, an unknown name is a KeyError, and variants are the rows of the config's branches."""
    assert report().candidate("teacher").role == "original"
    assert [row.name for row in report().variants] == ["int8"]
    with pytest.raises(KeyError):
        report().candidate("fp16")


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([], "passed"),
        (["passed"], "passed"),
        (["passed", "inconclusive"], "inconclusive"),
        (["inconclusive", "failed", "passed"], "failed"),
    ],
)
def test_the_worst_outcome_decides(outcomes: list[Outcome], expected: Outcome) -> None:
    """One failed gate fails a variant, one inconclusive gate leaves it open."""
    verdicts = tuple(Verdict("gate", 0.0, outcome, "reason") for outcome in outcomes)
    assert worst(outcomes) == expected
    assert Candidate("x", "variant", "m", "d", (), verdicts).outcome == expected


def test_finite_is_none_for_what_json_cannot_hold() -> None:
    """Finite numbers pass, others become None."""
    assert [finite(value) for value in (1, math.inf, -math.inf, math.nan)] == [1.0, None, None, None]


def test_lists_of_numbers_take_one_line() -> None:
    """A thousand numbers are a line and not a thousand; text that looks like JSON stays as it is."""
    details = {
        "times": {"ns": [list(range(500)), list(range(500))]},
        "text": '[\n 1,\n 2] "x" — é',
        "empty": [],
        "none": {},
    }
    row = replace(report().candidates[1], details=details)
    text = replace(report(), candidates=(row,)).to_json()
    assert Report.from_json(text).candidates[0].details == details
    assert len(text.splitlines()) < 100
    with pytest.raises(ValueError, match="JSON"):
        replace(report(), candidates=(replace(row, details={"x": [math.inf]}),)).to_json()


def test_a_report_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    """For a misspelt run, for the folder of all runs, and for the file in place of the folder; text is a path too."""
    (tmp_path / "digits").mkdir()
    written = tmp_path / "digits" / "report.json"
    written.write_text(report().to_json(), encoding="utf-8")
    assert Report.read(str(written)) == Report.read(written)
    for wrong in ("digit", ".", "digits/report.json"):
        with pytest.raises(StoreError, match="the report cannot be read: N") as caught:
            Report.read(tmp_path / wrong / "report.json")
        error = caught.value
        assert all((error.where, error.got, error.want))
        assert str(tmp_path / "digits") in str(error.fix)
    with pytest.raises(StoreError) as caught:
        Report.read(tmp_path / "digits" / "nothing.json")
    assert caught.value.fix == "onnxshrink run cfg.yaml"
