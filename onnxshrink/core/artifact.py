"""The one value that flows through a run: a read-only folder and the digest of its contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NewType, TypeAlias

Kind: TypeAlias = Literal["torch", "onnx", "ort", "ranges", "evidence"]
Digest = NewType("Digest", str)
"""Hexadecimal sha256."""

Facts: TypeAlias = dict[str, Any]
"""What a stage says of its work: plain JSON values, units in the names."""

ONNX_FILE = "model.onnx"
"""The model's file name inside an artifact of kind ``onnx``."""

WEIGHTS_FILE = "weights.safetensors"
"""The weights' file name inside an artifact of kind ``torch``."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Artifact:
    """A stage's result: immutable, known by what it contains.

    Attributes:
        kind: What the folder holds: a torch network as data, an ONNX or ORT model, calibration ranges, or measurements.
        path: A read-only folder, in the store once the stage is done.
        digest: sha256 over the folder's relative file names and bytes.
    """

    kind: Kind
    path: Path
    digest: Digest

    @property
    def model_path(self) -> Path:
        """The ``.onnx`` file of an artifact of kind ``onnx``."""
        return self.path / ONNX_FILE

    @property
    def model_bytes(self) -> int | None:
        """What the model weighs: its file with external data, or the weights of a network; None where it is none."""
        match self.kind:
            case "torch":
                return size_bytes(self.path / WEIGHTS_FILE)
            case "onnx" | "ort":
                return size_bytes(self.path)
            case _:
                return None


def files_of(folder: Path) -> Iterator[Path]:
    """Every file below ``folder``, in an order that does not depend on the file system."""
    yield from sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.relative_to(folder).parts)


def size_bytes(folder: Path) -> int:
    """Bytes of every file below ``folder``, or of the file itself."""
    return folder.stat().st_size if folder.is_file() else sum(path.stat().st_size for path in files_of(folder))


def digest_file(path: Path) -> Digest:
    """sha256 of a file's bytes, read in chunks."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha.update(chunk)
    return Digest(sha.hexdigest())


def digest_folder(folder: Path) -> Digest:
    """sha256 over the relative names and the bytes of every file below ``folder``."""
    sha = hashlib.sha256()
    for path in files_of(folder):
        sha.update(os.fsencode(path.relative_to(folder).as_posix()) + f"\0{digest_file(path)}\0".encode())
    return Digest(sha.hexdigest())


def digest_path(path: Path) -> Digest:
    """sha256 of a file's bytes, or of a folder's names and bytes."""
    return digest_folder(path) if path.is_dir() else digest_file(path)


def digest_json(value: Mapping[str, Any]) -> Digest:
    """sha256 of plain JSON values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Digest(hashlib.sha256(text.encode()).hexdigest())
