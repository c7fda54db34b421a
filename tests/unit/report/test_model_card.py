"""The model card: the report's own figures, in a form that Hugging Face reads."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_models as nets
import pytest
from ruamel.yaml import YAML

from onnxshrink.config.load import validate
from onnxshrink.core.report import Candidate, Metric, Report, Step, Verdict
from onnxshrink.report.model_card import model_card
from onnxshrink.runtime.graph import save_model
from onnxshrink.runtime.ort_format import ORT_FILES, OrtConversion

METRICS = (
    Metric("size_bytes", 37598.0, "bytes"),
    Metric("sqnr_db", 41.077, "dB", target="cpu", output="y"),
    Metric("top1_agreement", 0.99, "ratio", 0.98, 0.999, target="cpu", output="y"),
    Metric("top1", 0.9925, "ratio", 0.9837, 0.9966, target="cpu"),
    Metric("accuracy_drop", -0.005, "ratio", -0.0134, 0.0035, target="cpu"),
    Metric("evaluation_samples", 800.0, "count", target="cpu"),
    Metric("latency_p50_ms", 0.0214, "ms", 0.0213, 0.0215, target="cpu"),
    Metric("latency_ratio", 0.6024, "ratio", 0.6011, 0.6039, target="cpu"),
)
DETAILS: dict[str, Any] = {
    "latency": {"cpu": {"inputs": {"x": "float32[1,3,16,16]"}}},
    "bundle": {"folder": "bundle", "n_samples": 16},
}


def report_of(tmp_path: Path, *, card: dict[str, Any] | None = None, **changes: Any) -> Report:
    """A finished run of an ONNX file in 8 bits."""
    model = save_model(nets.cnn(), tmp_path)
    document = {
        "model": {"onnx": str(model)},
        "data": {"calibration": {"npz": str(model)}, "evaluation": {"npz": str(model), "metric": "top1"}},
        "variants": {"fp32": [], "int8": [{"kind": "quantize_static", "granularity": "per_tensor"}]},
        "card": card or {},
    }
    config = validate(document, base=tmp_path).model_dump(mode="json")
    int8 = Candidate("int8", "variant", "variants/int8/model.onnx", "d", METRICS, (), DETAILS)
    report = Report(
        name="digits",
        config=config,
        candidates=(Candidate("reference", "reference", "reference/model.onnx", "e", METRICS[:1]), int8),
        steps=(),
        winner="int8",
        selection="selected int8: the smallest of 2 variants",
        machine={"processor": "a processor", "architecture": "x86_64", "cores": 2},
        versions={"onnxshrink": "0.1.0", "onnxruntime": "1.31.1"},
        seconds=1.0,
        finished="2026-01-02T03:04:05+00:00",
    )
    return replace(report, **changes)


def card_of(report: Report) -> str:
    text = model_card(report)
    assert text is not None
    return text


def metadata(text: str) -> Any:
    return YAML(typ="safe").load(io.StringIO(text.split("---\n")[1]))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_hugging_face_reads_the_figures_of_the_report(tmp_path: Path) -> None:
    """Its own library finds the measured accuracy, with its interval, and the metadata are valid."""
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(card_of(report_of(tmp_path, card={"license": "apache-2.0", "task": "image-classification"})))
    found = {result.metric_name: result for result in card.data.eval_results}
    for metric in METRICS:
        if metric.name in {"top1", "accuracy_drop", "top1_agreement"}:
            assert found[metric.name].metric_value == metric.value
            assert found[metric.name].metric_args == {"interval_95": [metric.lo, metric.hi]}
    assert found["top1"].metric_type == "accuracy"
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "onnx")
    assert card.data.pipeline_tag == found["top1"].task_type == "image-classification"
    assert {"onnx", "quantized"} <= set(card.data.tags)


def test_nothing_is_invented(tmp_path: Path) -> None:
    """Without a word in the config there is no licence, base model or task; an old report has no `card` at all."""
    text = card_of(report_of(tmp_path))
    assert not {"license", "base_model", "pipeline_tag"} & set(metadata(text))
    old = report_of(tmp_path)
    assert card_of(replace(old, config={key: value for key, value in old.config.items() if key != "card"})) == text
    given = metadata(card_of(report_of(tmp_path, card={"base_model": "me/teacher", "tags": ["edge", "onnx"]})))
    assert given["base_model"] == "me/teacher"
    assert given["tags"] == ["onnx", "onnxruntime", "onnxshrink", "quantized", "edge"]


def test_every_figure_stands_in_the_card(tmp_path: Path) -> None:
    """Accuracy, drop, drift, size and latency with their intervals, and which steps made the model."""
    verdict = Verdict("max_size", 60000.0, "passed", "model size 37,598 bytes keeps the limit")
    report = report_of(tmp_path)
    winner = replace(report.candidate("int8"), verdicts=(verdict,))
    text = card_of(replace(report, candidates=(report.candidates[0], winner)))
    for row in (
        "| top1 | 0.9925 | 0.9837 to 0.9966 | cpu |",
        "| accuracy drop | -0.005 | -0.0134 to 0.0035 | cpu |",
        "| SQNR of y | 41.08 dB |  | cpu |",
        "| model.onnx | 37,598 |",
        "| cpu | 0.0214 | 0.0213 to 0.0215 | 0.6024 | 0.6011 to 0.6039 |",
        "| `max_size` | passed | model size 37,598 bytes keeps the limit |",
        "1. `quantize_static` (granularity: per\\_tensor)",
        "Measured on 800 samples",
        "a processor, x86_64, onnxruntime 1.31.1".replace("_", "\\_"),
    ):
        assert row in text


def test_the_cosine_of_the_task_is_not_that_of_an_output(tmp_path: Path) -> None:
    """Drift has one of the same name: the card and Hugging Face's figures have the task's."""
    drift, own = Metric("cosine", 0.999, target="cpu", output="y"), Metric("cosine", 0.8, "", 0.7, 0.9, target="cpu")
    report = report_of(tmp_path)
    winner = replace(report.candidate("int8"), metrics=(drift, *METRICS[:1], own))
    text = card_of(replace(report, candidates=(report.candidates[0], winner)))
    (found,) = metadata(text)["model-index"][0]["results"][0]["metrics"]
    assert (found["type"], found["value"], found["args"]["interval_95"]) == ("cosine", 0.8, [0.7, 0.9])
    assert "| cosine | 0.8 | 0.7 to 0.9 | cpu |" in text
    assert "0.999" not in text


def test_warnings_of_the_winner_alone_are_its_limits(tmp_path: Path) -> None:
    """What is said of another variant is not said of this one."""
    report = report_of(tmp_path, warnings=("int8: of mine", "fp32: of another", "of all"))
    text = card_of(replace(report, candidates=(*report.candidates, Candidate("fp32", "variant", "m", "d"))))
    assert "- int8: of mine\n- of all\n" in text
    assert "of another" not in text


def test_names_cannot_break_the_card(tmp_path: Path) -> None:
    """A bar, a line end or markup in a name stays text, in tables and metadata; paths of the machine stay out."""
    report = report_of(tmp_path, card={"title": "a: |b\n---\n# c"}, warnings=("<b>|x\n# y",))
    winner = replace(report.candidate("int8"), metrics=(*METRICS, Metric("sqnr_db", 3.0, "dB", output="a|b\n|c")))
    text = card_of(replace(report, candidates=(report.candidates[0], winner)))
    assert metadata(text)["model-index"][0]["name"] == "a: |b --- # c"
    assert text.count("\n---\n") == 1
    assert "| SQNR of a\\|b \\|c | 3 dB |" in text
    assert "- \\<b\\>\\|x # y" in text
    assert "\n# y" not in text
    assert str(tmp_path) not in text


def test_a_reader_of_yaml_1_1_finds_what_was_written(tmp_path: Path) -> None:
    """Hugging Face's is one: there a bare `no` is false, `1e-05` is text and `12:30` is a number."""
    words = ("no", "yes", "on", "1.0", "12:30:45", "~", "1e3", "0o7", "a: b", "#x", "é")
    report = report_of(tmp_path, card={"task": "no", "base_model": "off", "title": "null", "tags": list(words)})
    drop = Metric("accuracy_drop", 1e-05, "ratio", -2e-07, 3e-05, target="cpu")
    winner = replace(report.candidate("int8"), metrics=(*METRICS[:2], drop))
    text = card_of(replace(report, candidates=(report.candidates[0], winner)))
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(text)
    assert card.data.pipeline_tag == "no"
    assert card.data.base_model == "off"
    assert tuple(card.data.tags[-len(words) :]) == words
    (found,) = card.data.eval_results
    assert (found.metric_value, found.metric_args["interval_95"]) == (1e-05, [-2e-07, 3e-05])
    assert metadata(text)["model-index"][0]["name"] == "null"


