"""Laws of the store: what is made is found as it was made, and one changed byte is never believed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.core.artifact import Facts, digest_json
from onnxshrink.core.store import Store

FEW = settings(derandomize=True, deadline=None, max_examples=40)
NAMES = st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3})?", fullmatch=True).map(lambda name: f"d{name}.bin")
FILES = st.dictionaries(NAMES, st.binary(max_size=40), max_size=4)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
FACTS = st.dictionaries(
    st.text(), st.recursive(SCALARS, lambda inner: st.lists(inner) | st.tuples(inner), max_leaves=5)
)
ACTIONS = st.lists(st.tuples(st.integers(0, 3), FILES, FACTS), max_size=6)


@pytest.fixture(scope="module", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Waiting for the disk, which matters in a power cut only, is most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def write(files: dict[str, bytes], folder: Path) -> None:
    """The files, in sub-folders where their names have a slash."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@FEW
@given(ACTIONS)
def test_the_last_result_of_a_key_is_found(tmp_path_factory: pytest.TempPathFactory, actions: list[Any]) -> None:
    """Whatever is made, in whatever order, each key gives its last files and facts, by this store or a new one."""
    root = tmp_path_factory.mktemp("store")
    store = Store(root)
    last: dict[int, tuple[dict[str, bytes], Facts]] = {}
    for key, files, facts in actions:

        def work(folder: Path, files: dict[str, bytes] = files, facts: Facts = facts) -> Facts:
            write(files, folder)
            return facts

        made = store.make(digest_json({"key": key}), "onnx", work, lambda: 0.0)
        last[key] = (files, made.facts)
        assert contents(made.artifact.path) == files
    for key in range(4):
        found = Store(root).find(digest_json({"key": key}), "onnx")
        if key not in last:
            assert found is None
            continue
        assert found is not None
        assert (contents(found.artifact.path), found.facts) == last[key]
    objects = list((root / "objects").iterdir())
    assert len(objects) == len({tuple(sorted(files.items())) for _, files, _ in actions})


@FEW
@given(FILES.filter(lambda files: any(files.values())), st.data())
def test_one_changed_byte_is_noticed_and_mended(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    """An object with any one byte changed is not found, and making it again brings the right bytes back."""
    store = Store(tmp_path_factory.mktemp("store"))
    key = digest_json({})

    def work(folder: Path) -> Facts:
        write(files, folder)
        return {}

    made = store.make(key, "onnx", work, lambda: 0.0)
    name = data.draw(st.sampled_from(sorted(name for name, content in files.items() if content)))
    at = data.draw(st.integers(0, len(files[name]) - 1))
    changed = bytearray(files[name])
    changed[at] ^= data.draw(st.integers(1, 255))
    (made.artifact.path / name).chmod(0o644)
    (made.artifact.path / name).write_bytes(changed)
    assert store.find(key, "onnx") is None
    store.make(key, "onnx", work, lambda: 0.0)
    found = store.find(key, "onnx")
    assert found is not None
    assert contents(found.artifact.path) == files
