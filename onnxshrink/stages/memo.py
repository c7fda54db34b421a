"""How stages are run: each arrow is looked up by all that can change its result, and done only if it is new."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import onnxshrink
from onnxshrink.calibration.parts import Sharding
from onnxshrink.config.base import fingerprint
from onnxshrink.config.data import DataRoles, Role
from onnxshrink.config.source import ModelSource, OnnxSource
from onnxshrink.config.stages import AnyStage
from onnxshrink.core.artifact import Artifact, Digest, Facts, Kind, digest_file, digest_json
from onnxshrink.core.errors import DependencyError, ShrinkError
from onnxshrink.core.events import Events
from onnxshrink.core.machine import ONNX_RUNTIMES, processor_features, versions
from onnxshrink.core.report import Step
from onnxshrink.core.store import Entry, Store
from onnxshrink.runtime.isa import detect_isa
from onnxshrink.runtime.processes import Team
from onnxshrink.stages import work_of
from onnxshrink.stages.context import Context
from onnxshrink.stages.source import open_source

_ROOMS = ("core", "config", "data", "runtime", "calibration", "stages", "verify")
_ONNX_LIBRARIES = ("numpy", "onnx", "onnx-ir", *ONNX_RUNTIMES, "onnxscript", "onnxslim", "pillow")
_TORCH_LIBRARIES = ("accelerate", "numpy", "pillow", "safetensors", "torch", "torch-pruning")


_INNER = "steps within"
"""Beside a step's facts in the store: the steps that it took, so that a run that finds it shows them as well."""

Inner: TypeAlias = tuple[str, str, Kind, Digest]
"""A step within another: the end of its name, its kind, what it gives, and what it is remembered under."""


