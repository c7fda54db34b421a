"""The content-addressed store: what a stage made once is never made again, and never found half-written.

```
store/objects/<sha256>/…    a folder of read-only files, named by the digest of its contents
store/memo/<key>.json       key of (stage, settings, input, code, versions) → object digest, facts, seconds
store/work/<random>/        a stage at work, locked as long as its process lives; the next run removes what is not
store/partial/<key>/        what a killed stage can go on from; removed when it is done, or after 30 days without use
```

Both writes are one rename on one file system, so a reader sees all or nothing, and two runs that make the same object
agree on it. A memo hit is believed only after the object's bytes were hashed again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onnxshrink.core.artifact import Artifact, Digest, Facts, Kind, digest_folder, files_of
from onnxshrink.core.errors import ConfigError, StoreError

_KEPT_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Entry:
    """A memoized result.

    Attributes:
        artifact: The object, verified.
        facts: What the stage said of its work.
        seconds: How long the work took when it was done.
        cached: True if it was found, False if it was made now.
    """

    artifact: Artifact
    facts: Facts
    seconds: float
    cached: bool


class Store:
    """A folder of immutable objects and a memo of which work gave which object.

    Args:
        root: The store's folder; made if it is not there.

    Raises:
        StoreError: The folder cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        with _told(self.root):
            for folder in (self._objects, self._memo, self._work):
                folder.mkdir(parents=True, exist_ok=True)
            self._sweep()

    @property
    def _objects(self) -> Path:
        return self.root / "objects"

    @property
    def _memo(self) -> Path:
        return self.root / "memo"

    @property
    def _work(self) -> Path:
        return self.root / "work"

    def partial(self, key: Digest) -> Path:
        """A folder, not made here, that is kept until ``key`` is made: for what a killed stage can go on from."""
        return self.root / "partial" / key

    def find(self, key: Digest, kind: Kind) -> Entry | None:
        """The result remembered under ``key``, or None if there is none or its object is damaged.

        Raises:
            StoreError: The store cannot be read.
        """
        with _told(self.root):
            try:
                memo = json.loads((self._memo / f"{key}.json").read_bytes())
                digest, facts, seconds = Digest(memo["object"]), memo["facts"], memo["seconds"]
            except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, cut short, or not ours
                return None
            path = self._objects / str(digest)
            if not _is_intact(path, digest):
                return None
        return Entry(Artifact(kind, path, digest), facts, seconds, cached=True)

    def make(self, key: Digest, kind: Kind, work: Callable[[Path], Facts], clock: Callable[[], float]) -> Entry:
        """Do ``work`` in a fresh folder, keep the folder as an object, and remember it under ``key``.

        Nothing is kept if ``work`` raises or the process dies.

        Args:
            key: What the result follows from.
            kind: What ``work`` makes.
            work: Fills the folder it is given, and returns plain JSON.
            clock: Seconds that only rise.

        Returns:
            The same that `find` will give, with ``cached`` False.

        Raises:
            StoreError: The store cannot be written, or the disk is full.
            TypeError: A fact is not plain JSON.
            ValueError: A fact is NaN or infinite.
        """
        with self._workplace() as place:
            folder = place / "object"
            with _told(self.root):
                folder.mkdir()
            start = clock()
            with _told(self.root, only=_DISK_FULL):
                facts = work(folder)
            seconds = round(clock() - start, 3)
            facts = json.loads(json.dumps(facts, allow_nan=False))  # as it will be found; fails before it is kept
            with _told(self.root):
                digest = self._keep(folder, place)
                memo = {"object": digest, "facts": facts, "seconds": seconds}
                write_atomically(self._memo / f"{key}.json", json.dumps(memo, indent=1).encode(), scratch=place)
        shutil.rmtree(self.partial(key), ignore_errors=True)
        return Entry(Artifact(kind, self._objects / digest, digest), facts, seconds, cached=False)

    def _keep(self, folder: Path, place: Path) -> Digest:
        """Move ``folder`` among the objects; what is damaged there makes way."""
        for path in files_of(folder):
            path.chmod(0o444)
            _sync(path)
        for path in sorted(path for path in folder.rglob("*") if path.is_dir()):
            _sync(path)
        _sync(folder)
        digest = digest_folder(folder)
        target = self._objects / digest
        while not _is_intact(target, digest):
            with contextlib.suppress(FileNotFoundError):
                target.rename(Path(tempfile.mkdtemp(dir=place)) / "damaged")
            try:
                folder.rename(target)
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another run kept the same object first
                    raise
        _sync(self._objects)
        return digest

    @contextmanager
    def _workplace(self) -> Iterator[Path]:
        """A folder that is locked while the process lives, so that no other run sweeps it away.

        A lock, unlike a process id in the name, is never taken over by a stranger and holds between containers.
        """
        with _told(self.root):
            place, lock = self._locked_folder()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            os.close(lock)

    def _locked_folder(self) -> tuple[Path, int]:
        while True:
            place = Path(tempfile.mkdtemp(dir=self._work))
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(place, os.O_RDONLY)
                # Where the file system has no locks, no run can take one to sweep either.
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_SH)
                if place.exists():
                    return place, lock
                os.close(lock)  # swept between mkdtemp and flock

    def _sweep(self) -> None:
        """Remove the workplaces of runs that were killed, those whose lock can be had, and partial work left behind."""
        for place in sorted(self.root.glob("partial/*")):
            with contextlib.suppress(OSError):
                unused_seconds = time.time() - place.stat().st_mtime
                if unused_seconds > _KEPT_SECONDS or (self._memo / f"{place.name}.json").exists():
                    shutil.rmtree(place)
        for place in sorted(self._work.iterdir()):
            # Not ours, not lockable or already gone: what cannot be swept does no harm.
            with contextlib.suppress(OSError):
                lock = os.open(place, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(place)
                finally:
                    os.close(lock)


def require_output(out: Path, *inputs: Path) -> None:
    """Refuse a file to write, before any work, that cannot be written or would overwrite an input.

    Raises:
        ConfigError: It is one of ``inputs`` or a folder, or its folder is not there or read-only.
    """
    if out.resolve() in {file.resolve() for file in inputs}:
        raise ConfigError(
            "the output would overwrite an input",
            where=str(out),
            got="the same file for both",
            want="a file of its own",
            fix="name another file: -o PATH",
        )
    if out.is_dir():
        raise ConfigError(
            "the output is a folder",
            where=str(out),
            got="a folder",
            want="a file",
            fix=f"name a file in it: -o {out / 'model.onnx'}",
        )
    if not out.parent.is_dir():
        raise ConfigError(
            "the output's folder is not there",
            where=str(out.parent),
            got="nothing",
            want="a folder",
            fix=f"mkdir -p {out.parent}",
        )
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(
            "the output's folder cannot be written",
            where=str(out.parent),
            got="a folder that is read-only",
            want="a folder that can be written",
            fix="make it writable, or name another file: -o PATH",
        )


def write_atomically(path: Path, content: bytes, *, scratch: Path | None = None) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, whatever happens in between.

    Args:
        path: The file to write.
        content: Its bytes.
        scratch: A folder on the same file system for the unfinished file; the file's own folder by default.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".part", dir=scratch or path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:  # Ctrl-C as well: nothing unfinished stays behind, and it is raised on
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def room_on(folder: Path) -> str:
    """``12.3 MB free on the disk``: of the nearest folder that is there."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(there).free / 1e6:.1f} MB free on the disk of {there}"


def _is_intact(path: Path, digest: Digest) -> bool:
    """True if the object is there with the bytes it was made with."""
    try:
        return path.is_dir() and digest_folder(path) == digest
    except FileNotFoundError:  # it was replaced while we read
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


@contextmanager
def _told(root: Path, *, only: frozenset[int] | None = None) -> Iterator[None]:
    """Turn what the operating system says about the store into an error the user can act on.

    Args:
        root: The store's folder.
        only: Error numbers to tell so; others pass. All by default.
    """
    try:
        yield
    except OSError as e:
        if only is not None and e.errno not in only:
            raise
        raise StoreError(
            f"the store cannot be used: {e.strerror or e}",
            where=str(e.filename or root),
            got=room_on(root),
            want="a folder that can be written, with room on the disk",
            fix=f"{'free some space' if e.errno in _DISK_FULL else 'make it writable'}, "
            "or name another folder: --runs PATH",
        ) from e
