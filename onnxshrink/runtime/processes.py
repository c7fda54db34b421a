"""Several processes on one run, as torchrun and ``accelerate launch`` start them: the first leads, the others follow.

Only the first one has the store, the report and a terminal. Of every step that leads to a training it says one by one:

```
work       the step trains: do it as well, and learn from your part of every batch
failed     it cannot be done
artifact   its result: where it lies and, for machines that do not have that disk, its bytes
```

They talk through the key-value store by which the launcher lets torch's process groups find each other.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from onnxshrink.core.artifact import Artifact, Digest, Facts, digest_folder, files_of
from onnxshrink.core.errors import ConfigError, ModelError, ShrinkError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # it has no __all__

    Work: TypeAlias = Callable[[Path], Facts]

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CHUNK_BYTES = 1 << 20
_PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 1.0


def launched() -> tuple[int, int]:
    """This process's number and how many there are, by the launcher's environment; ``(0, 1)`` without one."""
    if not all(os.environ.get(name) for name in _LAUNCHED):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def let_the_first_speak() -> None:
    """Wait before telling an error, in all processes but the first.

    What is wrong is most often wrong in all of them. The first one's message is enough, and ends the others.
    """
    if launched()[0] > 0:
        time.sleep(_PATIENCE_SECONDS)


class Team(Protocol):
    """What a process does about a step that all of them come to."""

    def step(self, digest: Digest, name: str, *, trains: bool, work: Work, run: Callable[[Work], Artifact]) -> Artifact:
        """Do a step, or have it done.

        Args:
            digest: All that the step follows from.
            name: Its name, for messages.
            trains: True if all processes do the work.
            work: Fills a folder.
            run: Gives the step's result by the store, and does the work it is given where the store has none.
        """


class Leader:
    """The first process.

    Args:
        count: How many processes there are.
        look: Raises if one of the others was lost, where no launcher sees to that.
    """

    def __init__(self, count: int, look: Callable[[], None] = lambda: None) -> None:
        self._followers = range(1, count)
        self._look = look
        self._store = _connect()
        self._said = 0
        self._alone = False

    def step(self, digest: Digest, name: str, *, trains: bool, work: Work, run: Callable[[Work], Artifact]) -> Artifact:
        """See `Team`: done alone or with the others, and told to them."""
        if self._alone:
            assert not (trains and self._followers), name  # noqa: S101  # they would have to know of it
            return run(work)

        def led(folder: Path) -> Facts:
            if not trains:
                with self._without_others():
                    return work(folder)
            self._say(digest, "work")
            try:
                return work(folder)
            except RuntimeError:
                # So torch tells that another process was lost. That one said why, and the launcher ends this one.
                time.sleep(_PATIENCE_SECONDS)
                raise

        try:
            artifact = run(led)
        except ShrinkError as e:
            self._say(digest, "failed", what=e.what)
            raise
        self._give(digest, artifact)
        return artifact

    def dismiss(self) -> None:
        """The others are done, and this is a process like any other from here on."""
        leave_group()
        self._await([f"left/{number}" for number in self._followers])
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        self._followers, self._alone = range(0), True

    @contextlib.contextmanager
    def _without_others(self) -> Iterator[None]:
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def _say(self, step: Digest, do: str, **more: Any) -> str:
        key = str(self._said)
        self._said += 1
        self._store.set(key, json.dumps({"step": step, "do": do, **more}))
        return key

    def _give(self, digest: Digest, artifact: Artifact) -> None:
        """Tell where the artifact lies, and send its bytes to those who do not find it there."""
        files = [(path, path.relative_to(artifact.path).as_posix()) for path in files_of(artifact.path)]
        named = {"kind": artifact.kind, "path": str(artifact.path), "digest": artifact.digest}
        key = self._say(digest, "take", **named, files=[(name, path.stat().st_size) for path, name in files])
        answers = [f"{key}/answer/{number}" for number in self._followers]
        self._await(answers)
        waiting = [number for number, answer in enumerate(answers, 1) if self._store.get(answer) == b"send"]
        chunks = (chunk for path, _ in files for chunk in _chunks(path)) if waiting else ()
        for index, chunk in enumerate(chunks):
            self._store.set(f"{key}/{index}", chunk)  # type: ignore[arg-type]  # the stub knows str only
            self._await([f"{key}/{index}/{number}" for number in waiting])
            self._store.delete_key(f"{key}/{index}")

    def _await(self, keys: Sequence[str]) -> None:
        while not _await(self._store, keys, _LOOK_SECONDS):
            self._look()


class Follower:
    """Any other process: it does what the first one says, and keeps nothing.

    Args:
        folder: Where to work, and to put what the first one sends.
    """

    def __init__(self, folder: Path) -> None:
        self._number = launched()[0]
        self._folder = folder
        self._store = _connect()
        self._heard = 0

    def step(self, digest: Digest, name: str, *, trains: bool, work: Work, run: Callable[[Work], Artifact]) -> Artifact:
        """See `Team`: only work that trains is done here, and what it gives is thrown away.

        Raises:
            ConfigError: This process came to another step than the first one.
            ModelError: The first one could not do it.
        """
        del trains, run
        key, said = self._hear(digest, name)
        if said["do"] == "work":
            with tempfile.TemporaryDirectory(dir=self._folder) as place:
                try:
                    work(Path(place))
                except ShrinkError:
                    # The first one fails in the same way, and knows what follows; or else this error ends the run.
                    if not self._is_told(_PATIENCE_SECONDS):
                        raise
            key, said = self._hear(digest, name)
        if said["do"] == "failed":
            raise ModelError(f"the first process failed: {said['what']}", where=name)
        return self._take(key, said)

    def leave(self) -> None:
        """Tell the first one that nothing more is done here."""
        leave_group()
        self._store.set(f"left/{self._number}", "")

    def _is_told(self, seconds: float = math.inf) -> bool:
        return _await(self._store, [str(self._heard)], seconds)

    def _hear(self, digest: Digest, name: str) -> tuple[str, dict[str, Any]]:
        self._is_told()
        key = str(self._heard)
        self._heard += 1
        said: dict[str, Any] = json.loads(self._store.get(key))
        if said["step"] != digest:
            raise ConfigError(
                f"process {self._number} does not have what the first one has",
                where=name,
                want="the same config, data, weights, code and packages on every machine",
            )
        return key, said

    def _take(self, key: str, said: dict[str, Any]) -> Artifact:
        path, digest = Path(said["path"]), Digest(said["digest"])
        here = _is_here(path, digest)
        self._store.set(f"{key}/answer/{self._number}", "here" if here else "send")
        if not here:
            path = self._folder / key
            self._receive(key, said["files"], path)
            if not _is_here(path, digest):
                raise ModelError("what the first process sent arrived damaged", where=str(path))
        return Artifact(said["kind"], path, digest)

    def _receive(self, key: str, files: Sequence[tuple[str, int]], folder: Path) -> None:
        folder.mkdir()
        index = 0
        for name, n_bytes in files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                while file.tell() < n_bytes:
                    _await(self._store, [f"{key}/{index}"])
                    file.write(self._store.get(f"{key}/{index}"))
                    self._store.set(f"{key}/{index}/{self._number}", "")
                    index += 1


def _connect() -> Store:
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # it has no __all__

    store, _, _ = next(rendezvous("env://"))
    return PrefixStore("onnxshrink", store)


def leave_group() -> None:
    """Leave torch's process group, if a training has made one."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    if "accelerate" in sys.modules:  # it remembers the group
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001  # no public name


def _await(store: Store, keys: Sequence[str], seconds: float = math.inf) -> bool:
    """Wait until all ``keys`` are there; False if they are not in time.

    Asked again and again: a blocking wait of the store would hear no Ctrl-C, and give up after half an hour.
    """
    pause, end = 0.001, time.monotonic() + seconds
    while not store.check(list(keys)):
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return True


def _is_here(path: Path, digest: Digest) -> bool:
    """True if this machine has the artifact's bytes at ``path``."""
    return path.is_dir() and digest_folder(path) == digest


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