class Memo:
    """Runs stages through the store, and keeps a record of every step.

    A step's key covers the stage's settings with the contents of the files they name, our own source and that
    of every user callable, the input artifact, the data it may read, the seed, and the versions of its libraries.

    Args:
        store: Where results are kept.
        data: Every data role of the config; a stage sees those it declares.
        seed: Seed of everything random.
        events: Listener for progress.
        team: This process's part, where there are several.
        sharding: Where the shards of a calibration run.
    """

    def __init__(
        self,
        store: Store,
        data: DataRoles,
        seed: int,
        events: Events,
        team: Team | None = None,
        *,
        sharding: Sharding | None = None,
    ) -> None:
        self._store = store
        self._data = data
        self._seed = seed
        self._events = events
        self._team = team
        self._sharding = sharding
        self._steps: dict[Digest, tuple[Step, Artifact]] = {}
        self._failures: dict[Digest, ShrinkError] = {}
        self._sources: dict[str, Any] = {}
        self._data_keys: dict[Role, Any] = {}
        self._within: list[tuple[str, list[Inner]]] = []

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the stages of this run ask the user to know, whether they were found or done: warnings and refusals."""
        texts = ((step.name, text) for step in self.steps for text in step.facts.get("warnings", ()))
        declined = ((step.name, text) for step in self.steps for text in _reasons(step.facts.get("declined") or ()))
        return tuple(dict.fromkeys(f"{name}: {text}" for name, text in (*texts, *declined)))

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every step of this run, in the order in which they were finished, each once."""
        return tuple(step for step, _ in self._steps.values())

    @property
    def inputs(self) -> dict[str, Any]:
        """Fingerprints of the model sources and of the data that this run has used."""
        data = {f"data.{role}": key for role, key in self._data_keys.items() if key is not None}
        return {**self._sources, **data}

    def open(self, source: ModelSource, name: str = "source") -> Artifact:
        """The artifact of a model source."""
        key = {"settings": fingerprint(source), "seed": self._seed}
        if isinstance(source, OnnxSource):
            from onnxshrink.runtime.graph import external_files

            folder = source.onnx.parent
            key["external"] = {os.path.relpath(f, folder): digest_file(f) for f in external_files(source.onnx)}
        self._sources[name] = key["settings"]

        def work(folder: Path) -> Facts:
            require_torch({source.gives}, name)
            return open_source(source, folder, seed=self._seed)

        return self.once(name, "source", key, source.gives, work, uses={source.gives})

    def derive(self, stage: AnyStage, artifact: Artifact, name: str | None = None) -> Artifact:
        """The result of ``stage`` on ``artifact``."""
        name = name or stage.kind
        roles = (*stage.needs, *stage.uses)
        key = self._key_of(stage, artifact)

        def work(folder: Path) -> Facts:
            require_torch({stage.takes, stage.gives}, stage.kind)
            return work_of(stage)(artifact, folder, self.context(name, roles, self._store.partial(digest)))

        uses: set[Kind] = {stage.takes, stage.gives}
        digest = _digest(stage.kind, key, stage.gives, uses)
        return self.once(name, stage.kind, key, stage.gives, work, uses=uses, trains=stage.trains)

    def made(self, stage: AnyStage, artifact: Artifact) -> Artifact | None:
        """The result of ``stage`` on ``artifact`` if this run has it already, by itself or within another step."""
        digest = _digest(stage.kind, self._key_of(stage, artifact), stage.gives, {stage.takes, stage.gives})
        return self._steps[digest][1] if digest in self._steps else None

    def _key_of(self, stage: AnyStage, artifact: Artifact) -> dict[str, Any]:
        return {
            "settings": fingerprint(stage),
            "isa": detect_isa() if getattr(stage, "isa", None) == "auto" else None,
            "timed_on": processor_features() if stage.times else None,
            "input": artifact.digest,
            "seed": self._seed,
            "data": {role: self.data_key(role) for role in (*stage.needs, *stage.uses)},
        }

    def fold(self, artifact: Artifact, stages: Iterable[AnyStage], prefix: str = "") -> list[Artifact]:
        """Run ``stages`` one after the other.

        Returns:
            ``artifact`` and the result of each stage.
        """
        results = [artifact]
        for stage in stages:
            results.append(self.derive(stage, results[-1], prefix + stage.kind))
        return results

    def context(self, step: str, roles: Iterable[Role], scratch: Path | None = None) -> Context:
        """What a stage may see of the run."""
        return Context(
            step=step,
            data=DataRoles(**{role: self._data.of(role) for role in roles}),
            seed=self._seed,
            events=self._events,
            open=lambda source: self.open(source, f"{step} ▸ source"),
            derive=lambda stage, artifact: self.derive(stage, artifact, f"{step} ▸ {stage.kind}"),
            scratch=scratch,
            sharding=self._sharding,
        )

    def data_key(self, role: Role) -> Any:
        """The fingerprint of a role's data, computed once a run; None where there is none."""
        if role not in self._data_keys:
            settings = self._data.of(role)
            self._data_keys[role] = None if settings is None else fingerprint(settings)
        return self._data_keys[role]

    def once(
        self,
        name: str,
        kind: str,
        key: dict[str, Any],
        gives: Kind,
        work: Callable[[Path], Facts],
        *,
        uses: set[Kind],
        trains: bool = False,
    ) -> Artifact:
        """Look ``key`` up in this run, then in the store, and do ``work`` only where neither has it.

        What failed once in this run is not tried again.

        Args:
            name: The step's name in the report.
            kind: What is done.
            key: Plain JSON: everything that can change the result, but for our own code and the libraries.
            gives: Kind of the result.
            work: Fills a folder.
            uses: Kinds of model that are worked on; they decide which libraries' versions count. What is measured on
                a model counts the processor as well.
            trains: True if several processes share the work.
        """
        digest = _digest(kind, key, gives, uses)
        if self._within:
            outer, steps = self._within[-1]
            steps.append((name.removeprefix(outer), kind, gives, digest))

        def run(work: Callable[[Path], Facts]) -> Artifact:
            if digest not in self._steps:
                self._record(digest, name, kind, self._find_or_make(digest, name, gives, work))
            return self._steps[digest][1]

        return run(work) if self._team is None else self._team.step(digest, name, trains=trains, work=work, run=run)

    def _find_or_make(self, key: Digest, name: str, gives: Kind, work: Callable[[Path], Facts]) -> Entry:
        if key in self._failures:
            raise self._failures[key]
        entry = self._store.find(key, gives)
        if entry is not None:
            self._recall(name, entry)
            return entry
        self._events.started(name)
        self._within.append((name, []))
        try:
            return self._store.make(key, gives, self._noting(work), time.perf_counter)
        except ShrinkError as e:
            self._failures[key] = e
            raise
        finally:
            self._within.pop()

    def _noting(self, work: Callable[[Path], Facts]) -> Callable[[Path], Facts]:
        """``work`` whose facts have the steps within it beside them."""

        def noting(folder: Path) -> Facts:
            facts = work(folder)
            steps = list(dict.fromkeys(self._within[-1][1]))
            return facts | {_INNER: steps} if steps else facts

        return noting

    def _recall(self, outer: str, entry: Entry) -> None:
        """Record the steps within one that was found; those that the store has lost are left out."""
        for tail, kind, gives, digest in entry.facts.get(_INNER, ()):
            inner = None if digest in self._steps else self._store.find(digest, gives)
            if inner is not None:
                self._recall(outer + tail, inner)
                self._record(digest, outer + tail, kind, inner)

    def _record(self, key: Digest, name: str, kind: str, entry: Entry) -> None:
        seconds = round(entry.seconds, 3)
        size = entry.artifact.model_bytes
        facts = {name: value for name, value in entry.facts.items() if name != _INNER}
        facts |= {} if size is None else {"size_bytes": size}
        step = Step(name, kind, entry.artifact.digest, entry.cached, seconds, facts)
        self._steps[key] = (step, entry.artifact)
        self._events.finished(name, seconds, cached=entry.cached)


