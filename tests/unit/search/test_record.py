"""Trials outlive the process: in a journal of the run or in a database, and a search goes on as it would have gone."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from onnxshrink.core.drift import IDENTICAL
from onnxshrink.core.errors import ConfigError, DependencyError, StoreError
from onnxshrink.core.report import Metric
from onnxshrink.search.record import BLOCK, Record
from onnxshrink.search.space import Dimension, Option, Space
from onnxshrink.search.trial import SCHEME, Point, Trial, key_of

SCHEMES = Dimension(SCHEME, (Option("fp32", tail=()), Option("fp16", tail=())))


def space(*widths: int) -> Space:
    """As many trunks as the product of the numbers."""
    sizes = (Dimension(f"d{n}", tuple(Option(str(value)) for value in range(count))) for n, count in enumerate(widths))
    return Space({}, (*sizes, SCHEMES))


def trial(number: int, trunk: Point) -> Trial:
    """An evaluated one: the larger its options, the larger and the better it is."""
    place = sum(map(int, trunk.values()))
    metrics = (
        Metric("size_bytes", 100.0 + place, "bytes"),
        Metric("accuracy_drop", 1 / (1 + place), "ratio", 0.0, 1.0, target="cpu"),
        Metric("sqnr_db", None, "dB", target="cpu", output="y", note=IDENTICAL),
    )
    return Trial(number, {**trunk, SCHEME: "fp32"}, "evaluated", metrics, str(number), (0.1, 2e-9), seconds=1.5)


def record(folder: Path, space: Space, name: str = "n", *, storage: str | None = None, seed: int = 0) -> Record:
    return Record(name, space, storage=storage, folder=folder, seed=seed)


@pytest.mark.parametrize("database", [False, True])
def test_trials_come_back_as_they_were_added(tmp_path: Path, *, database: bool) -> None:
    """In their order, with every metric; from a file, or from a database that several machines may share."""
    storage = f"sqlite:///{tmp_path}/search.db" if database else None
    here, first = space(3), record(tmp_path, space(3), storage=storage)
    added = [trial(n, trunk) for n, trunk in enumerate(first.trunks())]
    added += [Trial(3, {"d0": "1", SCHEME: "fp16"}, "failed", reason="cannot be made", seconds=0.25)]
    for one in added:
        first.add(one)
    assert first.trials == added
    assert record(tmp_path, here, storage=storage).trials == added
    assert record(tmp_path, here, "another", storage=storage).trials == []
    assert (tmp_path / "search.journal").exists() is not database


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All five parts are told where it is not installed (hidden from the import system here), and nothing is made."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DependencyError, match="needs optuna") as error:
        record(tmp_path / "r", space(2))
    told = error.value
    assert (told.where, told.got, told.want) == (f"the packages of {sys.executable}", "no optuna", "the search extra")
    assert told.fix is not None
    assert "pip install -e '.[search]'" in told.fix
    assert "pip install 'onnxshrink[search]'" in told.fix
    assert not (tmp_path / "r").exists()


def test_all_trunks_are_offered_where_they_are_few(tmp_path: Path) -> None:
    """In the space's order, each once."""
    offered = record(tmp_path, space(2, 3)).trunks()
    assert [list(trunk.values()) for trunk in offered] == [[a, b] for a in "01" for b in "012"]


def test_of_many_trunks_a_block_is_offered_and_then_another(tmp_path: Path) -> None:
    """Different ones; more only when all were tried; and whoever goes on is offered the same."""
    here = space(10, 10, 2)
    whole = record(tmp_path / "whole", here)
    first = whole.trunks()
    assert len({key_of(trunk) for trunk in first}) == len(first) == BLOCK
    for n, trunk in enumerate(first[:-1]):
        whole.add(trial(n, trunk))
    assert whole.trunks() == first
    resumed = record(tmp_path / "whole", here)
    assert resumed.trunks() == first
    resumed.add(trial(BLOCK - 1, first[-1]))
    more = resumed.trunks()
    assert more[:BLOCK] == first
    assert len({key_of(trunk) for trunk in more}) == len(more) == 2 * BLOCK
    resumed.add(Trial(2 * BLOCK, {**first[0], SCHEME: "fp16"}, "evaluated", (Metric("size_bytes", 1.0, "bytes"),)))
    assert record(tmp_path / "whole", here).trunks() == resumed.trunks() == more
    other = record(tmp_path / "other", here, seed=1)
    assert other.trunks() != first


