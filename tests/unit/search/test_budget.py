"""The loop alone: trials are made up, and the clock is the test's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import cnn, samples_of

import onnxshrink.search.budget as module
import onnxshrink.search.require as require_module
from onnxshrink.config.load import validate
from onnxshrink.core.errors import ConfigError, ModelError, ProviderError, ShrinkError
from onnxshrink.core.report import Candidate, Metric, Report, Verdict
from onnxshrink.search.attempt import Deadline, Task, TimeUp
from onnxshrink.search.pace import Pace, expected, final_seconds
from onnxshrink.search.space import Space
from onnxshrink.search.trial import SCHEME, Trial

FAMILIES = ["fp16", "dynamic", "static", "weight_only"]
SECONDS = {"probe": 10.0, "evaluate": 30.0, "predict": 1.0}
_STATUS: dict[str, Any] = {"predict": "predicted", "probe": "probed", "evaluate": "evaluated"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = cnn()
    onnx.save(model, str(tmp_path / "m.onnx"))
    np.savez(tmp_path / "calib.npz", **samples_of(model, 8))
    np.savez(tmp_path / "test.npz", **samples_of(model, 8, seed=1))
    return tmp_path


class World:
    """A clock that trials move on, and what a search did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, passing: Callable[[str], bool] = lambda _: True) -> None:
        self.now = 1000.0
        self.tasks: list[Task] = []
        self.rounds: list[list[str]] = []
        self.final: dict[str, Any] = {}
        self._passing = passing
        monkeypatch.setattr(module, "attempt_until", self._attempt)
        monkeypatch.setattr(module, "run", self._run)

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def _attempt(self, space: Space, runs: Path, until: float, task: Task, *, processes: int) -> Trial | None:
        """As if it had taken its time; larger schemes are nearer."""
        del runs, processes
        labels = [option.label for option in space.dimensions[-1].options]
        place = labels.index(task.point[SCHEME])
        seconds = SECONDS[task.depth]
        if time.time() + seconds > until:
            return None
        self.now += seconds
        self.tasks.append(task)
        metrics = (
            Metric("size_bytes", 9000.0 - 500 * place, "bytes"),
            Metric("compressed_bytes", 9000.0 - 500 * place, "bytes"),
            Metric("sqnr_db", 60.0 - 3 * place, "dB", target="cpu", output="y"),
            Metric("macs", 1000.0, "count", target="cpu"),
            Metric("integer_coverage", place / len(labels), "ratio", target="cpu"),
        )
        return Trial(task.number, task.point, _STATUS[task.depth], metrics, f"digest {place}", seconds=seconds)

    def _run(self, config: Any, *, parts: Sequence[Any], further: Any, **more: Any) -> Any:
        """Judges by ``passing``; ten seconds for each model."""
        self.final = {"config": config, **more}
        rows: list[Candidate] = []
        fresh = parts
        while fresh:
            names = [name for part in fresh for name in part.variants]
            self.rounds.append(names)
            self.now += 10.0 * len(names)
            for name in names:
                kept: Any = "passed" if self._passing(name.rpartition("-")[0]) else "failed"
                rows.append(Candidate(name, "variant", "", "", (), (Verdict("max_latency_ratio", 0.5, kept, ""),)))
            fresh = further(rows)
        return rows


def search(folder: Path, world: World, budget: dict[str, Any], **more: Any) -> Any:
    document: dict[str, Any] = {
        "name": "r",
        "model": {"onnx": "m.onnx"},
        "data": {"calibration": {"npz": "calib.npz"}, "evaluation": {"npz": "test.npz"}},
        "targets": [{"latency_seconds": 1.0}],
        "budget": {"max_size": "1 MB", "families": FAMILIES, **budget},
        **more,
    }
    config = validate(document, base=folder)
    return module.fit(config, runs=folder / "runs", base=folder, clock=world.clock)


def test_no_trial_is_begun_that_would_not_end_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations take 30 s here: after the first one it is known, and time for the final measurement is left."""
    for limit in (180.0, 260.0, 330.0):
        world = World(monkeypatch)
        search(folder / ".", world, {"time_limit": limit, "storage": f"sqlite:///{folder}/{limit}.db"})
        reserve = final_seconds(world.final["config"], module.N_FINALISTS)
        spent = sum(SECONDS[task.depth] for task in world.tasks)
        assert 0 < spent <= limit - reserve
        assert world.rounds


def _is_whole(world: World) -> bool:
    """What is said of the search at its end."""
    report = Report("r", {}, (), (), None, "", {}, {}, 1.0)
    _, texts = world.final["conclude"](report)
    return bool(json.loads(texts["search.json"])["is_whole"])


def test_a_later_search_goes_on_where_time_was_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same trials in the same order as a search with all the time, and none of them twice."""
    short = World(monkeypatch)
    search(folder, short, {"time_limit": 200})
    longer = World(monkeypatch)
    search(folder, longer, {"time_limit": "2 h"})
    whole = World(monkeypatch)
    search(folder, whole, {"time_limit": "2 h", "storage": f"sqlite:///{folder}/other.db"})
    assert 0 < len(short.tasks) < len(whole.tasks)
    assert [_is_whole(world) for world in (short, longer, whole)] == [False, True, True]
    assert short.tasks + longer.tasks == whole.tasks
    again = World(monkeypatch)
    search(folder, again, {"time_limit": "2 h"})
    assert again.tasks == []
    assert again.rounds == whole.rounds


