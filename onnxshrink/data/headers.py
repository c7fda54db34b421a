"""What the first bytes of a stored array say, and whether the rest is there."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format

from onnxshrink.core.errors import DataError

UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)
"""What a damaged archive makes zipfile raise: RuntimeError if encrypted, NotImplementedError if packed unknowably."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of a stored array say of it.

    Attributes:
        dtype: Element type in this machine's byte order, which is what reading gives.
        shape: Axis lengths.
        stored_dtype: Element type as it lies on disk.
        fortran: True if the first axis varies fastest, so that rows are scattered over the file.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    stored_dtype: np.dtype[Any]
    fortran: bool


def read_header(stream: IO[bytes], where: str) -> Header:
    """Read a `.npy` header; the stream stands at the values afterwards.

    Raises:
        DataError: It is none, or announces pickled objects: reading one runs code that the file brings.
    """
    try:
        version = npy_format.read_magic(stream)
        # Version 3 differs from 2 only in the names of structured fields, and no model takes structured arrays.
        reader = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, fortran, stored = reader(stream)
    except UNREADABLE:
        raise
    except Exception as e:  # numpy parses the header as Python: damaged bytes raise half a dozen unrelated types
        raise DataError(
            f"the data cannot be read as a numpy array: {str(e).partition(chr(10))[0]}",
            where=where,
            want="an array written by numpy.save, numpy.savez or numpy.savez_compressed",
        ) from e
    if stored.hasobject:
        raise DataError(
            "pickled arrays are refused: loading one runs code that the file brings",
            where=where,
            got=f"dtype {stored}",
            want="numbers, or text of fixed width",
            fix="save it with a plain dtype: array.astype('float32'), or array.astype(str) for names",
        )
    return Header(stored.newbyteorder("="), tuple(shape), stored, fortran=bool(fortran) and len(shape) > 1)


def require_size(header: Header, got: int, where: str) -> None:
    """Refuse a negative axis, and ``got`` bytes that are fewer than the header announces."""
    want = prod(header.shape) * header.stored_dtype.itemsize
    if min(header.shape, default=0) < 0 or got < want:
        raise DataError(
            "the array is shorter than its header says",
            where=where,
            got=f"{got} bytes",
            want=f"{want} bytes for {header.stored_dtype}[{','.join(map(str, header.shape))}]",
            fix="check that the file was copied whole, or write it anew",
        )


def damaged(where: str, error: Exception) -> DataError:
    """The error of a file that cannot be read."""
    return DataError(
        f"the data cannot be read: {error or type(error).__name__}",
        where=where,
        got=f"{type(error).__name__} while reading",
        want="a whole file, as numpy wrote it",
        fix="check that the file was copied whole, or write it anew",
    )
