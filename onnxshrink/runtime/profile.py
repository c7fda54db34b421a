"""How long each kernel of a session takes, by ONNX Runtime's own profiler."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from onnxshrink.core.tensors import Array, Batch
from onnxshrink.runtime.session import Session

Kernels: TypeAlias = Mapping[tuple[str, str], float]
"""Node and operator type to microseconds of one inference.

Nodes that ONNX Runtime gives one name are added up, and their number stands before the type, as in ``3 Transpose``:
more of them are another kernel, not a slower one.
"""

MIN_RUNS = 16
"""The least of fewer times is still the least of what happened to disturb them."""

_KERNEL = "_kernel_time"
# Where ONNX Runtime changes a layout it renames nodes, and numbers them through the graph.
_MARKS = re.compile(r"(_token_\d+|_nchwc|/duplicated)+$")


def profiled(model: bytes, batches: Sequence[Batch], *, name: str) -> tuple[list[dict[str, Array]], Kernels]:
    """Run a model on one thread of the CPU, and time its kernels.

    Args:
        model: A serialized model.
        batches: Each is run once, all of them again until there are `MIN_RUNS`.
        name: What to call the model in messages.

    Returns:
        The outputs of each batch, and each kernel's shortest time: whatever disturbs a run makes it longer.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
        session = Session(model, name=name, profile=Path(folder) / "profile")
        outputs = [session.run(batch) for batch in batches]
        passes = math.ceil(MIN_RUNS / len(batches))
        for batch in [*batches] * (passes - 1):
            session.run(batch)
        events = json.loads(session.end_profile().read_text(encoding="utf-8"))
    return outputs, shortest(events, passes * len(batches))


def shortest(events: Sequence[Mapping[str, object]], n_runs: int) -> Kernels:
    """The shortest time of each kernel from a profile's events.

    Args:
        events: As the profiler writes them, in the order of time; ``dur`` is in microseconds.
        n_runs: Inferences that they cover. Of a node that does not run in each of them it is the mean.
    """
    times: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        name, details = event["name"], event.get("args")
        if isinstance(name, str) and name.endswith(_KERNEL) and isinstance(details, Mapping):
            key = (_MARKS.sub("", name.removesuffix(_KERNEL)), str(details["op_name"]))
            times[key].append(int(str(event["dur"])))
    kernels: dict[tuple[str, str], float] = {}
    for (name, op_type), each in times.items():
        count, rest = divmod(len(each), n_runs)
        if rest or not count:  # a branch that not every run takes
            kernels[name, op_type] = sum(each) / n_runs
        else:
            runs = (sum(each[start : start + count]) for start in range(0, len(each), count))
            kernels[name, f"{count} {op_type}" if count > 1 else op_type] = float(min(runs))
    return kernels
