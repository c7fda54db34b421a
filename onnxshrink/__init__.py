"""Shrink a PyTorch or ONNX model for the device it must run on, and prove that it still works.

```python
import onnxshrink

report = onnxshrink.run("my.yaml")
report.winner, report.candidate("int8").metric("size_bytes")
```

Each name of `__all__` is imported when it is first used, so that ``import onnxshrink`` costs nothing. What goes on is
logged to ``onnxshrink``, and nobody sees it until logging is configured; `progress` shows it.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxshrink.api import progress, run
    from onnxshrink.config.run import RunConfig
    from onnxshrink.core.errors import ShrinkError
    from onnxshrink.core.report import Report
    from onnxshrink.oneline import compare, fit, quantize
    from onnxshrink.regress.check import check_bundle as check
    from onnxshrink.report.inspection import inspect_model as inspect
    from onnxshrink.verify.explain import explain

__version__ = "0.1.0"

__all__ = [
    "Report",
    "RunConfig",
    "ShrinkError",
    "check",
    "compare",
    "explain",
    "fit",
    "inspect",
    "progress",
    "quantize",
    "run",
]

_PLACES = {
    "Report": ("core.report", "Report"),
    "RunConfig": ("config.run", "RunConfig"),
    "ShrinkError": ("core.errors", "ShrinkError"),
    "check": ("regress.check", "check_bundle"),
    "compare": ("oneline", "compare"),
    "explain": ("verify.explain", "explain"),
    "fit": ("oneline", "fit"),
    "inspect": ("report.inspection", "inspect_model"),
    "progress": ("api", "progress"),
    "quantize": ("oneline", "quantize"),
    "run": ("api", "run"),
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
