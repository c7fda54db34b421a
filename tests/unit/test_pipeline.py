from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import cnn, samples_of

import onnxshrink.stages.memo as memo_module
from onnxshrink.config.base import fingerprint
from onnxshrink.config.data import EntryData
from onnxshrink.config.load import validate
from onnxshrink.core.artifact import Digest
from onnxshrink.core.errors import ConfigError, ModelError, StoreError
from onnxshrink.core.events import Silent
from onnxshrink.core.importing import search_path
from onnxshrink.core.report import Report
from onnxshrink.pipeline import run
from onnxshrink.search.budget import fit

QUICK = {"targets": [{"latency_seconds": 0.02}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A float CNN and two sets of samples."""
    model = cnn()
    onnx.save(model, str(tmp_path / "m.onnx"))
    np.savez(tmp_path / "calib.npz", **samples_of(model, 24))
    np.savez(tmp_path / "test.npz", **samples_of(model, 24, seed=1))
    return tmp_path


def ran(folder: Path, document: Mapping[str, Any]) -> Report:
    data = {"calibration": {"npz": "calib.npz"}, "evaluation": {"npz": "test.npz"}}
    whole = {"name": "r", "model": {"onnx": "m.onnx"}, "data": data, **QUICK, **document}
    return run(validate(whole, base=folder), runs=folder / "runs", base=folder)


def cached(report: Report) -> dict[str, bool]:
    return {step.name: step.cached for step in report.steps}


@pytest.mark.parametrize("name", ["reference", "teacher", "source", "unpruned", "reference-b"])
def test_a_variant_cannot_take_the_name_of_another_row(folder: Path, name: str) -> None:
    """Rows of the report are told apart by name, so those the pipeline makes are reserved."""
    with pytest.raises(ConfigError, match="row"):
        ran(folder, {"variants": {name: []}})


def test_a_variant_that_cannot_be_made_costs_no_other(folder: Path) -> None:
    """It becomes a row that failed, with the reason; the others are measured and one is selected."""
    report = ran(
        folder,
        {
            "variants": {
                "int8": [{"kind": "quantize_static"}],
                "none": [{"kind": "quantize_static"}, {"kind": "quantize_static"}],
            }
        },
    )
    row = report.candidate("none")
    assert row.outcome == "failed"
    assert "could not be made" in row.verdicts[0].reason
    assert report.winner == "int8"
    assert Report.read(folder / "runs/r/report.json").winner == "int8"
    assert not (folder / "runs/r/variants/none").exists()


def test_a_run_of_which_nothing_can_be_made_says_why(folder: Path) -> None:
    """With no variant left, the first one's own error is the answer."""
    twice = [{"kind": "quantize_static"}, {"kind": "quantize_static"}]
    with pytest.raises(ModelError, match="quantized already") as caught:
        ran(folder, {"variants": {"int8": twice, "other": [{"kind": "optimize"}, *twice]}})
    assert caught.value.where == "int8/quantize_static"


@pytest.mark.parametrize("kind", ["quantize_static", "quantize_dynamic", "quantize_weights", "to_fp16"])
def test_a_source_that_is_quantized_already_costs_no_stage(folder: Path, kind: str) -> None:
    """It is refused with its file's name before the store is opened; without a stage that minds, it is a source."""
    ran(folder, {"variants": {"int8": [{"kind": "quantize_static"}]}})
    source = folder / "runs/r/model.onnx"
    document = {"name": "again", "model": {"onnx": str(source)}, "stages": [{"kind": "optimize"}]}
    done = sorted((folder / "runs/.store/memo").iterdir())
    with pytest.raises(ModelError, match="quantized already") as caught:
        ran(folder, {**document, "variants": {"plain": [], "int8": [{"kind": kind}]}})
    assert caught.value.where == str(source)
    assert sorted((folder / "runs/.store/memo").iterdir()) == done
    assert ran(folder, {**document, "variants": {"plain": []}}).winner == "plain"


@pytest.mark.parametrize("change", ["code", "libraries", "processor"])
def test_measurements_are_made_again_where_code_library_or_processor_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """What is measured depends on who measures: an old figure is never taken for a new one."""
    assert not cached(ran(folder, {}))["verify/model"]
    assert cached(ran(folder, {}))["verify/model"]
    if change == "code":
        monkeypatch.setattr(memo_module, "_code", lambda: Digest("0"))
    elif change == "libraries":
        monkeypatch.setattr(memo_module, "_libraries", lambda _: {"onnxruntime": "99"})
    else:
        monkeypatch.setattr(memo_module, "processor_features", lambda: ["other"])
    assert not cached(ran(folder, {}))["verify/model"]


def test_external_data_counts_by_its_path(tmp_path: Path) -> None:
    """Two data files of one name in two folders are two files."""
    x = onnx.helper.make_tensor_value_info("x", 1, [1, 2])
    y = onnx.helper.make_tensor_value_info("y", 1, [1, 2])
    nodes = [onnx.helper.make_node("Add", ["x", "a"], ["t"]), onnx.helper.make_node("Add", ["t", "b"], ["y"])]
    weights = [onnx.numpy_helper.from_array(np.ones(2, np.float32), name) for name in "ab"]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[onnx.helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    for tensor in model.graph.initializer:
        (tmp_path / tensor.name).mkdir()
        (tmp_path / tensor.name / "w.bin").write_bytes(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, f"{tensor.name}/w.bin", 0, 8)
        tensor.ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    config = {"name": "r", "model": {"onnx": "m.onnx"}, **QUICK}

    def digest() -> str:
        return run(validate(config, base=tmp_path), runs=tmp_path / "runs", base=tmp_path).candidate("model").digest

    first = digest()
    (tmp_path / "a/w.bin").write_bytes(np.full(2, 5, np.float32).tobytes())
    assert digest() != first


def test_files_named_in_arguments_count_with_their_content(tmp_path: Path) -> None:
    """A reader that takes a path as an argument is made again when the file behind it changes."""
    (tmp_path / "mine.py").write_text("def batches(path): ...\n")
    (tmp_path / "samples.bin").write_bytes(b"1")
    data = EntryData(entry="mine:batches", args={"path": "samples.bin", "other": "no file"})

    def key() -> dict[str, Any]:
        with search_path(tmp_path):
            return fingerprint(data)

    first = key()
    assert key() == first
    (tmp_path / "samples.bin").write_bytes(b"2")
    assert key() != first
    json.dumps(first)


def test_figures_from_seen_samples_are_called_optimistic(folder: Path) -> None:
    """Measuring on the calibration samples, or on nothing, is said in the report."""
    same = ran(folder, {"data": {"calibration": {"npz": "calib.npz"}, "evaluation": {"npz": "calib.npz"}}})
    assert any("optimistic" in text for text in same.warnings)
    none = ran(folder, {"name": "none", "data": {}})
    assert any("no evaluation data" in text for text in none.warnings)
    assert not any("nothing shows" in text for text in none.warnings)
    assert not [text for text in ran(folder, {}).warnings if "optimistic" in text or "no evaluation" in text]


def test_a_report_says_when_and_of_what(folder: Path) -> None:
    """A year later the report still names the day and the digests of everything that went in."""
    report = ran(folder, {})
    assert report.finished[:2] == "20"
    assert set(report.inputs) == {"source", "data.calibration", "data.evaluation"}
    assert str(folder) not in json.dumps(report.inputs)


def test_notes_beside_a_run_are_kept_and_foreign_folders_refused(folder: Path) -> None:
    """A run replaces what runs left, never what somebody else put there."""
    ran(folder, {})
    (folder / "runs/r/notes.txt").write_text("keep")
    ran(folder, {"variants": {"other": []}})
    assert (folder / "runs/r/notes.txt").read_text() == "keep"
    assert sorted(path.name for path in (folder / "runs/r/variants").iterdir()) == ["other"]
    (folder / "runs/foreign").mkdir()
    (folder / "runs/foreign/x").write_text("mine")
    with pytest.raises(StoreError, match="not a run's"):
        ran(folder, {"name": "foreign"})


@pytest.mark.slow
def test_the_original_is_found_beside_a_variant_that_failed(tmp_path: Path) -> None:
    """Stages and artifacts are matched by the variant's name, also where an earlier variant has none."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", image=rng.random((24, 1, 6, 6), np.float32), labels=rng.integers(0, 3, 24))
    twice = [{"kind": "export"}, {"kind": "quantize_static"}, {"kind": "quantize_static"}]
    document = {
        "name": "r",
        "model": {"factory": "torch_models:convolutions", "inputs": {"image": {"shape": ["batch", 1, 6, 6]}}},
        "data": {"calibration": {"npz": "x.npz"}, "evaluation": {"npz": "x.npz", "metric": "top1"}},
        "variants": {"broken": twice, "cut": [{"kind": "prune_channels", "pruning_ratio": 0.5}, {"kind": "export"}]},
        **QUICK,
    }
    report = run(validate(document, base=tmp_path), runs=tmp_path / "runs", base=tmp_path)
    names = {row.name: row for row in report.candidates}
    assert (names["broken"].outcome, report.winner) == ("failed", "cut")
    size = {name: names[name].metric("parameters") for name in ("source", "cut")}
    assert size["source"] is not None
    assert size["cut"] is not None
    assert (size["source"].value or 0) > (size["cut"].value or 0)


def test_noise_is_told_unless_a_gate_of_the_users_limits_it(folder: Path) -> None:
    """Ranges a thousand times too wide: a warning where nobody set a limit, the gate's own verdict where one did."""
    loud = {name: 1000 * array for name, array in samples_of(cnn(), 24).items()}
    np.savez(folder / "calib.npz", **loud)
    document = {"variants": {"fp32": [], "int8": [{"kind": "quantize_static"}]}}
    told = [text for text in ran(folder, document).warnings if "noise has" in text]
    assert len(told) == 1
    assert told[0].startswith("int8: ")
    gated = ran(folder, document | {"gates": {"min_sqnr_db": 5}})
    assert not [text for text in gated.warnings if "noise has" in text]
    assert gated.candidate("int8").outcome == "failed"


def test_a_quantized_variant_that_nobody_measured_is_unproven(folder: Path) -> None:
    """Without evaluation data the variants that round are named; one that does not is not."""
    variants = {"fp32": [], "int8": [{"kind": "quantize_static"}], "w8": [{"kind": "quantize_weights", "bits": 8}]}
    report = ran(folder, {"data": {"calibration": {"npz": "calib.npz"}}, "variants": variants})
    assert any(text.endswith("nothing shows that int8, w8 still work") for text in report.warnings)


@pytest.mark.slow
def test_a_branch_trained_for_quantization_is_measured_against_the_network_before(tmp_path: Path) -> None:
    """Its own float weights are no yardstick: the reference is the export of what it was made from."""
    for name, seed in (("calib", 1), ("test", 2)):
        image = np.random.default_rng(seed).normal(size=(24, 1, 6, 6)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", image=image)
    int8 = {"kind": "quantize_static"}
    document = {
        "model": {"factory": "torch_models:convolutions", "inputs": {"image": {"shape": ["batch", 1, 6, 6]}}},
        "variants": {
            "tuned": [{"kind": "finetune", "simulate": int8, "epochs": 1}, {"kind": "export"}, int8],
            "fp32": [{"kind": "export"}],
        },
    }
    report = ran(tmp_path, document)
    assert [candidate.name for candidate in report.candidates] == ["reference", "tuned", "fp32"]
    assert report.candidate("reference").digest == report.candidate("fp32").digest
    sqnr = report.candidate("tuned").metric("sqnr_db")
    assert sqnr is not None
    assert sqnr.value is not None
    assert 15 < sqnr.value < 80


def test_labels_under_another_name_and_guesses_are_told(folder: Path) -> None:
    """An array that seems to be the labels is named where nothing uses it; a model at chance level is as well."""
    arrays = dict(np.load(folder / "test.npz"))
    n = len(next(iter(arrays.values())))
    np.savez(folder / "test.npz", **arrays, label=np.zeros(n, int))
    assert any("array 'label'" in text for text in ran(folder, {"name": "a"}).warnings)
    evaluation = {"npz": "test.npz", "rename": {"label": "labels"}, "metric": "top1"}
    noise = np.random.default_rng(0).integers(0, 2, n)
    np.savez(folder / "test.npz", **arrays, label=noise)
    told = ran(folder, {"name": "b", "data": {"evaluation": evaluation}}).warnings
    assert any("not above the chance" in text for text in told)
    assert not any("array 'label'" in text for text in told)


def test_a_metric_of_ones_own_runs_through_the_pipeline(folder: Path) -> None:
    """It is measured, dropped and judged like the others, and measured anew when its source changes."""
    arrays = dict(np.load(folder / "test.npz"))
    n = len(next(iter(arrays.values())))
    np.savez(folder / "test.npz", **arrays, labels=np.zeros(n, int))
    code = "def score(outputs, labels):\n    return next(iter(outputs.values()))[:, 0] * {}\n"
    (folder / "mine.py").write_text(code.format(1))
    metric = {"entry": "mine:score", "better": "lower"}
    document = {
        "data": {"evaluation": {"npz": "test.npz", "metric": metric}, "calibration": {"npz": "calib.npz"}},
        "variants": {"fp32": [], "int8": [{"kind": "quantize_static"}]},
        "gates": {"max_accuracy_drop": 10},
        "select": "most_accurate",
    }
    first = ran(folder, document)
    row = first.candidate("int8")
    before, after = (first.candidate(name).metric("mine:score") for name in ("reference", "int8"))
    drop = row.metric("accuracy_drop")
    assert before and after and drop and before.value is not None  # noqa: PT018
    assert drop.value == pytest.approx((after.value or 0) - before.value)
    assert row.details["accuracy"]["cpu"]["better"] == "lower"
    assert row.verdicts[0].outcome == "passed"
    assert cached(ran(folder, document))["verify/int8"]
    (folder / "mine.py").write_text(code.format(2))
    again = ran(folder, document)
    assert not cached(again)["verify/int8"]
    doubled = again.candidate("reference").metric("mine:score")
    assert doubled and doubled.value == pytest.approx(2 * before.value)  # noqa: PT018


def test_the_evidence_of_a_quantized_variant_is_in_the_report(folder: Path) -> None:
    """Grids, nodes, the graph as it runs, and beside it pictures of the worst samples; small, and equal when cached."""
    document = {"variants": {"fp32": [], "int8": [{"kind": "quantize_static", "granularity": "per_tensor"}]}}
    first, again = ran(folder, document), ran(folder, document)
    kept = [topic for topic in first.candidate("int8").details if topic != "latency"]
    assert {"coverage", "ranges", "nodes", "worst_samples"} <= set(kept)
    for topic in kept:
        assert again.candidate("int8").details[topic] == first.candidate("int8").details[topic]
    assert {one["kind"] for one in first.candidate("int8").details["ranges"].values()} == {"weight", "activation"}
    assert first.candidate("int8").details["nodes"]["measured"] > 3
    assert {"coverage", "ranges", "nodes"}.isdisjoint(first.candidate("fp32").details)
    assert [(step.name, step.facts) for step in again.steps] == [(step.name, step.facts) for step in first.steps]
    assert all(step.cached for step in again.steps)
    health = next(step.facts["health"] for step in again.steps if step.kind == "calibrate")
    assert health["samples"][-1] == 24
    sizes = {step.name: step.facts["size_bytes"] for step in again.steps if "size_bytes" in step.facts}
    assert sizes["int8/quantize_static"] == first.candidate("int8").metric("size_bytes").value  # type: ignore[union-attr]
    pictures = json.loads((folder / "runs/r/pictures.json").read_text(encoding="utf-8"))
    worst = first.candidate("int8").details["worst_samples"]["cpu"]["y"]
    assert {str(row["sample"]) for row in worst} == set(pictures["samples"])
    assert (folder / "runs/r/report.json").stat().st_size < 100_000


class _Heard(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def run_from(project: Path, home: str, model: str = "m.onnx", **more: Any) -> tuple[Report, list[str]]:
    """Run a config ``cfg`` that lies in a folder of a project, whose runs lie at its top."""
    (project / home).mkdir(exist_ok=True, parents=True)
    config = validate({"name": "cfg", "model": {"onnx": str(project / model)}, **QUICK, **more}, base=project / home)
    heard = _Heard()
    return run(config, runs=project / "runs", base=project / home, events=heard), heard.warnings


@pytest.mark.parametrize("budget", [{}, {"budget": {"max_size": "1 MB", "time_limit": "1 min"}}])
def test_another_config_of_the_name_does_not_take_the_runs_folder(folder: Path, budget: dict[str, Any]) -> None:
    """Of another model, in another folder: refused before any work, by a search as well; removed, it is free."""
    run_from(folder, "a")
    onnx.save(cnn(opset=18), str(folder / "other.onnx"))
    before = (folder / "runs/cfg/report.json").read_bytes()
    steps = sorted((folder / "runs/.store/memo").iterdir())
    document = {"name": "cfg", "model": {"onnx": str(folder / "other.onnx")}, **QUICK, **budget}
    config, go = validate(document, base=folder), fit if budget else run
    with pytest.raises(StoreError, match="holds the run of another config") as caught:
        go(config, runs=folder / "runs", base=folder / "b")
    assert str(folder / "a") in str(caught.value.got)
    assert all(word in str(caught.value.fix) for word in ("`name`", "--runs", "remove"))
    assert (folder / "runs/cfg/report.json").read_bytes() == before
    assert sorted((folder / "runs/.store/memo").iterdir()) == steps
    assert not (folder / "runs/.cfg.search").exists()
    shutil.rmtree(folder / "runs/cfg")
    assert run_from(folder, "b", "other.onnx")[1] == []


def test_a_config_that_is_edited_or_moved_has_its_folder(folder: Path) -> None:
    """Another model in the same place is an edit, and a project may be moved; a config moved within it is told."""
    onnx.save(cnn(opset=18), str(folder / "other.onnx"))
    assert [run_from(folder, "a", model)[1] for model in ("m.onnx", "other.onnx", "m.onnx")] == [[], [], []]
    moved = folder.with_name("moved")
    folder.rename(moved)
    onnx.save(cnn(opset=16), str(moved / "m.onnx"))
    assert run_from(moved, "a")[1] == []
    (told,) = run_from(moved, "b")[1]
    assert told == f"{moved / 'runs/cfg'} held the run of a config in {moved / 'a'}, which this one replaces"
    report = json.loads((moved / "runs/cfg/report.json").read_text(encoding="utf-8"))
    assert report.pop("home") == "../b"
    (moved / "runs/cfg/report.json").write_text(json.dumps(report), encoding="utf-8")
    assert run_from(moved, "a", "other.onnx")[1] == [], "a report from before places were noted"
