"""What a run tells while it works. Stages emit; the terminal, a notebook or nobody listens."""

from __future__ import annotations

import logging
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


class Logged:
    """A listener that logs to ``onnxshrink``: steps as INFO, progress as DEBUG, warnings as WARNING.

    The default of the Python API, where it is silent until the user configures logging.
    """

    def __init__(self) -> None:
        self._log = logging.getLogger("onnxshrink")

    def started(self, step: str) -> None:
        """``started distill``."""
        self._log.info("started %s", step)

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:
        """``distill: 3 of 20, loss 0.4``."""
        self._log.debug("%s: %d of %d%s", step, done, total, detail and f", {detail}")

    def finished(self, step: str, seconds: float, *, cached: bool) -> None:
        """``finished distill in 3.1 s``, or ``found distill in the store``."""
        if cached:
            self._log.info("found %s in the store", step)
        else:
            self._log.info("finished %s in %.1f s", step, seconds)

    def warned(self, text: str) -> None:
        """The warning as it is."""
        self._log.warning("%s", text)


class Silent:
    """A listener that says nothing: of ``--quiet``, and of tests."""

    def started(self, step: str) -> None:
        """Nothing."""

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:
        """Nothing."""

    def finished(self, step: str, seconds: float, *, cached: bool) -> None:
        """Nothing."""

    def warned(self, text: str) -> None:
        """Nothing."""