def test_names_in_code_stay_names(tmp_path: Path) -> None:
    """A run's backtick does not end its code, and an input's letters beyond 16 bits are written as they are."""
    details = DETAILS | {"latency": {"cpu": {"inputs": {'😀 "x"\n`': "float32[1,2]"}}}}
    report = report_of(tmp_path, name="my ``run`")
    text = card_of(
        replace(report, candidates=(report.candidates[0], replace(report.candidate("int8"), details=details)))
    )
    assert "of the run ``` my ``run` ```," in text
    (literal,) = re.findall(r"^    (.*): np\.zeros", text, flags=re.MULTILINE)
    assert ast.literal_eval(literal) == '😀 "x"\n`'


def test_a_card_without_evaluation_speaks_of_no_drift(tmp_path: Path) -> None:
    """Where the coverage in integers alone is known, nothing was compared, and the card says so."""
    report = report_of(tmp_path)
    winner = replace(report.candidate("int8"), metrics=(METRICS[0], Metric("integer_coverage", 0.5, "ratio")))
    text = card_of(replace(report, candidates=(report.candidates[0], winner)))
    assert "Neither drift nor accuracy was measured" in text
    assert "Drift is against" not in text
    assert "| multiply-accumulates in integers | 0.5 |  |  |\n\nNeither" in text


