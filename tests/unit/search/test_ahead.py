"""Calibrations before the trials: once, in shards, and never at the cost of a trial."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import cnn, samples_of

import onnxshrink.search.budget as budget_module
from onnxshrink.calibration.parts import Sharding
from onnxshrink.config.load import validate
from onnxshrink.config.run import RunConfig
from onnxshrink.core.events import Silent
from onnxshrink.core.store import Store
from onnxshrink.pipeline import evaluate
from onnxshrink.search.ahead import calibrate_ahead, uncut
from onnxshrink.search.space import VARIANT
from onnxshrink.stages.memo import Memo

STATIC = [{"kind": "quantize_static"}]


class Counting(Executor):
    """Does tasks at once, and says how many there were."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.shards: list[tuple[int, int]] = []
        self._error = error

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        """Done, or lost."""
        self.shards.append(args)
        future: Future[Any] = Future()
        if self._error is not None:
            future.set_exception(self._error)
        else:
            future.set_result(fn(*args))
        return future


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = cnn()
    onnx.save(model, str(tmp_path / "m.onnx"))
    np.savez(tmp_path / "calib.npz", **samples_of(model, 24))
    np.savez(tmp_path / "test.npz", **samples_of(model, 8, seed=1))
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n\ndef make():\n    return [dict(np.load(__file__.replace('mine.py', 'calib.npz')))]\n"
    )
    return tmp_path


def config_of(folder: Path, tail: list[dict[str, Any]], **more: Any) -> RunConfig:
    document = {
        "model": {"onnx": "m.onnx"},
        "data": {"calibration": {"npz": "calib.npz"}, "evaluation": {"npz": "test.npz"}},
        "stages": [{"kind": "optimize"}],
        "variants": {VARIANT: tail},
        **more,
    }
    return validate(document, base=folder)


def ahead(folder: Path, executor: Executor, *configs: RunConfig, runs: str = "runs", seconds: float = 600) -> None:
    sharding = Sharding(executor, 3, time.time() + seconds)
    calibrate_ahead(configs, runs=folder / runs, base=folder, sharding=sharding)


def calibrations(folder: Path, runs: str = "runs") -> Iterator[bytes]:
    """The statistics in a store."""
    return (path.read_bytes() for path in sorted((folder / runs / ".store").glob("objects/*/statistics.npz")))


