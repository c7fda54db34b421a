"""What time a scheme takes on the real provider: kernel by kernel for one group, in pairs for a whole model.

Two models that differ at one group share all other kernels. So what the group costs, the conversions at its borders
included, is the time of the kernels that only one of them has; and the kernels of both tell by how much the machine was
faster or slower meanwhile. A sum of differences predicts a mixture, and only a measurement in pairs decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxshrink.core.tensors import Array, Batch
from onnxshrink.runtime.profile import Kernels, profiled
from onnxshrink.runtime.session import Session
from onnxshrink.verify.latency import measure_pairs, runner, without_garbage_collection

Ratio = tuple[float, float, float]
"""Time of a candidate over that of a reference, and its 95% interval."""

_SECONDS = 1.5


class Stopwatch:
    """Measures on one thread of the CPU; tests put known times in its place."""

    def kernels(self, model: bytes, batches: Sequence[Batch], *, name: str) -> tuple[list[dict[str, Array]], Kernels]:
        """As of `profiled`."""
        return profiled(model, batches, name=name)

    def ratio(self, reference: bytes, candidate: bytes, batch: Batch, *, name: str) -> Ratio:
        """Time of one inference of ``candidate`` over that of ``reference``, from interleaved pairs.

        Raises:
            ModelError: ONNX Runtime cannot load or run one of them.
        """
        with without_garbage_collection():
            times = measure_pairs(
                lambda: runner(Session(reference, name=name), batch),
                lambda: runner(Session(candidate, name=name), batch),
                seconds=_SECONDS,
                rng=np.random.default_rng(0),
            )
        return times.ratio, *times.ratio_interval


def excess_us(base: Kernels, other: Kernels) -> float:
    """Microseconds of one inference that ``other`` takes more than ``base``, at the machine's speed of ``base``.

    Args:
        base: Kernels of a model.
        other: Kernels of one that differs from it in a few nodes.
    """
    common = base.keys() & other.keys()
    before, after = (sum(kernels[key] for key in sorted(common)) for kernels in (base, other))
    pace = before / after if before and after else 1.0
    return pace * sum(other[key] for key in sorted(other.keys() - common)) - sum(
        base[key] for key in sorted(base.keys() - common)
    )
