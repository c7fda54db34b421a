from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from onnxshrink.core.artifact import Artifact, Digest, Facts, digest_folder
from onnxshrink.core.errors import ConfigError, DataError, ModelError, ShrinkError
from onnxshrink.runtime import processes
from onnxshrink.runtime.processes import Follower, Leader, launched

STEP = Digest("a" * 64)
OTHER = Digest("b" * 64)


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Leader, Follower]:
    """Two processes in one, which no disk is shared by."""
    store = HashStore()
    monkeypatch.setattr(processes, "_connect", lambda: PrefixStore("test", store))
    monkeypatch.setattr(processes, "_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(processes, "_CHUNK_BYTES", 1000)
    is_here = processes._is_here
    own = tmp_path / "follower"
    monkeypatch.setattr(processes, "_is_here", lambda path, digest: own in path.parents and is_here(path, digest))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    own.mkdir()
    return Leader(2), Follower(own)


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """Run the first process in a thread."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(20)
    assert not thread.is_alive()


def made(folder: Path, contents: dict[str, bytes]) -> Callable[[Callable[[Path], Facts]], Artifact]:
    """What runs a step: the work is done in ``folder``."""

    def run(work: Callable[[Path], Facts]) -> Artifact:
        folder.mkdir()
        work(folder)
        for name, content in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return Artifact("torch", folder, digest_folder(folder))

    return run


def nothing(_: Path) -> Facts:
    return {}


def unwanted(_: object) -> Facts:
    pytest.fail("this is not the follower's to do")


def failing(_: Path) -> Facts:
    raise DataError("no samples")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, (2, 3)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, (0, 1)),  # what other software leaves there
    ],
)
def test_the_environment_says_which_process_this_is(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torchrun's variables, all of them."""
    for name in processes._LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


def test_a_result_is_sent_where_there_is_no_common_disk(team: tuple[Leader, Follower], tmp_path: Path) -> None:
    """Byte for byte, in pieces, with folders and empty files; the work is the first one's alone."""
    leader, follower = team
    contents = {"weights": bytes(range(256)) * 10, "more/data": b"x" * 1000, "more/nothing": b""}
    run = made(tmp_path / "made", contents)
    with beside(lambda: leader.step(STEP, "source", trains=False, work=nothing, run=run)):
        artifact = follower.step(STEP, "source", trains=False, work=unwanted, run=unwanted)  # type: ignore[arg-type]
    assert {name: (artifact.path / name).read_bytes() for name in contents} == contents
    assert digest_folder(artifact.path) == artifact.digest
    assert tmp_path / "follower" in artifact.path.parents


def test_both_do_what_trains_and_take_the_first_ones_result(team: tuple[Leader, Follower], tmp_path: Path) -> None:
    """Nested steps as well; what the other process makes is thrown away."""
    leader, follower = team
    done: list[str] = []

    def work_of(member: Leader | Follower, name: str) -> Callable[[Path], Facts]:
        def work(folder: Path) -> Facts:
            inner = made(tmp_path / "inner", {"inner": name.encode()})
            given = member.step(OTHER, "inner", trains=False, work=nothing, run=inner)
            (folder / "result").write_bytes((given.path / "inner").read_bytes() + name.encode())
            done.append(name)
            return {}

        return work

    run = made(tmp_path / "made", {})
    with beside(lambda: leader.step(STEP, "distill", trains=True, work=work_of(leader, "first"), run=run)):
        artifact = follower.step(STEP, "distill", trains=True, work=work_of(follower, "other"), run=unwanted)  # type: ignore[arg-type]
    assert sorted(done) == ["first", "other"]
    assert (artifact.path / "result").read_bytes() == b"firstfirst"


def test_a_step_that_fails_fails_for_all(team: tuple[Leader, Follower], tmp_path: Path) -> None:
    """The first one keeps its own error, the other is told; both come to the next step."""
    leader, follower = team
    errors: list[ShrinkError] = []

    def lead() -> None:
        for number, trains in enumerate((False, True)):
            try:
                leader.step(STEP, "prune", trains=trains, work=failing, run=made(tmp_path / f"{number}", {}))
            except DataError as e:
                errors.append(e)
        leader.step(OTHER, "next", trains=False, work=nothing, run=made(tmp_path / "next", {"a": b"a"}))

    with beside(lead):
        for trains in (False, True):
            with pytest.raises(ModelError, match="no samples"):
                follower.step(STEP, "prune", trains=trains, work=failing, run=unwanted)  # type: ignore[arg-type]
        follower.step(OTHER, "next", trains=False, work=unwanted, run=unwanted)  # type: ignore[arg-type]
    assert [error.what for error in errors] == ["no samples"] * 2


def test_an_error_of_its_own_ends_the_other_process(team: tuple[Leader, Follower], tmp_path: Path) -> None:
    """Where the first one works on, the other does not wait for it."""
    leader, follower = team
    over = threading.Event()

    def work(_: Path) -> Facts:
        over.wait(20)
        return {}

    run = made(tmp_path / "made", {})
    with beside(lambda: leader.step(STEP, "distill", trains=True, work=work, run=run)):
        with pytest.raises(DataError, match="no samples"):
            follower.step(STEP, "distill", trains=True, work=failing, run=unwanted)  # type: ignore[arg-type]
        follower._store.set("1/answer/1", "here")
        over.set()


def test_another_step_than_the_first_ones_is_refused(team: tuple[Leader, Follower], tmp_path: Path) -> None:
    """Other data, code or packages on another machine are told, not trained with."""
    leader, follower = team
    run = made(tmp_path / "made", {})
    with beside(lambda: leader.step(STEP, "distill", trains=False, work=nothing, run=run)):
        with pytest.raises(ConfigError, match="process 1 does not have what the first one has"):
            follower.step(OTHER, "distill", trains=False, work=nothing, run=unwanted)  # type: ignore[arg-type]
        follower._store.set("0/answer/1", "here")


def test_what_the_first_one_does_alone_is_its_own(team: tuple[Leader, Follower], tmp_path: Path) -> None:
    """Steps inside a step that does not train are not told, nor is anything once the others are dismissed."""
    leader, follower = team

    def work(_: Path) -> Facts:
        leader.step(OTHER, "inner", trains=False, work=nothing, run=made(tmp_path / "inner", {"a": b"a"}))
        return {}

    def lead() -> None:
        leader.step(STEP, "outer", trains=False, work=work, run=made(tmp_path / "outer", {"b": b"b"}))
        leader.dismiss()

    with beside(lead):
        artifact = follower.step(STEP, "outer", trains=False, work=unwanted, run=unwanted)  # type: ignore[arg-type]
        follower.leave()
    assert (artifact.path / "b").read_bytes() == b"b"
    assert launched() == (0, 1)
    leader.step(OTHER, "later", trains=True, work=nothing, run=made(tmp_path / "later", {"c": b"c"}))
