from __future__ import annotations

import pytest

from onnxshrink.core.report import Candidate, Metric
from onnxshrink.verify.gain import has_fewer_macs, idle_cuts, idle_zeros


def ratio(value: float, lo: float | None = None, hi: float | None = None, target: str = "cpu") -> Metric:
    return Metric("latency_ratio", value, "ratio", lo, hi, target=target)


def row(name: str, macs: float | None, *metrics: Metric) -> Candidate:
    return Candidate(name, "variant", "", "", (Metric("macs", macs, "count", target="cpu"), *metrics))


UNPRUNED = row("unpruned", 1000.0, ratio(1.02, 0.99, 1.05))
FASTER = row("unpruned", 1000.0, ratio(2.0, 1.9, 2.1))


def test_fewer_macs_and_no_faster_is_said() -> None:
    """The original takes 1.02 of the reference's time: the reference takes 0.98 of the original's, 0.95 to 1.01."""
    reference = row("reference", 520.0, ratio(1.0, 1.0, 1.0))
    assert list(idle_cuts(reference, UNPRUNED, UNPRUNED.metrics)) == [
        "reference: 0.52 of the MACs of unpruned, latency ratio 0.98 (0.95 to 1.01): fewer MACs and no faster"
    ]
    assert not list(idle_cuts(reference, FASTER, FASTER.metrics))


@pytest.mark.parametrize(("hi", "said"), [(1.89, False), (1.9, True)])
def test_faster_means_beyond_doubt(hi: float, said: bool) -> None:  # noqa: FBT001
    """The worst end of the one against the best of the other."""
    variant = row("int8", 520.0, ratio(1.5, 1.4, hi))
    assert bool(list(idle_cuts(variant, FASTER, FASTER.metrics))) is said


@pytest.mark.parametrize(("macs", "fewer"), [(899.0, True), (900.0, False), (1200.0, False), (None, False)])
def test_only_what_was_cut_is_judged(macs: float | None, fewer: bool) -> None:  # noqa: FBT001
    """A tenth of the MACs must be gone; where they are not known nothing is said."""
    variant = row("int8", macs, ratio(1.0))
    assert has_fewer_macs(variant, UNPRUNED) is fewer
    assert bool(list(idle_cuts(variant, UNPRUNED, UNPRUNED.metrics))) is fewer
    assert not has_fewer_macs(variant, row("unpruned", None))


def test_each_target_is_judged_alone() -> None:
    """And named, where there are two."""
    macs = tuple(Metric("macs", 100.0, "count", target=target) for target in ("cpu", "cuda"))
    base = Candidate(
        "teacher", "original", "", "", tuple(Metric("macs", 200.0, "count", target=m.target) for m in macs)
    )
    variant = Candidate("v", "variant", "", "", (*macs, ratio(1.0), ratio(1.0, target="cuda")))
    beside = (ratio(3.0), ratio(0.9, target="cuda"))
    (said,) = idle_cuts(variant, base, beside)
    assert said.startswith("v: 0.50 of the MACs of teacher, latency ratio 1.11 (1.11 to 1.11) on cuda")


def test_zeros_are_said_to_be_computed() -> None:
    """With the bytes they save in an archive; a dense float model's are not, nor zeros that quantization made."""
    sizes = Metric("size_bytes", 11024.0), Metric("compressed_bytes", 6310.0)
    int8 = row("int8", 10.0, *sizes)
    (said,) = idle_zeros(int8, row("reference", 10.0, Metric("sparsity", 0.5)))
    assert said == (
        "int8: 50% of the weights are zero, and ONNX Runtime's CPU provider computes them all the same: "
        "11,024 bytes compress to 6,310, and nothing is faster for it"
    )
    assert not list(idle_zeros(int8, row("reference", 10.0, Metric("sparsity", 0.001))))
    assert not list(idle_zeros(int8, row("reference", 10.0)))