def test_a_search_without_time_for_a_single_model_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was tried is kept."""
    with pytest.raises(ConfigError, match="before a single model was measured") as caught:
        search(folder, World(monkeypatch), {"time_limit": 15})
    assert "more time" in (caught.value.fix or "")


def test_full_evaluations_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all runs of the search; probes are not counted, and none is made when no evaluation is left."""
    for limit, fresh in ((1, 1), (2, 1), (2, 0)):
        world = World(monkeypatch)
        search(folder, world, {"max_trials": limit})
        assert sum(task.depth == "evaluate" for task in world.tasks) == fresh
        assert fresh or not world.tasks


def test_further_models_are_timed_while_the_clock_lets_none_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until one passes; each model is timed once, and of those left the likely fastest come first."""
    budget = {"max_latency_ratio": 0.5, "max_size": "1 MB"}
    world = World(monkeypatch, passing=lambda _: False)
    search(folder, world, budget)
    timed = [name for names in world.rounds for name in names]
    assert len(timed) == len(set(timed))
    assert len(timed) == sum(task.depth == "evaluate" for task in world.tasks)
    assert len(world.rounds) > 1
    assert world.final["config"].gates.max_latency_ratio == 0.5
    first = World(monkeypatch)
    search(folder, first, budget)
    assert first.rounds == world.rounds[:1]


def test_without_time_no_further_model_is_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones are, whatever they take: without them there is no answer."""
    probe = World(monkeypatch, passing=lambda _: False)
    search(folder, probe, {"max_latency_ratio": 0.5})
    spent = sum(SECONDS[task.depth] for task in probe.tasks)
    world = World(monkeypatch, passing=lambda _: False)
    limit = spent + final_seconds(probe.final["config"], module.N_FINALISTS) + 1
    search(
        folder,
        world,
        {"max_latency_ratio": 0.5, "time_limit": limit, "storage": f"sqlite:///{folder}/b.db"},
    )
    assert len(world.rounds) == 1


def test_models_equal_byte_for_byte_are_timed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheme that changes nothing adds no row."""
    world = World(monkeypatch, passing=lambda _: False)
    real = world._attempt

    def same(*arguments: Any, **more: Any) -> Trial | None:
        trial = real(*arguments, **more)
        return None if trial is None else Trial(trial.number, trial.point, trial.status, trial.metrics, "equal")

    monkeypatch.setattr(module, "attempt_until", same)
    search(folder, world, {"max_latency_ratio": 0.5})
    assert [len(names) for names in world.rounds] == [1]


def test_where_speed_is_wanted_more_models_are_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size says little of speed: up to twelve, the likely fastest of all that keep the limits."""
    world = World(monkeypatch)
    search(folder, world, {"minimize": "latency"})
    n_evaluated = sum(task.depth == "evaluate" for task in world.tasks)
    assert [len(names) for names in world.rounds] == [min(n_evaluated, 2 * module.N_FINALISTS)]
    assert world.final["config"].select == "fastest"


def trial(number: int, depth: str, scheme: str, seconds: float, **trunk: str) -> Trial:
    return Trial(number, {**trunk, SCHEME: scheme}, _STATUS[depth], seconds=seconds)


def test_the_time_a_task_takes_is_judged_by_its_kind() -> None:
    """By depth and scheme; the first of a trunk, which makes the trunk, by the first of others."""
    known = [
        trial(0, "probe", "a", 100.0, width="8"),
        trial(1, "probe", "b", 4.0, width="8"),
        trial(2, "evaluate", "b", 6.0, width="8"),
        trial(3, "predict", "a", 2.0, width="16"),
    ]
    assert expected(Task(4, {"width": "8", SCHEME: "b"}, "probe"), known) == pytest.approx(5.0)
    assert expected(Task(4, {"width": "8", SCHEME: "b"}, "evaluate"), known) == pytest.approx(7.5)
    assert expected(Task(4, {"width": "16", SCHEME: "b"}, "probe"), known) == pytest.approx(125.0)
    assert expected(Task(4, {"width": "16", SCHEME: "a"}, "predict"), known) == pytest.approx(2.5)
    assert expected(Task(4, {"width": "8", SCHEME: "c"}, "probe"), known) == 0.0
    now = [0.0]
    pace = Pace(0.0, 110.0, 10.0, lambda: now[0], known)
    first = Task(4, {"width": "16", SCHEME: "b"}, "probe")
    assert not pace.allows(first)
    assert pace.allows(Task(4, {"width": "8", SCHEME: "c"}, "probe"))
    now[0] = 100.0
    assert pace.is_over()
    assert not pace.allows(Task(4, {"width": "8", SCHEME: "c"}, "probe"))


