"""Arrays on disk, read a few rows at a time: members of an `.npz` archive and `.npy` files.

Only headers are read when an array is opened. Object arrays are refused: reading one runs code that the file brings.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import Array

Rows: TypeAlias = range | NDArray[np.intp]
"""Row numbers, rising."""

_CHUNK_BYTES = 1 << 20

# What a damaged archive makes zipfile raise; RuntimeError is an encrypted one, NotImplementedError an unknown packing.
_UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


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


class StoredArray(Protocol):
    """An array on disk."""

    @property
    def where(self) -> str:
        """File, and member of it, for messages."""

    @property
    def header(self) -> Header:
        """Dtype and shape, without the values."""

    def whole(self) -> Array:
        """All of it."""

    def rows(self, pieces: Iterable[Rows]) -> Iterator[Array]:
        """The rows of each piece, one array a piece.

        Args:
            pieces: Row numbers, rising within a piece and from piece to piece.
        """


@dataclass(frozen=True)
class ZippedArray:
    """A member of an `.npz` archive, read as a stream: no more than one piece of rows is in memory.

    An array in Fortran order has its rows scattered over the member, and is read whole.
    """

    path: Path
    member: str

    @property
    def where(self) -> str:
        """Archive and array name."""
        return f"{self.path}, array {self.member.removesuffix('.npy')!r}"

    @cached_property
    def header(self) -> Header:
        """Dtype and shape; the member must be as long as they say."""
        with self._opened() as (_, header):
            return header

    def whole(self) -> Array:
        """All of the array, ``header.shape``."""
        with self._opened() as (stream, header):
            values = np.empty(header.shape, header.stored_dtype, order="F" if header.fortran else "C")
            self._fill(stream, values.T if header.fortran else values)
            self._check_end(stream)
        return values.astype(header.dtype, copy=False)

    def rows(self, pieces: Iterable[Rows]) -> Iterator[Array]:
        """The rows of each piece, read in one pass over the stream."""
        if self.header.fortran:
            whole = self.whole()
            yield from (np.ascontiguousarray(whole[np.asarray(piece)]) for piece in pieces)
            return
        with self._opened() as (stream, header):
            row_bytes = prod(header.shape[1:]) * header.stored_dtype.itemsize
            at = 0
            for piece in pieces:
                values = np.empty((len(piece), *header.shape[1:]), header.stored_dtype)
                for first, last, row in _runs(piece):
                    self._skip(stream, (row - at) * row_bytes)
                    self._fill(stream, values[first:last])
                    at = row + last - first
                if at == header.shape[0]:
                    self._check_end(stream)
                yield values.astype(header.dtype, copy=False)

    @contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], Header]]:
        """The member's stream, behind its header."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                header = _read_header(stream, self.where)
                size = archive.getinfo(self.member).file_size
                _require_size(header, size - stream.tell(), self.where)
                if header != self.__dict__.get("header", header):
                    raise DataError("the array changed while it was read", where=self.where)
                yield stream, header
        except _UNREADABLE as e:
            raise _damaged(self.where, e) from e
        except KeyError as e:  # zipfile's word for a member that is gone
            raise DataError("the array is not there any more", where=self.where) from e

    def _fill(self, stream: IO[bytes], values: Array) -> None:
        rest = values.reshape(-1).view(np.uint8)
        while rest.size:
            piece = stream.read(min(rest.size, _CHUNK_BYTES))
            if not piece:
                raise EOFError("the data end too early")
            rest[: len(piece)] = np.frombuffer(piece, np.uint8)
            rest = rest[len(piece) :]

    def _skip(self, stream: IO[bytes], n_bytes: int) -> None:
        # Not seek(): it reads up to 16 MiB at once.
        while n_bytes > 0:
            piece = stream.read(min(n_bytes, _CHUNK_BYTES))
            if not piece:
                raise EOFError("the data end too early")
            n_bytes -= len(piece)

    def _check_end(self, stream: IO[bytes]) -> None:
        stream.read(1)  # zipfile compares the checksum when it meets the end


