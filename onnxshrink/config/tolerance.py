"""How far an output may be off: in its own unit, or in steps of its quantization."""

from __future__ import annotations

import math
import re
from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

_NUMBER = r"[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?"
_TEXT = re.compile(rf"\s*({_NUMBER})\s*(?P<unit>steps?)?\s*")


def _tolerance(value: object) -> float | str:
    """A number as it is, text such as ``2 steps`` in its one spelling."""
    found = _TEXT.fullmatch(str(value)) if isinstance(value, (int, float, str)) else None
    if found is None or isinstance(value, bool) or not math.isfinite(float(found[1])):
        raise PydanticCustomError("tolerance", "a number from 0 on, or text such as '2 steps', is wanted", {})
    return f"{float(found[1]):.12g} steps" if found["unit"] else float(found[1])


Tolerance: TypeAlias = Annotated[
    float | str,
    BeforeValidator(_tolerance),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": rf"^({_NUMBER}) *(steps?)?$"}]}
    ),
]
"""A difference of outputs: a number in the output's own unit, or text such as ``2 steps`` of its quantization."""


def in_steps(tolerance: float | str) -> tuple[float, bool]:
    """The number of a validated `Tolerance`, and whether it counts steps."""
    return (float(tolerance.split()[0]), True) if isinstance(tolerance, str) else (tolerance, False)
