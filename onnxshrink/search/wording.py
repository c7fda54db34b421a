"""Limits and how far a model is from them, in words and in the units that a config is written in."""

from __future__ import annotations

import math

from onnxshrink.search.constraints import Miss

_SIZES = ("max_size", "max_compressed_size", "max_peak_memory")
_UNITS = {"max_latency_ms": " ms", "min_sqnr_db": " dB"}
_DIGITS = 3


def say(limit: str, value: float, *, up: bool | None = None) -> str:
    """A limit's value as a person writes it, such as ``11.3 kB``, ``0.0125`` or ``18.2 dB``.

    Args:
        limit: Its name in the budget.
        value: In the limit's own unit.
        up: Round up, or down; to the nearest by default. A limit relaxed to what is said must suffice.
    """
    if limit not in _SIZES:
        return f"{_rounded(value, up=up)}{_UNITS.get(limit, '')}"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{_rounded(value / scale, up=up)} {unit}"
    return f"{math.ceil(value)} B"


def relax(miss: Miss) -> str:
    """What to write in the budget for a model to keep it: ``max_size to 11.3 kB``; no figure if none is known."""
    if miss.needed is None:
        return _named(miss)
    return f"{_named(miss)} to {say(miss.limit, miss.needed, up=not miss.limit.startswith('min_'))}"


def breaks(miss: Miss) -> str:
    """What a model breaks, and by how much: ``11.3 kB breaks max_size 10 kB by 1.25 kB``."""
    asked = f"{_named(miss)} {say(miss.limit, miss.asked)}"
    if miss.needed is None:
        return f"breaks {asked}, it is not known by how much"
    return f"{say(miss.limit, miss.needed)} breaks {asked} by {say(miss.limit, abs(miss.needed - miss.asked))}"


def _named(miss: Miss) -> str:
    return miss.limit if miss.target is None else f"{miss.limit} on {miss.target}"


def _rounded(value: float, *, up: bool | None) -> str:
    """Three digits, without an exponent."""
    if value == 0:
        return "0"
    n = _DIGITS - 1 - math.floor(math.log10(abs(value)))
    scaled = value * 10.0**n
    near = round(scaled)
    if up is not None and not math.isclose(scaled, near, rel_tol=1e-9):
        near = math.ceil(scaled) if up else math.floor(scaled)
    return f"{near / 10.0**n:.{max(0, n)}f}".rstrip("0").rstrip(".") if n > 0 else str(round(near / 10.0**n))
