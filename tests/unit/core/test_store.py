"""What the store promises: results whole or not at all, found only when intact, shared between runs."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onnxshrink.core.artifact import Digest, Facts, digest_folder
from onnxshrink.core.errors import ConfigError, StoreError
from onnxshrink.core.store import Store, require_output, write_atomically

KEY = Digest("k" * 64)


def work(folder: Path) -> Facts:
    """Two files, one of them in a sub-folder."""
    (folder / "model.onnx").write_bytes(b"weights")
    (folder / "sub").mkdir()
    (folder / "sub" / "more").write_bytes(b"")
    return {"n_nodes": 3, "passes": ("a", "b"), "sparsity": 0.5}


def clock() -> Callable[[], float]:
    """A clock that advances 1.5 s a look."""
    return itertools.count(0.0, 1.5).__next__


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


def workplaces(store: Store) -> list[Path]:
    """What lies in the store's work folder."""
    return list((store.root / "work").iterdir())


def test_what_was_made_is_found(store: Store) -> None:
    """`find` gives what `make` gave, facts as plain JSON in both, and says that it was cached."""
    assert store.find(KEY, "onnx") is None
    made = store.make(KEY, "onnx", work, clock())
    found = Store(store.root).find(KEY, "onnx")
    assert found is not None
    assert (made.cached, found.cached) == (False, True)
    assert (made.artifact, made.facts, made.seconds) == (found.artifact, found.facts, found.seconds)
    assert found.facts == {"n_nodes": 3, "passes": ["a", "b"], "sparsity": 0.5}
    assert found.seconds == 1.5
    assert found.artifact.model_path.read_bytes() == b"weights"
    assert found.artifact.path.name == found.artifact.digest == digest_folder(found.artifact.path)


def test_facts_keep_their_order(store: Store) -> None:
    """A stage's facts are told in the order it gave them."""
    store.make(KEY, "onnx", lambda _: {"zebra": 1, "ant": 2}, clock())
    found = store.find(KEY, "onnx")
    assert found is not None
    assert list(found.facts) == ["zebra", "ant"]


def test_objects_are_read_only_files(store: Store) -> None:
    """No file of an object may be written, whoever looks at its mode."""
    made = store.make(KEY, "onnx", work, clock())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in made.artifact.path.rglob("*") if path.is_file()}
    assert modes == {0o444}


def test_equal_results_share_one_object(store: Store) -> None:
    """Two keys with the same bytes have one object."""
    one, two = (store.make(Digest(key), "onnx", work, clock()) for key in "ab")
    assert one.artifact == two.artifact
    assert len(list((store.root / "objects").iterdir())) == 1


def test_work_that_raises_leaves_nothing(store: Store) -> None:
    """A failure passes through as it is, and the store is as it was."""

    def failing(folder: Path) -> Facts:
        (folder / "half").write_bytes(b"half")
        msg = "boom"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="boom"):
        store.make(KEY, "onnx", failing, clock())
    assert store.find(KEY, "onnx") is None
    assert [path for path in store.root.rglob("*") if path.is_file()] == []
    assert workplaces(store) == []


@pytest.mark.parametrize(
    ("facts", "error"), [({"x": object()}, TypeError), ({"x": float("nan")}, ValueError), ({"x": b""}, TypeError)]
)
def test_facts_that_are_not_json_keep_nothing(store: Store, facts: Facts, error: type[Exception]) -> None:
    """A fact that JSON cannot hold is our bug, and neither object nor memo is kept."""
    with pytest.raises(error):
        store.make(KEY, "onnx", lambda _: facts, clock())
    assert store.find(KEY, "onnx") is None
    assert list((store.root / "objects").iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b'{"object": "x"}', b'{"object": 3, "facts": {}, "seconds": 0}']
)
def test_a_damaged_memo_is_not_found_and_made_anew(store: Store, content: bytes) -> None:
    """A memo that was cut short or is not ours is as if it were not there."""
    store.make(KEY, "onnx", work, clock())
    (store.root / "memo" / f"{KEY}.json").write_bytes(content)
    assert store.find(KEY, "onnx") is None
    store.make(KEY, "onnx", work, clock())
    assert store.find(KEY, "onnx") is not None