def _reasons(declined: Any) -> Iterable[str]:
    """What a step declined, a sentence for each: facts have one text, several, or reasons by name."""
    if isinstance(declined, str):
        return (declined,)
    return (f"{name}: {reason}" for name, reason in declined.items()) if isinstance(declined, Mapping) else declined


def require_torch(kinds: set[Kind], what: str) -> None:
    """Raise where a step needs torch and what belongs to it, and they are not installed.

    Raises:
        DependencyError: One of them is missing.
    """
    if "torch" not in kinds:
        return
    for module in ("torch", "torch_pruning", "safetensors", "accelerate"):
        package = module.replace("_", "-")
        if importlib.util.find_spec(module) is None:
            raise DependencyError(
                f"{what!r} needs torch, and {package!r} is not installed",
                where=f"the packages of {sys.executable}",
                got=f"no {package}",
                want="the torch extra",
                fix="pip install -e '.[torch]' in the checkout, or pip install torch torch-pruning safetensors "
                "accelerate",
            )


def _digest(kind: str, key: dict[str, Any], gives: Kind, uses: set[Kind]) -> Digest:
    """What a step is remembered under."""
    return digest_json(
        key
        | {"kind": kind, "code": _code(), "libraries": _libraries(uses)}
        | ({"processor": processor_features()} if gives == "evidence" else {})
    )


@cache
def _code() -> Digest:
    """Digest of our own source up to the stages: an edited or upgraded stage never meets its old results."""
    package = Path(onnxshrink.__file__).parent
    files = (path for room in _ROOMS for path in (package / room).glob("*.py"))
    return digest_json({path.relative_to(package).as_posix(): digest_file(path) for path in files})


def _libraries(kinds: set[Kind]) -> dict[str, str]:
    return versions((*(_TORCH_LIBRARIES if "torch" in kinds else ()), *(_ONNX_LIBRARIES if kinds - {"torch"} else ())))