def test_without_a_winner_there_is_no_card(tmp_path: Path) -> None:
    """A run that nothing has passed leaves none."""
    assert model_card(report_of(tmp_path, winner=None)) is None


@pytest.mark.parametrize("styles", [(), ("fixed", "runtime"), ("runtime",)])
def test_the_code_runs(tmp_path: Path, styles: Any) -> None:
    """Every block is run in the folder that the card lies in."""
    report, package = report_of(tmp_path), {}
    for style in styles:
        OrtConversion().write(tmp_path / "model.onnx", tmp_path / ORT_FILES[style], style)
        package[style] = {"file": ORT_FILES[style], "size_bytes": 7}
    winner = report.candidate("int8")
    known = replace(winner, details=DETAILS | ({"package": package} if package else {}))
    unknown = replace(winner, details={})
    for row, count in ((known, 1 + bool(styles)), (unknown, 1)):
        code = blocks(card_of(replace(report, candidates=(report.candidates[0], row))), "python")
        assert len(code) == count
        for block in code:
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr


def test_a_package_is_described(tmp_path: Path) -> None:
    """Instruction sets, phones and the list of operators, in the stage's own words."""
    facts = {
        "required": "required_operators.config",
        "files": {"fixed": {"instruction_sets": {"minimum": "none", "x86": "exact", "arm64": "exact too"}}},
        "mobile": [{"provider": "nnapi", "suits": "no", "suits_if_fixed": "yes"}],
    }
    report = report_of(
        tmp_path, steps=(Step("int8/package_ort", "package_ort", "d", cached=False, seconds=0.1, facts=facts),)
    )
    package = {"fixed": {"file": "model.ort", "size_bytes": 47792}}
    winner = replace(report.candidate("int8"), details=DETAILS | {"package": package})
    text = card_of(replace(report, candidates=(report.candidates[0], winner)))
    for line in (
        "`required_operators.config`",
        "- Instruction set: none.",
        "- arm64: exact too.",
        "- nnapi: no (yes with fixed shapes)",
        "| model.ort | 47,792 |",
    ):
        assert line in text
