"""The table of ``bisect``: 80 columns, every step, and a sentence that says what was and was not seen."""

from __future__ import annotations

import io
import json

from rich.console import Console

from onnxshrink.report.bisection import print_bisection, sentence
from onnxshrink.search.bisection import Found, Search
from onnxshrink.search.limits import Check, Limit

STEPS = ("export", "optimize/slim", "int8/quantize_static", "session at basic")
BROKE = Search(
    STEPS,
    (
        Check(3, "session at basic", 22.3, is_broken=True, output="y"),
        Check(1, "optimize/slim", 95.04, is_broken=False, output="y"),
        Check(2, "int8/quantize_static", 22.4, is_broken=True, output="y"),
    ),
    first=2,
    unseen=(0,),
)
FOUND = Found("cfg, int8", "torch after finetune", Limit("sqnr_db", 30.0), BROKE, advice=("onnxshrink explain a b",))


def shown(found: Found) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    print_bisection(found, console)
    return console.export_text()


def test_every_step_has_a_line_and_the_first_broken_one_a_mark() -> None:
    """Nothing is wider than 80 columns, and steps that were not checked say so."""
    lines = shown(FOUND).splitlines()
    assert max(map(len, lines)) <= 80
    rows = {name: next(line for line in lines if line.startswith(name)) for name in STEPS}
    assert "not checked" in rows["export"]
    assert "95.0 dB  kept" in rows["optimize/slim"]
    assert [name for name, row in rows.items() if "first" in row] == ["int8/quantize_static"]
    assert "3 of 4 steps checked; it takes 3 at most" in shown(FOUND)
    assert "next   onnxshrink explain a b" in shown(FOUND)


def test_the_sentence_names_both_neighbours_and_what_was_not_seen() -> None:
    """What kept the limit, what broke it and by how much; and that a mended break would not have been seen."""
    assert sentence(FOUND) == (
        "optimize/slim kept 95.0 dB; int8/quantize_static broke the limit: 22.4 dB. 1 of the 2 steps before it was not "
        "checked: what breaks there and is mended again is not seen."
    )


def test_nothing_broken_and_broken_at_once_are_said() -> None:
    """Without a broken step the last value stands alone; where the first breaks, the reference stands before it."""
    kept = Search(STEPS, (Check(3, STEPS[3], None, is_broken=False, note="identical"),), None, (0, 1, 2))
    found = Found("a", "b", Limit("sqnr_db", 30.0), kept)
    assert sentence(found) == "Nothing broke the limit: session at basic kept identical."
    assert "1 of 4 steps checked; it takes 3 at most" in shown(found)
    flawed = Search(STEPS[:1], (Check(0, "export", None, is_broken=True, note="candidate gives NaN"),), 0, ())
    said = sentence(Found("a", "torch source", Limit("max_abs_error", 1e-3), flawed))
    assert said == "torch source is the reference; export broke the limit: candidate gives NaN."


def test_the_json_holds_everything() -> None:
    """A machine reads the same."""
    document = json.loads(FOUND.to_json())
    assert document["search"]["first"] == 2
    assert [check["name"] for check in document["search"]["checks"]] == [STEPS[3], STEPS[1], STEPS[2]]
    assert document["limit"] == {"metric": "sqnr_db", "value": 30.0}