def _change(path: Path) -> None:
    (path / "model.onnx").chmod(0o644)
    (path / "model.onnx").write_bytes(b"Weights")


def _add(path: Path) -> None:
    (path / "extra").write_bytes(b"")


def _remove(path: Path) -> None:
    (path / "sub" / "more").unlink()


def _empty(path: Path) -> None:
    for file in (path / "model.onnx", path / "sub" / "more"):
        file.unlink()
    (path / "sub").rmdir()


def _replace(path: Path) -> None:
    _empty(path)
    path.rmdir()
    path.write_bytes(b"a file where the object was")


@pytest.mark.parametrize("tamper", [_change, _add, _remove, _empty, _replace])
def test_a_tampered_object_is_not_believed_and_is_replaced(store: Store, tamper: Callable[[Path], None]) -> None:
    """An object whose bytes changed is not found; making it again puts the right bytes in its place."""
    path = store.make(KEY, "onnx", work, clock()).artifact.path
    tamper(path)
    assert store.find(KEY, "onnx") is None
    again = store.make(KEY, "onnx", work, clock())
    assert again.artifact.path == path
    assert digest_folder(path) == again.artifact.digest
    assert store.find(KEY, "onnx") is not None
    assert workplaces(store) == []


def test_one_step_may_make_another(store: Store) -> None:
    """A stage may derive a second result while it works; both are kept."""

    def outer(folder: Path) -> Facts:
        inner = store.make(Digest("inner"), "onnx", work, clock())
        (folder / "of").write_text(inner.artifact.digest)
        return {}

    store.make(Digest("outer"), "ranges", outer, clock())
    assert store.find(Digest("inner"), "onnx") is not None
    assert store.find(Digest("outer"), "ranges") is not None


def in_another_process(code: str, store: Store) -> int:
    """Run ``code`` with ``Store``, ``os`` and the store's ``root`` at hand, and give the exit status."""
    head = "import os, pathlib, sys; from onnxshrink.core.store import Store; root = pathlib.Path(sys.argv[1]); "
    return subprocess.run([sys.executable, "-c", head + code, str(store.root)], check=False).returncode


def test_a_live_workplace_is_kept(store: Store) -> None:
    """Another run that opens the store while a stage works leaves its workplace alone."""

    def observed(folder: Path) -> Facts:
        (folder / "half").write_bytes(b"half")
        Store(store.root)
        assert in_another_process("Store(root)", store) == 0
        assert (folder / "half").read_bytes() == b"half"
        return {}

    store.make(KEY, "onnx", observed, clock())
    assert store.find(KEY, "onnx") is not None


def test_a_dead_workplace_is_swept(store: Store) -> None:
    """What a killed run left is removed when the store is opened, whatever process has its id now."""
    code = "Store(root).make('k', 'onnx', lambda folder: os.kill(os.getpid(), 9), lambda: 0.0)"
    assert in_another_process(code, store) == -signal.SIGKILL
    assert len(workplaces(store)) == 1
    Store(store.root)
    assert workplaces(store) == []


def test_a_store_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    """A file where the store should be is a StoreError that names it."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="the store cannot be used") as caught:
        Store(tmp_path / "file" / "store")
    assert "--runs" in (caught.value.fix or "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_store_is_told(store: Store) -> None:
    """A store without the right to write is a StoreError."""
    (store.root / "work").chmod(0o555)
    with pytest.raises(StoreError, match="Permission denied"):
        store.make(KEY, "onnx", work, clock())


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 64 KiB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("big", [lambda f: (f / "x").write_bytes(bytes(1 << 17)), lambda _: "x" * (1 << 17)])
def test_a_full_disk_is_told_and_nothing_is_kept(store: Store, big: Callable[[Path], Any]) -> None:
    """No room while the stage writes, or while its memo is written, is a StoreError and leaves no memo."""
    with pytest.raises(StoreError, match="File too large"):
        store.make(KEY, "onnx", lambda folder: {"fact": big(folder)}, clock())
    assert store.find(KEY, "onnx") is None
    assert workplaces(store) == []


def test_other_system_errors_of_a_stage_are_its_own(store: Store) -> None:
    """A stage that misses a file is not the store's fault."""
    with pytest.raises(FileNotFoundError):
        store.make(KEY, "onnx", lambda folder: {"x": (folder / "missing").read_text()}, clock())


