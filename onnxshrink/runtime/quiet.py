"""Silence for libraries that print, log and warn about their own affairs."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed to standard output, logged or warned while the block runs.

    Exceptions pass, so nothing that matters is lost. Standard error is left alone, because our own progress is drawn
    there from another thread.
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