def test_work_beyond_its_time_is_ended_where_it_tells_of_itself() -> None:
    """As Ctrl-C does, so that no step takes it for an error of its own."""
    Deadline(time.time() + 60).progress("step", 1, 2)
    with pytest.raises(TimeUp):
        Deadline(time.time()).progress("step", 1, 2)
    with pytest.raises(TimeUp):
        Deadline(time.time()).started("step")
    assert not issubclass(TimeUp, Exception)


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"budget": {"latency_host": "elsewhere"}}, ConfigError, "another machine"),
        ({"budget": {"storage": "sqlite:////no/such/folder/search.db"}}, ConfigError, "storage"),
        ({"budget": {"storage": "nonsense"}}, ConfigError, "storage"),
        ({"budget": {"vary": {"stages[3].level": [1]}}, "stages": []}, ConfigError, "leads nowhere"),
        ({"budget": {"vary": {"model.args.width": [1]}}}, ConfigError, "args"),
        ({"targets": [{"provider": "openvino"}]}, ProviderError, "openvino"),
        ({"targets": [{"provider": "cpu", "options": {"a": 1}}]}, ConfigError, "no options"),
        ({"budget": {"parallel": {"kind": "dask", "address": "nowhere"}}}, ConfigError, "dask"),
    ],
)
def test_what_cannot_work_is_told_before_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], error: type[ShrinkError], what: str
) -> None:
    """No trial was begun, and it is said what to do or what is wanted."""
    if "dask" in str(change):
        pytest.importorskip("distributed")
    world = World(monkeypatch)
    with pytest.raises(error, match=what) as caught:
        search(folder, world, change.get("budget", {}), **{k: v for k, v in change.items() if k != "budget"})
    assert world.tasks == []
    assert caught.value.want or caught.value.fix


def test_an_argument_that_the_network_does_not_take_is_told_before_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every trial would fail alike, one after the other."""
    (folder / "nets.py").write_text("def build(width=8): ...\n")
    model = {"factory": "nets:build", "inputs": {"x": {"shape": ["batch", 3, 8, 8]}}, "outputs": ["y"]}
    monkeypatch.setattr(require_module, "preflight", lambda _: None)
    budget = {"vary": {"model.args.breadth": [1, 2]}}
    with pytest.raises(ConfigError, match="does not take") as caught:
        search(folder, World(monkeypatch), budget, model=model, stages=[{"kind": "export"}])
    assert caught.value.where == "budget.vary.model.args.breadth"
    assert "width=8" in (caught.value.want or "")


def test_a_search_under_a_launcher_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun's processes train together; a search has workers of its own."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="launcher") as caught:
        search(folder, World(monkeypatch), {})
    assert "parallel" in (caught.value.fix or "")
    assert "processes_per_training" in (caught.value.fix or "")


def test_a_model_that_is_none_is_told_before_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read once, by nobody's trial."""
    (folder / "m.onnx").write_bytes(b"no model")
    world = World(monkeypatch)
    with pytest.raises(ModelError):
        search(folder, world, {})
    assert world.tasks == []


def test_a_journal_that_a_killed_search_left_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its lock nor half a line keeps the next one from going on."""
    search(folder, World(monkeypatch), {"max_trials": 1})
    (journal,) = (folder / "runs").glob(".*.search/search.journal")
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "trial')
    world = World(monkeypatch)
    search(folder, world, {"max_trials": 2})
    assert [task.depth for task in world.tasks] == ["evaluate"]
    assert b'"trial{' not in journal.read_bytes()


def test_a_search_of_other_models_is_another_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families and the SQNR that a mixture must keep say what is tried: nothing tried before is taken for it."""
    schemes = []
    for budget in ({"families": ["static"]}, {"families": ["dynamic"]}, {"families": ["mixed"], "min_sqnr_db": 20}):
        world = World(monkeypatch)
        search(folder, world, {"time_limit": "2 h", **budget})
        schemes.append({task.point[SCHEME] for task in world.tasks})
        report = Report("r", {}, (), (), None, "", {}, {}, 1.0)
        _, texts = world.final["conclude"](report)
        trials = json.loads(texts["search.json"])["trials"]
        assert {trial["point"][SCHEME] for trial in trials} == schemes[-1]
    assert set.intersection(*schemes) == {"fp32"}
    stricter = World(monkeypatch)
    search(folder, stricter, {"time_limit": "2 h", "families": ["mixed"], "min_sqnr_db": 25})
    assert {task.point[SCHEME] for task in stricter.tasks} == {"fp32", "mixed"}
    same = World(monkeypatch)
    search(folder, same, {"time_limit": "3 h", "families": ["mixed"], "min_sqnr_db": 25, "max_size": "2 MB"})
    assert same.tasks == []
