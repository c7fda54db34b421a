"""`method: auto`: each tensor takes the range that serves the outputs, and the whole is never worse for it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from numpy.typing import NDArray
from onnx import helper

from onnxshrink.calibration.calibrate import observe_all, ranges_of
from onnxshrink.calibration.prepare import prepare
from onnxshrink.calibration.ranges import Range
from onnxshrink.config.stages import CalibrationMethod, QuantizeStatic
from onnxshrink.core.errors import DataError
from onnxshrink.runtime.session import Session
from onnxshrink.stages.choose_ranges import ChosenRanges, choose_ranges, is_better
from onnxshrink.stages.quantize_static import quantize_static, quantized_model

METHODS: tuple[CalibrationMethod, ...] = ("mse", "minmax", "percentile", "entropy")
COUNT = 32
_SHARE = 0.984  # of 64 values, all but one


def two_minds() -> nets.Model:
    """``u[N,64]`` and ``v[N,64]`` to ``y[N,8]``: the first place of ``u`` counts, all others of ``v``."""
    rng = np.random.default_rng(0)
    rare, ordinary = np.zeros((64, 8), np.float32), rng.standard_normal((64, 8)).astype(np.float32) / 8
    rare[0], ordinary[0] = 0.05, 0
    nodes = [
        helper.make_node("MatMul", ["u", "rare"], ["p"], name="read_u"),
        helper.make_node("MatMul", ["v", "ordinary"], ["q"], name="read_v"),
        helper.make_node("Add", ["p", "q"], ["y"], name="both"),
    ]
    weights = {"rare": rare, "ordinary": ordinary}
    return nets.model_of(nodes, {"u": ["N", 64], "v": ["N", 64]}, {"y": ["N", 8]}, weights)


def spiky(count: int = COUNT) -> dict[str, NDArray[np.float32]]:
    """Samples for `two_minds`: ordinary numbers, and 20 to 30 in the first place of each."""
    rng = np.random.default_rng(1)
    arrays = {name: rng.standard_normal((count, 64)).astype(np.float32) for name in "uv"}
    for array in arrays.values():
        array[:, 0] = rng.uniform(20, 30, count)
    return arrays


def batches(arrays: Mapping[str, NDArray[np.float32]], count: int = 16) -> list[dict[str, NDArray[np.float32]]]:
    """The first samples, one at a time."""
    return [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]


class Bench:
    """A prepared model with each method's ranges, and the error of its outputs with any ranges by the plain file.

    Args:
        model: A float model.
        arrays: Its samples.
        options: Settings of the quantization.
    """

    def __init__(self, model: nets.Model, arrays: dict[str, NDArray[np.float32]], **options: Any) -> None:
        self.model = prepare(model, where="test")
        self.arrays = arrays
        calibration = observe_all(self.model, lambda _: nets.ArrayReader(arrays))
        self.candidates = {
            method: ranges_of(calibration, method, percentile=_SHARE, leave_out={}) for method in METHODS
        }
        self.settings = QuantizeStatic.model_validate({"types": "u8s8", "reduce_range": False} | options)

    def quantize(self, ranges: Mapping[str, Range]) -> onnx.ModelProto:
        """A QDQ model."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        return quantized_model(copy, ranges, self.settings)

    def chosen(self) -> ChosenRanges:
        """What is chosen on the first 16 samples."""
        return choose_ranges(self.candidates, self.quantize, self.model, batches(self.arrays), progress=lambda *_: None)

    def sqnr_db(self, ranges: Mapping[str, Range]) -> float:
        """Of the output on the first 16 samples, with the file as it would be written, operator by operator."""
        feed = {name: array[:16] for name, array in self.arrays.items()}
        want = Session(self.model.SerializeToString()).run(feed)["y"]
        got = Session(self.quantize(ranges).SerializeToString(), optimization="disabled").run(feed)["y"]
        error = np.square(got.astype(np.float64) - want).sum()
        return float(10 * np.log10(np.square(want.astype(np.float64)).sum() / error))


def test_each_tensor_takes_what_serves_the_outputs() -> None:
    """Where rare values are all that counts they are kept, where they count for nothing they are clipped."""
    bench = Bench(two_minds(), spiky())
    chosen = bench.chosen()
    best = max(bench.sqnr_db(ranges) for ranges in bench.candidates.values())
    assert bench.sqnr_db(chosen.ranges) > best + 3
    assert chosen.ranges["u"][1] > 25
    assert chosen.ranges["v"][1] < 20


@pytest.mark.parametrize("types", ["u8s8", "s8s8"])
@pytest.mark.parametrize("network", ["cnn", "two_minds"])
def test_figures_are_those_of_the_file(network: str, types: str) -> None:
    """The SQNR of each method and of the choice is, but for a few roundings, that of the quantized file run unfused."""
    model = nets.cnn() if network == "cnn" else two_minds()
    bench = Bench(model, nets.samples_of(model, COUNT) if network == "cnn" else spiky(), types=types)
    chosen = bench.chosen()
    for method, ranges in (*bench.candidates.items(), ("auto", chosen.ranges)):
        assert chosen.facts["sqnr_db"][method] == pytest.approx(bench.sqnr_db(ranges), abs=1)


