"""What a run says on a pipe or in a log."""

from __future__ import annotations

import io

from rich.console import Console

from onnxshrink.report.progress import LiveEvents, PlainEvents


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        """The time, in seconds."""
        return self.now


def plain() -> tuple[PlainEvents, Clock, io.StringIO]:
    text, clock = io.StringIO(), Clock()
    return PlainEvents(Console(file=text, width=40), clock), clock, text


def test_a_step_without_progress_says_that_it_began() -> None:
    """Whoever reads a log sees what is being done before it is done."""
    events, _, text = plain()
    events.started("quantize_static")
    assert text.getvalue() == "     …  quantize_static\n"


def test_the_first_progress_comes_after_two_seconds_and_then_one_every_five() -> None:
    """A long step is never silent for long, and a log stays short; a step that was never announced counts as well."""
    events, clock, text = plain()
    for tenth in range(131):
        clock.now = tenth / 10
        events.progress("verify/int8", tenth, 200, "latency on [cpu]")
    assert text.getvalue().splitlines() == [
        "   10%  verify/int8, latency on [cpu]",
        "   35%  verify/int8, latency on [cpu]",
        "   60%  verify/int8, latency on [cpu]",
    ]


def test_a_quick_step_says_when_it_began_and_what_it_took() -> None:
    """Progress within two seconds is not told, nor is the start of what the store has."""
    events, clock, text = plain()
    events.started("export")
    clock.now = 1.9
    events.progress("export", 1, 2)
    events.finished("export", 1.9, cached=False)
    events.finished("optimize", 0.3, cached=True)
    assert text.getvalue().splitlines() == ["     …  export", " 1.9 s  export", "cached  optimize"]


def test_a_long_name_leaves_room_for_its_bar() -> None:
    """In 80 columns stand the name's ends, the bar, the detail and the time left; the finished line has all of it."""
    step = "static_with_a_name_that_no_line_of_eighty_columns_can_ever_hold_beside_anything_else/quantize_static"
    text = io.StringIO()
    with LiveEvents(Console(file=text, width=80, force_terminal=True, color_system=None)) as events:
        events.started(step)
        events.progress(step, 1, 2, "loss 0.123, epoch 11")
    shown = text.getvalue()
    events.finished(step, 1.25, cached=False)
    assert all(part in shown for part in ("static_wi…ize_static", "━━━━━━━━━", "loss 0.123, epoch 11", "-:--"))
    assert text.getvalue().splitlines()[-1].endswith(f" 1.2 s  {step}")
