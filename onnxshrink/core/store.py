"""The content-addressed store: what a stage made once is never made again, and never found half-written.

```
store/objects/<sha256>/…    a folder, read-only, named by the digest of its contents
store/memo/<key>.json       key of (stage, settings, input, code, versions) → object digest, facts, seconds
store/work/<pid>-<random>/  a stage at work; a killed run leaves it, the next run removes it
```

Both writes are one rename on one file system, so a reader sees all or nothing, and two runs that make the same object
agree on it. A memo hit is believed only after the object's bytes were hashed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxshrink.core.artifact import Artifact, Digest, Facts, Kind, digest_folder, files_of
from onnxshrink.core.errors import StoreError


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
    """A folder of immutable objects and a memo of which work gave which object."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        with _readable(self.root):
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

    def find(self, key: Digest, kind: Kind) -> Entry | None:
        """The result remembered under ``key``, or None if there is none or its object is damaged."""
        with _readable(self.root):
            try:
                memo = json.loads((self._memo / f"{key}.json").read_text(encoding="utf-8"))
            except (FileNotFoundError, json.JSONDecodeError):
                return None
            path = self._objects / memo["object"]
            if not path.is_dir() or digest_folder(path) != memo["object"]:
                return None
        return Entry(Artifact(kind, path, Digest(memo["object"])), memo["facts"], memo["seconds"], cached=True)

    def make(self, key: Digest, kind: Kind, work: Callable[[Path], Facts], clock: Callable[[], float]) -> Entry:
        """Do ``work`` in a fresh folder, keep the folder as an object, and remember it under ``key``.

        Nothing is kept if ``work`` raises or the process dies.
        """
        start = clock()
        with _readable(self.root), self._workplace() as folder:
            facts = work(folder)
            seconds = clock() - start
            json.dumps(facts, allow_nan=False)  # a fact that is not plain JSON is our bug: fail before it is kept
            artifact = self._keep(folder, kind)
            self._write_json(
                self._memo / f"{key}.json", {"object": artifact.digest, "facts": facts, "seconds": round(seconds, 3)}
            )
        return Entry(artifact, facts, seconds, cached=False)

    def _keep(self, folder: Path, kind: Kind) -> Artifact:
        for path in files_of(folder):
            path.chmod(0o444)
            _sync(path)
        digest = digest_folder(folder)
        target = self._objects / digest
        if target.is_dir() and digest_folder(target) != digest:  # damaged since it was made
            aside = self._work / f"{os.getpid()}-damaged-{digest}"
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        try:
            folder.rename(target)
        except OSError:  # another run kept the same object first
            if not target.is_dir():
                raise
        _sync(self._objects)
        return Artifact(kind, target, digest)

    @contextmanager
    def _workplace(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self._work))
        folder.chmod(0o755)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _write_json(self, path: Path, value: dict[str, Any]) -> None:
        write_atomically(path, json.dumps(value, indent=1, sort_keys=True).encode(), scratch=self._work)

    def _sweep(self) -> None:
        """Remove the workplaces of runs that were killed."""
        for folder in self._work.iterdir():
            pid = folder.name.partition("-")[0]
            if pid.isdigit() and not _is_alive(int(pid)):
                with contextlib.suppress(OSError):
                    shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def write_atomically(path: Path, content: bytes, *, scratch: Path | None = None) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, whatever happens in between.

    Args:
        path: The file to write.
        content: Its bytes.
        scratch: A folder on the same file system for the unfinished file; the file's own folder by default.
    """
    handle, name = tempfile.mkstemp(prefix=f"{os.getpid()}-", suffix=".part", dir=scratch or path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _readable(root: Path) -> Iterator[None]:
    """Turn what the operating system says about the store into an error the user can act on."""
    try:
        yield
    except OSError as e:
        if not (e.filename and str(e.filename).startswith(str(root))) and not _is_full(e):
            raise
        raise StoreError(
            f"the store cannot be used: {e.strerror or e}",
            where=str(e.filename or root),
            want="a folder that can be written, with room on the disk",
            fix="free some space, or name another folder: --runs PATH",
        ) from e


def _is_full(error: OSError) -> bool:
    import errno

    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