def test_in_the_end_every_trunk_is_offered(tmp_path: Path) -> None:
    """A last block is smaller; nothing is offered twice."""
    here, n_trunks = space(BLOCK + 3), BLOCK + 3
    all_of_them = record(tmp_path, here)
    for n, trunk in enumerate(all_of_them.trunks()):
        all_of_them.add(trial(n, trunk))
    assert len({key_of(trunk) for trunk in all_of_them.trunks()}) == len(all_of_them.trunks()) == n_trunks


def test_a_line_that_was_cut_off_is_cut_away(tmp_path: Path) -> None:
    """Its writer was killed: what was whole before it is there, and what comes after it can be read."""
    here, first = space(3), record(tmp_path, space(3))
    first.add(trial(0, {"d0": "0"}))
    with (tmp_path / "search.journal").open("a") as journal:
        journal.write('{"op_code": 4, "worker_')
    again = record(tmp_path, here)
    again.add(trial(1, {"d0": "1"}))
    assert [one.number for one in record(tmp_path, here).trials] == [0, 1]


def test_a_storage_that_cannot_be_opened_is_a_mistake_of_the_config(tmp_path: Path) -> None:
    """With its URL, and what is wanted."""
    url = f"sqlite:///{tmp_path}/none/of/these/search.db"
    with pytest.raises(ConfigError) as caught:
        record(tmp_path, space(3), storage=url)
    assert (caught.value.where, caught.value.got) == ("budget.storage", url)
    assert "sqlite" in (caught.value.want or "")


def test_what_two_searches_added_at_the_same_time_counts_once(tmp_path: Path) -> None:
    """They count alike: of each number, and of each point to each depth, the first is kept."""
    here = space(3)
    one, other = record(tmp_path, here), record(tmp_path, here)
    first, second = trial(0, {"d0": "0"}), trial(1, {"d0": "1"})
    for mine in (one, other):
        mine.add(first)
    one.add(second)
    other.add(trial(1, {"d0": "2"}))
    other.add(trial(2, {"d0": "1"}))
    assert record(tmp_path, here).trials == [first, second]


def test_a_journal_that_cannot_be_made_names_the_folder_of_runs(tmp_path: Path) -> None:
    """Nobody asked for a storage: the fix is another folder, not another URL."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StoreError, match="journal cannot be opened") as caught:
        record(tmp_path / "runs" / ".r.search", space(3))
    assert caught.value.where == str(tmp_path / "runs" / ".r.search" / "search.journal")
    assert "--runs" in (caught.value.fix or "")


def test_a_full_disk_while_trials_are_kept_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mistake that the user can mend, and what was kept before is there."""
    here, first = space(3), record(tmp_path, space(3))
    first.add(trial(0, {"d0": "0"}))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr("os.fsync", full)
        with pytest.raises(StoreError, match="No space left") as caught:
            first.add(trial(1, {"d0": "1"}))
    assert "free on the disk" in (caught.value.got or "")
    assert record(tmp_path, here).trials[0] == trial(0, {"d0": "0"})


def test_a_database_that_is_lost_is_told(tmp_path: Path) -> None:
    """Its tables are gone in the middle of the search."""
    url = f"sqlite:///{tmp_path}/search.db"
    first = record(tmp_path, space(3), storage=url)
    (tmp_path / "search.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        first.add(trial(0, {"d0": "0"}))
    assert (caught.value.where, caught.value.got) == ("budget.storage", url)
    assert "leave `storage` out" in (caught.value.fix or "")
