"""What digests promise: they follow names and bytes, and nothing else."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from onnxshrink.core.artifact import (
    Artifact,
    Digest,
    digest_file,
    digest_folder,
    digest_json,
    digest_path,
    files_of,
    size_bytes,
)

FILES = {"model.onnx": b"graph", "sub/data": b"weights", "a": b""}


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    """``path`` with the files, written in the order of the mapping."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_a_folders_digest_depends_on_names_and_bytes_only(tmp_path: Path) -> None:
    """Neither place, order of writing, times nor modes change the digest."""
    one = folder_of(tmp_path / "one", FILES)
    two = folder_of(tmp_path / "two", dict(reversed(FILES.items())))
    os.utime(two / "a", (0, 0))
    (two / "a").chmod(0o444)
    assert digest_folder(one) == digest_folder(two)


def test_a_folders_digest_is_its_listing_hashed(tmp_path: Path) -> None:
    """The digest is sha256 over name, NUL, sha256 of the bytes, NUL, by name."""
    listing = b"".join(
        name.encode() + b"\0" + hashlib.sha256(FILES[name]).hexdigest().encode() + b"\0" for name in sorted(FILES)
    )
    assert digest_folder(folder_of(tmp_path, FILES)) == hashlib.sha256(listing).hexdigest()


@pytest.mark.parametrize(
    "changed",
    [
        {**FILES, "a": b"x"},
        {**FILES, "extra": b""},
        {"model.onnx": b"graph", "sub/data": b"weights", "b": b""},
        {"model.onnx": b"graph", "sub2/data": b"weights", "a": b""},
        {"model.onnx": b"weights", "sub/data": b"graph", "a": b""},
    ],
)
def test_any_change_of_a_folder_changes_the_digest(tmp_path: Path, changed: dict[str, bytes]) -> None:
    """Changed bytes, one more file, a renamed file or folder, swapped contents: all are seen."""
    assert digest_folder(folder_of(tmp_path / "a", FILES)) != digest_folder(folder_of(tmp_path / "b", changed))


def test_names_that_are_not_utf8_have_a_digest(tmp_path: Path) -> None:
    """File names are bytes to the system; those that are no text are hashed as well."""
    try:
        (tmp_path / os.fsdecode(b"\xff")).write_bytes(b"")
    except OSError:
        pytest.skip("the file system takes no such names")
    assert len(digest_folder(tmp_path)) == 64


def test_a_files_digest_is_sha256_of_its_bytes(tmp_path: Path) -> None:
    """Files larger than a chunk are hashed whole; digest_path takes files and folders."""
    path = tmp_path / "big"
    content = os.urandom(3 << 20)
    path.write_bytes(content)
    assert digest_file(path) == digest_path(path) == hashlib.sha256(content).hexdigest()
    assert digest_path(tmp_path) == digest_folder(tmp_path)


def test_files_and_sizes(tmp_path: Path) -> None:
    """Files come in the order of their names, folders apart; sizes add up."""
    folder = folder_of(tmp_path, FILES)
    assert [path.relative_to(folder).as_posix() for path in files_of(folder)] == ["a", "model.onnx", "sub/data"]
    assert size_bytes(folder) == 12
    assert size_bytes(folder / "model.onnx") == 5
    assert Artifact("onnx", folder, Digest("0")).model_path.read_bytes() == b"graph"


def test_json_digests_ignore_the_order_of_keys() -> None:
    """Order of keys does not matter, order of lists, types and values do; NaN is refused."""
    assert digest_json({"a": 1, "b": {"c": 2, "d": 3}}) == digest_json({"b": {"d": 3, "c": 2}, "a": 1})
    different = [{"a": [1, 2]}, {"a": [2, 1]}, {"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": None}, {"a": "é"}, {}]
    assert len({digest_json(value) for value in different}) == len(different)
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_json({"a": float("nan")})