def test_a_full_disk_seen_by_a_stage_is_the_stores_matter(store: Store) -> None:
    """ENOSPC from anywhere in a stage asks for room on the disk."""

    def full(_: Path) -> Facts:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StoreError, match="No space left"):
        store.make(KEY, "onnx", full, clock())


def test_two_processes_make_the_same_key_at_once(store: Store) -> None:
    """Runs side by side that make the same results agree on them and leave no rubbish."""
    script = """
import sys, pathlib
from onnxshrink.core.store import Store
store = Store(pathlib.Path(sys.argv[1]))
def work(folder):
    for i in range(5):
        (folder / f"{i}").write_bytes(bytes([i]) * 5000)
    return {"n": 5}
sys.stdin.read(1)
for turn in range(10):
    for key in "abc":
        if turn % 2 or store.find(key, "onnx") is None:
            print(store.make(key, "onnx", work, lambda: 0.0).artifact.digest)
"""
    command = [sys.executable, "-c", script, str(store.root)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = [process.communicate("x") for process in running]
    assert [process.returncode for process in running] == [0] * 4, outputs
    assert len({line for output, _ in outputs for line in output.split()}) == 1
    assert store.find(Digest("a"), "onnx") is not None
    assert workplaces(store) == []


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    """`write_atomically` leaves the new bytes and no unfinished file, and the old bytes when it fails."""
    path = tmp_path / "report.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(TypeError):
        write_atomically(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_memos_are_readable_json(store: Store) -> None:
    """A memo is plain JSON that names its object."""
    made = store.make(KEY, "onnx", work, clock())
    memo = json.loads((store.root / "memo" / f"{KEY}.json").read_text())
    assert memo == {"object": made.artifact.digest, "facts": made.facts, "seconds": 1.5}


def test_half_done_work_is_kept_until_it_is_done(store: Store) -> None:
    """A folder of its own for each key: it outlives a failure and the next run's sweep, not the result."""
    place = store.partial(KEY)
    assert not place.exists()
    assert place != store.partial(Digest("j" * 64))

    def half(_: Path) -> Facts:
        place.mkdir(parents=True)
        (place / "half").write_bytes(b"x")
        raise InterruptedError

    with pytest.raises(InterruptedError):
        store.make(KEY, "onnx", half, clock())
    assert [path.name for path in Store(store.root).partial(KEY).iterdir()] == ["half"]
    store.make(KEY, "onnx", work, clock())
    assert not place.exists()


def test_half_done_work_that_nobody_needs_is_swept(store: Store) -> None:
    """Left by a run that was killed just after the result was kept, or not used for a month."""
    store.make(KEY, "onnx", work, clock())
    old, new = Digest("o" * 64), Digest("n" * 64)
    for key in (KEY, old, new):
        store.partial(key).mkdir(parents=True)
    os.utime(store.partial(old), (0, 0))
    Store(store.root)
    assert [store.partial(key).exists() for key in (KEY, old, new)] == [False, False, True]


def test_an_output_in_a_folder_that_is_read_only_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after a search of twenty minutes; whoever is root may write everywhere, so the system's answer is made up."""
    monkeypatch.setattr("os.access", lambda _path, _mode: False)
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        require_output(tmp_path / "out.onnx", tmp_path / "model.onnx")
    assert (caught.value.where, caught.value.fix) == (
        str(tmp_path),
        "make it writable, or name another file: -o PATH",
    )
