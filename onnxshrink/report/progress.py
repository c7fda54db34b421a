"""What a run shows while it works: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from onnxshrink.report.terminal import shortened

FIRST_SECONDS = 2.0
"""Longest silence of a step that tells its progress; what is quicker says nothing on the way."""

PLAIN_SECONDS = 5.0
"""Least time between two further plain progress lines of one step."""


_BESIDE_NAME = 60
"""Columns that a bar takes beside its step's name: 24 of its own, the detail and the time left."""

_LEAST_NAME = 20


class _Bars(Progress):
    """Bars, and what stands above them."""

    def __init__(self, above: Callable[[], Iterable[RenderableType]], *columns: ProgressColumn, **options: Any) -> None:
        self._above = above
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from self._above()
        yield from super().get_renderables()


class LiveEvents:
    """Bars that come and go, and a line for each finished step; for terminals.

    Args:
        console: Where to.
        above: What stands above the bars, drawn anew with them.
    """

    def __init__(self, console: Console, above: Callable[[], Iterable[RenderableType]] = tuple) -> None:
        self._console = console
        self._progress = _Bars(
            above,
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}", style="dim"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            refresh_per_second=4,  # the bars are drawn by a thread, and latency is measured beside it
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, step: str) -> None:
        """Show a bar without an end."""
        name = shortened(step, max(self._console.width - _BESIDE_NAME, _LEAST_NAME))
        self._tasks[step] = self._progress.add_task(escape(name), total=None, detail="")

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:
        """Move the bar."""
        if step not in self._tasks:
            self.started(step)
        self._progress.update(self._tasks[step], completed=done, total=total, detail=escape(detail))

    def finished(self, step: str, seconds: float, *, cached: bool) -> None:
        """Replace the bar by a line."""
        if step in self._tasks:
            self._progress.remove_task(self._tasks.pop(step))
        self._console.print(finished_line(step, seconds, cached=cached), highlight=False, soft_wrap=True)

    def warned(self, text: str) -> None:
        """Print a warning above the bars."""
        self._console.print(f"[yellow]warning[/] {escape(text)}", highlight=False)


class PlainEvents:
    """One line when a step starts, now and then while it works, and when it is done; for logs and pipes."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._due: dict[str, float] = {}

    def started(self, step: str) -> None:
        """A line: some steps have no progress to tell."""
        self._due[step] = self._clock() + FIRST_SECONDS
        self._line(f"     …  {escape(step)}")

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:
        """A line after `FIRST_SECONDS`, then one every `PLAIN_SECONDS`."""
        now = self._clock()
        if now >= self._due.setdefault(step, now + FIRST_SECONDS):
            self._due[step] = now + PLAIN_SECONDS
            self._line(f"  {done / max(total, 1):4.0%}  {escape(f'{step}, {detail}' if detail else step)}")

    def finished(self, step: str, seconds: float, *, cached: bool) -> None:
        """A line."""
        self._line(finished_line(step, seconds, cached=cached))

    def warned(self, text: str) -> None:
        """A line."""
        self._line(f"warning {escape(text)}")

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def finished_line(step: str, seconds: float, *, cached: bool) -> str:
    """``  3.1 s  distill`` or ``cached  distill``, in rich's markup."""
    took = "[dim]cached[/]" if cached else f"{seconds:4.1f} s"
    return f"{took}  {escape(step)}"


def listener(console: Console) -> AbstractContextManager[Any]:
    """The listener that fits where ``console`` writes to; use it as a context manager."""
    return LiveEvents(console) if console.is_terminal else nullcontext(PlainEvents(console))