@dataclass(frozen=True)
class MappedArray:
    """A `.npy` file, memory-mapped: the system reads the rows that are looked at."""

    path: Path

    @property
    def where(self) -> str:
        """The file."""
        return str(self.path)

    @cached_property
    def header(self) -> Header:
        """Dtype and shape; the file must be as long as they say."""
        return self._open()[0]

    def whole(self) -> Array:
        """All of the array, ``header.shape``."""
        return self._map().astype(self.header.dtype, order="C")

    def rows(self, pieces: Iterable[Rows]) -> Iterator[Array]:
        """The rows of each piece, copied out of the map."""
        mapped = self._map()
        for piece in pieces:
            yield mapped[np.asarray(piece, np.intp)].astype(self.header.dtype, order="C", copy=False)

    def _open(self) -> tuple[Header, int]:
        """Header, and the offset of the values in bytes."""
        try:
            with self.path.open("rb") as stream:
                header = _read_header(stream, self.where)
                offset = stream.tell()
                _require_size(header, self.path.stat().st_size - offset, self.where)
        except OSError as e:
            raise _damaged(self.where, e) from e
        return header, offset

    def _map(self) -> Array:
        header, offset = self._open()
        if header != self.header:
            raise DataError("the array changed while it was read", where=self.where)
        if not prod(header.shape):
            return np.empty(header.shape, header.stored_dtype)  # no bytes cannot be mapped
        mapped = np.memmap(
            self.path, header.stored_dtype, "r", offset, header.shape or (1,), "F" if header.fortran else "C"
        )
        return np.asarray(mapped).reshape(header.shape)


def zipped_arrays(path: Path) -> dict[str, ZippedArray]:
    """The arrays of an `.npz` archive by name, in the archive's order; no header is read.

    Raises:
        DataError: ``path`` is no archive.
    """
    if path.is_dir():
        raise DataError("an .npz archive is wanted, and this is a folder", where=str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except _UNREADABLE as e:
        raise DataError(
            f"the file cannot be read as an .npz archive: {e}",
            where=str(path),
            got=_content(path),
            want="an archive written by numpy.savez or numpy.savez_compressed",
            fix="check that the file was copied whole, or write it anew",
        ) from e
    return {name.removesuffix(".npy"): ZippedArray(path, name) for name in names if name.endswith(".npy")}


def _read_header(stream: IO[bytes], where: str) -> Header:
    try:
        version = npy_format.read_magic(stream)
        # Version 3 differs from 2 only in the names of structured fields, and no model takes structured arrays.
        reader = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, fortran, stored = reader(stream)
    except _UNREADABLE:
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


def _require_size(header: Header, got: int, where: str) -> None:
    want = prod(header.shape) * header.stored_dtype.itemsize
    if min(header.shape, default=0) < 0 or got < want:
        raise DataError(
            "the array is shorter than its header says",
            where=where,
            got=f"{got} bytes",
            want=f"{want} bytes for {header.stored_dtype}[{','.join(map(str, header.shape))}]",
            fix="check that the file was copied whole, or write it anew",
        )


def _damaged(where: str, error: Exception) -> DataError:
    return DataError(
        f"the data cannot be read: {error or type(error).__name__}",
        where=where,
        fix="check that the file was copied whole, or write it anew",
    )


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(6)
        size = path.stat().st_size
    except OSError as e:
        return e.strerror or type(e).__name__
    if not size:
        return "an empty file"
    if start == b"\x93NUMPY":
        return "a .npy file; name it under `npy: {input: file.npy}`"
    return f"{size} bytes that begin with {start!r}"


def _runs(piece: Rows) -> Iterator[tuple[int, int, int]]:
    """Neighbouring rows of ``piece`` as ``(first, last + 1, row)``: places in the piece, and the first one's row."""
    first = 0
    for place in range(1, len(piece) + 1):
        if place == len(piece) or piece[place] != piece[place - 1] + 1:
            yield first, place, int(piece[first])
            first = place
