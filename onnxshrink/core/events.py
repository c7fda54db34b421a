"""What a run tells while it works. Stages emit; the terminal, a notebook or nobody listens."""

from __future__ import annotations

from typing import Protocol


class Events(Protocol):
    """A listener. Every method returns at once; none raises but to end the work, with what is no `Exception`."""

    def started(self, step: str) -> None:
        """``step`` begins to work; it was not in the store."""

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:
        """``done`` of ``total`` units of ``step`` are behind us; ``detail`` is a short state such as a loss."""

    def finished(self, step: str, seconds: float, *, cached: bool) -> None:
        """``step`` is done, or was found in the store."""

    def warned(self, text: str) -> None:
        """Something the user should know and that does not stop the run."""


class Silent:
    """A listener that says nothing: the default of the Python API, and of tests."""

    def started(self, step: str) -> None:
        """Nothing."""

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:
        """Nothing."""

    def finished(self, step: str, seconds: float, *, cached: bool) -> None:
        """Nothing."""

    def warned(self, text: str) -> None:
        """Nothing."""
