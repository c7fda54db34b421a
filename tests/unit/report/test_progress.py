"""What a run says on a pipe or in a log."""

from __future__ import annotations

import io

from rich.console import Console

from onnxshrink.report.progress import PlainEvents


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