@pytest.mark.parametrize("seed", range(3))
def test_no_combination_is_much_better(seed: int) -> None:
    """Of all combinations of the methods none is more than 1 dB nearer than what one pass over the tensors finds."""
    model = nets.cnn()
    bench = Bench(model, nets.samples_of(model, COUNT, seed=seed), granularity="per_tensor")
    chosen = bench.chosen()
    tensors = [t for t in bench.candidates["mse"] if len({r[t] for r in bench.candidates.values()}) > 1][:4]
    best = max(
        bench.sqnr_db({**chosen.ranges, **{t: bench.candidates[m][t] for t, m in zip(tensors, methods, strict=True)}})
        for methods in itertools.product(METHODS[:3], repeat=len(tensors))
    )
    assert bench.sqnr_db(chosen.ranges) > best - 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_never_worse_than_the_best_method(seed: int, granularity: str) -> None:
    """On the samples that it chose on, the choice is at least as near as every single method."""
    model = nets.cnn()
    figures = Bench(model, nets.samples_of(model, COUNT, seed=seed), granularity=granularity).chosen().facts["sqnr_db"]
    assert figures["auto"] >= max(figures[method] for method in METHODS)


def test_what_changes_nothing_is_not_tried() -> None:
    """Equal ranges are one candidate: nothing is changed, and the first method is named."""
    bench = Bench(nets.cnn(), nets.samples_of(nets.cnn(), COUNT))
    bench.candidates = dict.fromkeys(METHODS, bench.candidates["minmax"])
    facts = bench.chosen().facts
    assert (facts["changed"], facts["best_single"]) == ({}, "mse")


@pytest.mark.parametrize(
    ("tried", "noise", "better"),
    [
        ([1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], True),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], False),
        ([1.0, 1.0, 1.0, 1.0], [0.9, 1.2, 0.8, 1.2], False),  # less on average, by chance
        ([2.0], [1.0], False),
        ([0.9], [1.0], True),
        ([np.inf, 0.0], [9.0, 9.0], False),
        ([9.0, 9.0], [np.inf, 0.0], True),
    ],
)
def test_better_means_beyond_chance(tried: list[float], noise: list[float], *, better: bool) -> None:
    """A change counts where its mean gain exceeds two standard errors, and never towards what is no number."""
    assert is_better(np.array(tried), np.array(noise)) is better


def run_stage(folder: Path, model: nets.Model, **settings: Any) -> tuple[dict[str, Any], bytes]:
    """The stage's facts and file."""
    out = folder / "out"
    out.mkdir(parents=True)
    arrays = spiky() if len(model.graph.node) == 3 else nets.samples_of(model, COUNT)
    ctx = nets.context_of(nets.ArrayReader(arrays), folder)
    settings = {"types": "u8s8", "percentile": _SHARE, "reduce_range": False} | settings
    facts = quantize_static(
        QuantizeStatic.model_validate(settings), nets.artifact_of(model, folder / "source"), out, ctx
    )
    json.dumps(facts, allow_nan=False)
    return facts, (out / "model.onnx").read_bytes()


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_the_stage_takes_it(tmp_path: Path, form: str) -> None:
    """`method: auto` quantizes either format, says what each method gives and what each tensor took."""
    facts, _ = run_stage(tmp_path, two_minds(), method="auto", format=form)
    chosen = facts["chosen_ranges"]
    assert set(chosen["sqnr_db"]) == {*METHODS, "auto"}
    assert chosen["sqnr_db"]["auto"] > chosen["sqnr_db"][chosen["best_single"]] + 3
    assert {change["method"] for change in chosen["changed"].values()} <= set(METHODS)
    assert all(change["gain"] > 0 for change in chosen["changed"].values())


def test_no_samples() -> None:
    """Without calibration samples the choice is refused in words."""
    bench = Bench(nets.cnn(), nets.samples_of(nets.cnn(), COUNT))
    with pytest.raises(DataError, match="no calibration samples"):
        choose_ranges(bench.candidates, bench.quantize, bench.model, [], progress=lambda *_: None)


@pytest.mark.parametrize(
    ("first", "last", "left"),
    [(0, 0, set()), (1, 0, {"conv1"}), (2, 1, {"conv1", "conv2", "head"}), (1, 9, {"conv1", "conv2", "conv3", "head"})],
)
def test_the_outermost_stay_in_float(tmp_path: Path, first: int, last: int, left: set[str]) -> None:
    """As many multiplying nodes at either end stay in float as was asked for, and the facts give that as the reason."""
    facts, _ = run_stage(tmp_path, nets.cnn(), float_first=first, float_last=last)
    asked = {name for name, reason in facts["float_nodes"].items() if reason.startswith(("float_first", "float_last"))}
    assert asked == left


SCRIPT = """
import sys
from pathlib import Path
import test_choose_ranges as tests
sys.stdout.buffer.write(tests.run_stage(Path(sys.argv[1]), tests.two_minds(), method="auto")[1])
"""


def test_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Another process with another hash seed writes the same file."""
    here = run_stage(tmp_path / "here", two_minds(), method="auto")[1]
    folders = (Path(__file__).parent, Path(nets.__file__).parent)
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "there")]
    assert subprocess.run(command, env=environment, check=True, capture_output=True).stdout == here