class Begun(Silent):
    """What was done and not found."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.warnings: list[str] = []

    def started(self, step: str) -> None:
        """Kept."""
        self.steps.append(step)

    def warned(self, text: str) -> None:
        """Kept."""
        self.warnings.append(text)


def begun_by(config: RunConfig, folder: Path, runs: str = "runs") -> list[str]:
    """The steps that a trial does itself."""
    told = Begun()
    evaluate(config, runs=folder / runs, base=folder, events=told)
    return told.steps


def test_trials_find_the_calibration_that_was_made_in_shards(folder: Path) -> None:
    """Once for all schemes of a trunk, under the key and with the bytes of one that a trial makes alone."""
    one = config_of(folder, STATIC)
    other = config_of(folder, [{"kind": "quantize_static", "granularity": "per_tensor"}])
    executor = Counting()
    ahead(folder, executor, one, other)
    assert executor.shards == [(0, 3), (1, 3), (2, 3)]
    for config in (one, other):
        steps = begun_by(config, folder)
        assert f"{VARIANT}/quantize_static" in steps
        assert not any("calibrate" in step for step in steps)
    assert any("calibrate" in step for step in begun_by(one, folder, "alone"))
    assert list(calibrations(folder)) == list(calibrations(folder, "alone"))
    assert len(list(calibrations(folder))) == 1
    ahead(folder, executor, one)
    assert len(executor.shards) == 3


def test_what_needs_no_calibration_of_its_trunk_is_left_alone(folder: Path) -> None:
    """Float, float16, and what changes the model before it is quantized."""
    executor = Counting()
    equalized = [{"kind": "equalize"}, *STATIC]
    ahead(folder, executor, *(config_of(folder, tail) for tail in ([], [{"kind": "to_fp16"}], equalized)))
    assert executor.shards == []
    assert not (folder / "runs/.store/memo").exists() or not list((folder / "runs/.store/memo").iterdir())


@pytest.mark.parametrize("error", [BrokenExecutor(), type("KilledWorker", (Exception,), {})("lost"), TimeoutError()])
def test_lost_workers_and_time_that_is_over_leave_it_to_the_trials(folder: Path, error: Exception) -> None:
    """They open their workers anew, and say what ends them."""
    config = config_of(folder, STATIC)
    ahead(folder, Counting(error), config)
    assert list(calibrations(folder)) == []
    assert any("calibrate" in step for step in begun_by(config, folder))


def test_a_bug_is_not_taken_for_a_lost_worker(folder: Path) -> None:
    """It is told where it happens."""
    with pytest.raises(ZeroDivisionError):
        ahead(folder, Counting(ZeroDivisionError()), config_of(folder, STATIC))


def test_without_time_nothing_is_begun(folder: Path) -> None:
    """Not even the trunk."""
    executor = Counting()
    ahead(folder, executor, config_of(folder, STATIC), seconds=-1)
    assert executor.shards == []


def test_bad_samples_are_left_to_the_trial_to_tell(folder: Path) -> None:
    """Its error names them; here nothing is raised twice."""
    bad = samples_of(cnn(), 24)["x"].copy()
    bad[5] = np.nan
    np.savez(folder / "calib.npz", x=bad)
    executor = Counting()
    ahead(folder, executor, config_of(folder, STATIC))
    assert list(calibrations(folder)) == []


def test_samples_of_the_users_code_are_not_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come one after the other; the search says so once, and the trials calibrate alone."""
    data = {"calibration": {"entry": "mine:make"}, "evaluation": {"npz": "test.npz"}}
    config, executor = config_of(folder, STATIC, data=data), Counting()
    ahead(folder, executor, config)
    assert executor.shards == []
    assert "mine:make" in str(uncut(config))
    assert uncut(config_of(folder, STATIC)) is None
    told = Begun()
    monkeypatch.setattr(budget_module, "_try", lambda *_, **__: True)
    monkeypatch.setattr(budget_module, "_measure", lambda *_: None)
    budget = {"max_size": "1 MB", "families": ["static"], "parallel": {"kind": "processes", "workers": 2}}
    searched = config_of(folder, [], data=data, budget=budget, name="r").model_copy(update={"variants": {"model": ()}})
    with ThreadPoolExecutor(1) as pool:
        budget_module.fit(searched, runs=folder / "runs", base=folder, events=told, executor=pool)
    assert sum("mine:make" in text for text in told.warnings) == 1


def test_a_search_calibrates_in_as_many_shards_as_it_has_workers(folder: Path) -> None:
    """On the same executor as its trials."""
    budget = {
        "max_size": "1 MB",
        "families": ["static"],
        "max_trials": 1,
        "time_limit": "30 min",
        "parallel": {"kind": "processes", "workers": 2},
    }
    config = config_of(folder, STATIC, budget=budget, name="r", targets=[{"latency_seconds": 0.05}])
    executor = Counting()
    report = budget_module.fit(config, runs=folder / "runs", base=folder, executor=executor)
    assert [arguments for arguments in executor.shards if len(arguments) == 2] == [(0, 2), (1, 2)]
    assert any(len(arguments) == 1 for arguments in executor.shards)
    assert all(step.cached for step in report.steps if step.kind == "calibrate")


def test_a_trunk_that_trains_is_not_trained_here(tmp_path: Path) -> None:
    """Before a trial has made it there is nothing to calibrate; afterwards there is."""
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n"
    )
    values = np.random.default_rng(0).standard_normal((24, 3, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=values, labels=np.arange(24) % 3)
    config = validate(
        {
            "model": {
                "factory": "nets:build",
                "inputs": {"image": {"shape": ["batch", 3, 2, 2]}},
                "outputs": ["logits"],
            },
            "data": {"train": {"npz": "data.npz"}, "calibration": {"npz": "data.npz"}},
            "stages": [{"kind": "finetune", "epochs": 1}, {"kind": "export"}],
            "variants": {VARIANT: STATIC},
        },
        base=tmp_path,
    )
    executor = Counting()
    ahead(tmp_path, executor, config)
    assert executor.shards == []
    with budget_module.search_path(tmp_path):
        memo = Memo(Store(tmp_path / "runs/.store"), config.data, config.seed, Silent())
        memo.fold(memo.open(config.model), config.stages[:1])
    ahead(tmp_path, executor, config)
    assert len(executor.shards) == 3
