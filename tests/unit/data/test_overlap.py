"""Hashes of samples: equal where all inputs are equal in every byte, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_models as nets

from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.overlap import sample_hashes

SPECS = (TensorSpec("x", "float32", ("N", 3)), TensorSpec("y", "float32", ("N",)))
X, Y = np.arange(30, dtype=np.float32).reshape(10, 3), np.ones(10, np.float32)


def hashes(batch_size: int = 4, **arrays: np.ndarray) -> list[bytes]:
    """The hashes of samples in memory."""
    return sample_hashes(nets.ArrayReader(arrays, batch_size), SPECS).tolist()


def test_a_sample_keeps_its_hash_wherever_it_stands() -> None:
    """Batch size and place in the stream do not matter; different samples differ."""
    whole = hashes(x=X, y=Y)
    assert len(set(whole)) == 10
    assert hashes(7, x=X[::-1], y=Y) == whole[::-1]


def test_every_input_counts_and_labels_do_not() -> None:
    """A sample that differs in one input only is another sample; one with another label is the same."""
    whole = hashes(x=X, y=Y)
    other = Y.copy()
    other[4] = 2
    assert [a == b for a, b in zip(hashes(x=X, y=other), whole, strict=True)] == [row != 4 for row in range(10)]
    assert hashes(x=X, y=Y, labels=np.arange(10, dtype=np.float32)) == whole


def test_values_do_not_run_from_one_input_into_the_next() -> None:
    """The same bytes in another form are another sample."""
    flat = (TensorSpec("x", "float32", ("N", 4)),)
    joined = np.concatenate([X, Y[:, None]], axis=1)
    assert not set(sample_hashes(nets.ArrayReader({"x": joined}), flat).tolist()) & set(hashes(x=X, y=Y))


def test_constant_inputs_do_not_count() -> None:
    """An input that is given whole with every batch is no part of a sample."""
    specs = (TensorSpec("x", "float32", ("N", 3)), TensorSpec("anchors", "float32", (5, 2)))

    class WithAnchors(nets.ArrayReader):
        def __iter__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
            yield from (batch | {"anchors": np.zeros((5, 2), np.float32)} for batch in super().__iter__())

    plain = sample_hashes(nets.ArrayReader({"x": X}, 5), specs[:1])
    assert sample_hashes(WithAnchors({"x": X}, 5), specs).tolist() == plain.tolist()


def test_sixteen_bytes_a_sample() -> None:
    """What is kept of a sample is 16 bytes, and nothing of no samples."""
    assert sample_hashes(nets.ArrayReader({"x": X, "y": Y}), SPECS).nbytes == 160
    assert hashes(x=X[:0], y=Y[:0]) == []
