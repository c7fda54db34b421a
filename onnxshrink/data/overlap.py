"""Which sample is which: a hash over the bytes of every input, to find samples that two readers share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.batching import constant_inputs
from onnxshrink.data.reader import Reader

_HASH_BYTES = 16


def sample_hashes(reader: Reader, specs: Sequence[TensorSpec]) -> NDArray[np.bytes_]:
    """A hash of each sample over all inputs, in the reader's order; ``(n_samples,)``, 16 bytes each.

    Two samples have the same hash if their arrays agree in every bit, dtypes and shapes included. Inputs that hold no
    samples, and labels, do not count.

    Args:
        reader: Streamed once; no more than one batch is in memory.
        specs: The model's inputs.
    """
    hashes = bytearray()
    for each in _each(reader, specs):
        hashes += each
    return np.frombuffer(hashes, f"S{_HASH_BYTES}")


def _each(reader: Reader, specs: Sequence[TensorSpec]) -> Iterator[bytes]:
    for batch in reader:
        constants = constant_inputs(specs, batch)
        arrays = [np.ascontiguousarray(batch[spec.name]) for spec in specs if spec.name not in constants]
        header = repr([(array.dtype.str, array.shape[1:]) for array in arrays]).encode()
        for row in range(len(arrays[0])):
            hashed = hashlib.blake2b(header, digest_size=_HASH_BYTES)
            for array in arrays:
                hashed.update(array[row].tobytes())
            yield hashed.digest()
