"""Arrays on disk, read a few rows at a time: members of an `.npz` archive and `.npy` files.

Only headers are read when an array is opened. Object arrays are refused: reading one runs code that the file brings.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import Array
from onnxshrink.data.headers import UNREADABLE, Header, damaged, read_header, require_size

Rows: TypeAlias = range | NDArray[np.intp]
"""Row numbers, rising."""

_CHUNK_BYTES = 1 << 20
_NPY = "a .npy file: one array, and no archive"
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: lengths of the name and of the extra field behind it


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

    def at(self, rows: NDArray[np.intp]) -> Array:
        """Copies of the rows with these numbers, in any order."""


@dataclass(frozen=True)
class ZippedArray:
    """A member of an `.npz` archive, read as a stream: no more than one piece of rows is in memory.

    An array in Fortran order has its rows scattered over the member, and is read whole. For `at` the member is
    memory-mapped where it is stored as it is, and held in memory where it is compressed.
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

    def at(self, rows: NDArray[np.intp]) -> Array:
        """Copies of the rows with these numbers, in any order."""
        return _copied(self._held, rows, self.header)

    @cached_property
    def _held(self) -> Array:
        """All of the array; its bytes are checked against the archive's checksum once, here."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                member = archive.getinfo(self.member)
            if member.compress_type != zipfile.ZIP_STORED:
                return self.whole()
            with self._opened() as (stream, header):
                self._skip(stream, prod(header.shape) * header.stored_dtype.itemsize)
                self._check_end(stream)
            with self.path.open("rb") as file:
                file.seek(member.header_offset)
                file.seek(sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))), os.SEEK_CUR)
                read_header(file, self.where)
                return _mapped(self.path, header, file.tell())
        except UNREADABLE as e:
            raise damaged(self.where, e) from e

    @contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], Header]]:
        """The member's stream, behind its header."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                header = read_header(stream, self.where)
                size = archive.getinfo(self.member).file_size
                require_size(header, size - stream.tell(), self.where)
                if header != self.__dict__.get("header", header):
                    raise DataError("the array changed while it was read", where=self.where)
                yield stream, header
        except UNREADABLE as e:
            raise damaged(self.where, e) from e
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
            yield _copied(mapped, np.asarray(piece, np.intp), self.header)

    def at(self, rows: NDArray[np.intp]) -> Array:
        """Copies of the rows with these numbers, in any order."""
        return _copied(self._kept_map, rows, self.header)

    @cached_property
    def _kept_map(self) -> Array:
        return self._map()

    def _open(self) -> tuple[Header, int]:
        """Header, and the offset of the values in bytes."""
        try:
            with self.path.open("rb") as stream:
                header = read_header(stream, self.where)
                offset = stream.tell()
                require_size(header, self.path.stat().st_size - offset, self.where)
        except OSError as e:
            raise damaged(self.where, e) from e
        return header, offset

    def _map(self) -> Array:
        header, offset = self._open()
        if header != self.header:
            raise DataError("the array changed while it was read", where=self.where)
        return _mapped(self.path, header, offset)


def zipped_arrays(path: Path) -> dict[str, ZippedArray]:
    """The arrays of an `.npz` archive by name, in the archive's order; no header is read.

    Raises:
        DataError: ``path`` is no archive.
    """
    if path.is_dir():
        raise DataError(
            "an .npz archive is wanted, and this is a folder",
            where=str(path),
            got="a folder",
            want="an archive of numpy.savez",
            fix="name the file in it; a folder of pictures is {images: FOLDER} in place of {npz: FILE}",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except UNREADABLE as e:
        raise DataError(
            f"the file cannot be read as an .npz archive: {e}",
            where=str(path),
            got=_content(path),
            want="an archive written by numpy.savez or numpy.savez_compressed",
            fix="name it under `npy: {input: file.npy}` in place of `npz`"
            if _content(path) == _NPY
            else "check that the file was copied whole, or write it anew",
        ) from e
    return {name.removesuffix(".npy"): ZippedArray(path, name) for name in names if name.endswith(".npy")}


def _mapped(path: Path, header: Header, offset: int) -> Array:
    """The values from ``offset`` on, in bytes, as they lie in the file."""
    if not prod(header.shape):
        return np.empty(header.shape, header.stored_dtype)  # no bytes cannot be mapped
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.ndarray(header.shape, header.stored_dtype, mapped, offset, order="F" if header.fortran else "C")


def _copied(array: Array, rows: NDArray[np.intp], header: Header) -> Array:
    """Copies of some rows in this machine's byte order."""
    values = array[rows].astype(header.dtype, order="C", copy=False)
    if isinstance(array.base, mmap.mmap):
        # They stay in the system's cache, but no longer count as this process's memory.
        array.base.madvise(mmap.MADV_DONTNEED)
    return values


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
        return _NPY
    return f"{size} bytes that begin with {start!r}"


def _runs(piece: Rows) -> Iterator[tuple[int, int, int]]:
    """Neighbouring rows of ``piece`` as ``(first, last + 1, row)``: places in the piece, and the first one's row."""
    first = 0
    for place in range(1, len(piece) + 1):
        if place == len(piece) or piece[place] != piece[place - 1] + 1:
            yield first, place, int(piece[first])
            first = place
