"""Trials that outlive the process: an optuna study, in a file of the run or in a database that machines share."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from onnxshrink.core.drift import IDENTICAL
from onnxshrink.core.errors import ConfigError, DependencyError, ShrinkError, StoreError
from onnxshrink.core.store import room_on
from onnxshrink.search.pareto import Objectives
from onnxshrink.search.space import Dimension, Space
from onnxshrink.search.trial import SCHEME, Point, Trial, key_of, size_of, trial_of, trunk_of

if TYPE_CHECKING:
    from optuna import Study

BLOCK = 64
"""So many trunks are all tried, in an order of our own; of more, optuna draws as many at a time."""

_DRAWS = 2
"""So many draws for each trunk that is wanted: a sampler that is sure of itself draws the same ones again."""

_TRIAL = "trial"
_JOURNAL = "search.journal"
_INFINITE = 1e9


class Record:
    """The trials of one search, in the order in which they were added.

    Args:
        name: Names the search: a digest of all that can change a trial.
        space: Where the trials lie.
        storage: An optuna storage URL; None keeps a journal file in ``folder``.
        folder: Of the journal; made if it is not there.
        seed: Of the sampler.

    Raises:
        ConfigError: The storage cannot be opened.
        DependencyError: optuna is not installed.
        StoreError: The journal cannot be opened.
    """

    def __init__(self, name: str, space: Space, *, storage: str | None, folder: Path, seed: int) -> None:
        self._space, self._seed = space, seed
        self._pool: dict[str, Point] = {}
        self._told = partial(_told, storage, folder / _JOURNAL)
        with self._told("opened"):
            self._study = _open(name, storage, folder)
            texts = [frozen.user_attrs.get(_TRIAL) for frozen in self._study.get_trials(deepcopy=False)]
        self.trials: list[Trial] = list(_once(trial_of(json.loads(text)) for text in texts if text is not None))

    def add(self, trial: Trial) -> None:
        """Keep a trial.

        Raises:
            ConfigError: The storage takes no more.
            StoreError: The journal cannot be written.
        """
        with self._told("written"):
            _add(self._study, trial, self._space.dimensions)
        self.trials.append(trial)

    def trunks(self) -> list[Point]:
        """The trunks that the search may come to now; more of them once all of these were tried, if there are more.

        The same trials give the same trunks.

        Source: Watanabe, "Tree-Structured Parzen Estimator", 2023; many objectives as in Ozaki et al., GECCO 2020.
        """
        dimensions = [dimension for dimension in self._space.dimensions if dimension.name != SCHEME]
        n_trunks = math.prod(len(dimension.options) for dimension in dimensions)
        if n_trunks <= BLOCK:
            return list({key_of(trunk_of(point)): trunk_of(point) for point in self._space.points()}.values())
        while len(self._pool) < n_trunks and (n_trials := _until_tried(self._pool, self.trials)) is not None:
            count = min(BLOCK, n_trunks - len(self._pool))
            seed = self._seed + len(self._pool)
            self._pool |= _sampled(dimensions, self.trials[:n_trials], self._pool.keys(), seed, count)
        return list(self._pool.values())


def _until_tried(trunks: Collection[str], trials: Sequence[Trial]) -> int | None:
    """How many trials there were when the last of these trunks was tried; None if one was not."""
    left = set(trunks)
    for count, trial in enumerate(trials, start=1):
        if not left:
            return count - 1
        if trial.status != "predicted":
            left.discard(key_of(trunk_of(trial.point)))
    return None if left else len(trials)


def objectives(trial: Trial) -> Objectives:
    """Bytes and loss of quality of an evaluated trial: the accuracy drop, or else the drift in dB below zero.

    A quality that has no value, as of outputs that are not finite, is the worst of all.
    """
    drop = trial.worst("accuracy_drop")
    if drop is None:
        return size_of(trial), drift_db(trial)
    return size_of(trial), _INFINITE if drop.value is None else drop.value


def drift_db(trial: Trial) -> float:
    """The worst drift in dB below the signal: the less, the better; where none was measured, all are alike."""
    sqnr = trial.worst("sqnr_db")
    if sqnr is None or (sqnr.value is None and sqnr.note == IDENTICAL):
        return -_INFINITE
    return _INFINITE if sqnr.value is None else -sqnr.value


def _sampled(
    dimensions: Sequence[Dimension], seen: Sequence[Trial], known: Container[str], seed: int, count: int
) -> dict[str, Point]:
    """``count`` trunks that are not in ``known``, drawn where the evaluated trials were good, the rest by chance."""
    import optuna

    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=BLOCK // 2)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for trial in seen:
        if trial.status == "evaluated":
            _add(study, trial, dimensions)
    found: dict[str, Point] = {}
    for _ in range(_DRAWS * count):
        if len(found) == count:
            break
        asked = study.ask(_distributions(dimensions))
        trunk = {name: str(label) for name, label in asked.params.items()}
        if key_of(trunk) not in known:
            found.setdefault(key_of(trunk), trunk)
        study.tell(asked, state=optuna.trial.TrialState.FAIL)  # not run here: it must not count as a result
    chance = random.Random(seed)  # noqa: S311  nothing secret
    while len(found) < count:  # it draws what it has drawn before, over and over
        trunk = {dimension.name: chance.choice(dimension.options).label for dimension in dimensions}
        if key_of(trunk) not in known:
            found.setdefault(key_of(trunk), trunk)
    return found


def _distributions(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution

    return {
        dimension.name: CategoricalDistribution([option.label for option in dimension.options])
        for dimension in dimensions
    }


def _add(study: Study, trial: Trial, dimensions: Sequence[Dimension]) -> None:
    from optuna.trial import TrialState, create_trial

    done = trial.status == "evaluated" and math.isfinite(size_of(trial))
    study.add_trial(
        create_trial(
            state=TrialState.COMPLETE if done else TrialState.PRUNED,
            params={dimension.name: trial.point[dimension.name] for dimension in dimensions},
            distributions=_distributions(dimensions),
            values=list(objectives(trial)) if done else None,
            user_attrs={_TRIAL: json.dumps(asdict(trial), allow_nan=False)},
        )
    )


def _open(name: str, storage: str | None, folder: Path) -> Study:
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as e:
        raise DependencyError(
            "a search needs optuna, and it is not installed",
            where=f"the packages of {sys.executable}",
            got="no optuna",
            want="the search extra",
            fix="pip install -e '.[search]' in the checkout, or pip install 'onnxshrink[search]'",
        ) from e
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept: Any = storage
    if storage is None:
        folder.mkdir(parents=True, exist_ok=True)
        # A lock of the kernel's: optuna's own is a file, which a killed process leaves, and the next one waits for.
        lock: Any = FileLock(folder / f"{_JOURNAL}.lock")
        with lock:
            _mend(folder / _JOURNAL)
        kept = optuna.storages.JournalStorage(JournalFileBackend(str(folder / _JOURNAL), lock))
    return optuna.create_study(study_name=name, storage=kept, directions=["minimize", "minimize"], load_if_exists=True)


@contextmanager
def _told(storage: str | None, journal: Path, done: str) -> Iterator[None]:
    """Turn what goes wrong with the trials' storage into an error the user can act on."""
    try:
        yield
    except ShrinkError:
        raise
    except Exception as e:  # sqlalchemy and its drivers raise a dozen types
        if storage is None:
            raise StoreError(
                f"the search's journal cannot be {done}: {e}",
                where=str(journal),
                got=room_on(journal.parent),
                want="a folder that can be written, with room on the disk",
                fix="make it so, or name another folder: --runs PATH",
            ) from e
        raise ConfigError(
            f"the storage of the search cannot be {done}: {e}",
            where="budget.storage",
            got=storage,
            want="an optuna storage URL such as sqlite:///search.db, or none",
            fix="correct it, or leave `storage` out: trials are then kept in the run's folder",
        ) from e


def _once(trials: Iterable[Trial]) -> Iterator[Trial]:
    """The trials without those of another search that ran at the same time: it counted alike, from where both began."""
    seen: set[object] = set()
    for trial in trials:
        mine = {trial.number, (key_of(trial.point), trial.status)}
        if not seen & mine:
            seen |= mine
            yield trial


def _mend(journal: Path) -> None:
    """Cut off a last line that was not finished: whoever wrote it was killed, and what follows it could not be read."""
    if journal.exists() and not (text := journal.read_bytes()).endswith(b"\n"):
        journal.write_bytes(text[: text.rfind(b"\n") + 1])
