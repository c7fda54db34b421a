"""``MODEL_CARD.md``: what a model is, how it was made and what was measured, as Hugging Face shows it.

Every figure is the report's. What a report does not know (licence, base model, task) is in the config's ``card``, or is
left out.

Source: Mitchell et al., "Model Cards for Model Reporting", 2019; Hugging Face Hub, "Model Cards", section "Metadata".
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.resources import files
from typing import Any, TypeAlias, get_args

from jinja2 import Environment, StrictUndefined
from ruamel.yaml import YAML

from onnxshrink.config.card import Card
from onnxshrink.config.stages import Stage
from onnxshrink.core.report import Candidate, Metric, Report
from onnxshrink.report.terminal import task_metric

Row: TypeAlias = dict[str, str]

MODEL_CARD_FILE = "MODEL_CARD.md"

_SHOWN = {
    "accuracy_drop": "accuracy drop",
    "sqnr_db": "SQNR",
    "max_abs_error": "largest absolute error",
    "top1_agreement": "same winning class",
    "integer_coverage": "multiply-accumulates in integers",
}
_HUB_METRICS = {"top1": "accuracy", "top5": "top_5_accuracy", "spearman": "spearmanr", "miou": "mean_iou"}
"""Our name of a metric to that of Hugging Face's ``evaluate``, where they differ."""

_SHAPED = re.compile(r"(?P<dtype>\w+)\[(?P<shape>[\d,]*)\]")
_STAGES = {stage.model_fields["kind"].default: stage for stage in get_args(get_args(Stage)[0])}


def model_card(report: Report) -> str | None:
    """The card of a run's winner.

    Args:
        report: Of this or any earlier version.

    Returns:
        Markdown with YAML before it; None where the run has no winner.
    """
    if report.winner is None:
        return None
    given = report.config.get("card", {})
    winner = report.candidate(report.winner)
    card = Card(**{name: given[name] for name in Card.model_fields if name in given})
    packed = _packed(report)
    samples = winner.metric("evaluation_samples")
    bundle = winner.details.get("bundle", {})
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701
    environment.filters |= {"line": _line, "code": _code, "literal": partial(json.dumps, ensure_ascii=False)}
    template = environment.from_string((files(__package__) / "model_card.md.j2").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        winner=winner,
        card=card,
        title=_one_line(card.title or report.name),
        metadata=_yaml(metadata_of(report, winner, card)),
        steps=list(_steps(report)),
        figures=list(_figures(report, winner)),
        is_compared=any(metric.name != "integer_coverage" and metric.name in _SHOWN for metric in winner.metrics),
        samples=int(samples.value) if samples is not None and samples.value is not None else None,
        original=next((row.name for row in report.candidates if row.role == "original"), None),
        sizes=list(_sizes(report, winner)),
        latency=list(_latency(winner)),
        inputs=_inputs(winner),
        warnings=_warnings(report),
        machine=_machine(report),
        package=winner.details.get("package"),
        packed=packed,
        needs=next(iter(packed["files"].values()))["instruction_sets"] if packed else None,
        bundle=bundle if "folder" in bundle else None,
    )


def metadata_of(report: Report, winner: Candidate, card: Card) -> dict[str, Any]:
    """What Hugging Face reads of the card: library, tags, and the measured accuracy as a ``model-index``."""
    kinds = {stage["kind"] for stage in _chain(report)}
    tags = ["onnx", "onnxruntime", "onnxshrink"]
    tags += ["quantized"] if any(kind.startswith("quantize") for kind in kinds) else []
    known: dict[str, Any] = {
        "library_name": "onnx",
        "license": card.license,
        "base_model": card.base_model,
        "pipeline_tag": card.task,
        "tags": list(dict.fromkeys((*tags, *card.tags))),
    }
    metrics = list(_hub_metrics(report, winner))
    if metrics:
        dataset = {"name": _one_line(card.dataset or "evaluation data of the run"), "type": "custom"}
        result = {"task": {"type": card.task or "other"}, "dataset": dataset, "metrics": metrics}
        known["model-index"] = [{"name": _one_line(card.title or report.name), "results": [result]}]
    return {key: value for key, value in known.items() if value is not None}


def _hub_metrics(report: Report, winner: Candidate) -> Iterator[dict[str, Any]]:
    """Task metric, its drop and the agreement with the float model, on the first target."""
    for name in (task_metric(report), "accuracy_drop", "top1_agreement"):
        metric = winner.metric(name) if name else None
        if metric is not None and metric.value is not None:
            interval = {} if metric.lo is None else {"args": {"interval_95": [metric.lo, metric.hi]}}
            yield {
                "type": _HUB_METRICS.get(metric.name, metric.name),
                "name": metric.name,
                "value": metric.value,
            } | interval


def _figures(report: Report, winner: Candidate) -> Iterator[Row]:
    task = task_metric(report)
    for metric in winner.metrics:
        if (metric.name == task and metric.output is None) or metric.name in _SHOWN:
            name = _SHOWN.get(metric.name, metric.name) + (f" of {metric.output}" if metric.output else "")
            yield {
                "name": name,
                "value": _number(metric.value, metric.unit) if metric.value is not None else metric.note or "",
                "interval": _interval(metric),
                "target": metric.target or "",
            }


def _latency(winner: Candidate) -> Iterator[Row]:
    for metric in winner.metrics:
        if metric.name == "latency_p50_ms" and metric.value is not None:
            ratio = winner.metric("latency_ratio", target=metric.target)
            yield {
                "target": metric.target or "",
                "median": _number(metric.value),
                "interval": _interval(metric),
                "ratio": _number(ratio.value) if ratio and ratio.value is not None else "",
                "ratio_interval": _interval(ratio) if ratio else "",
            }


def _sizes(report: Report, winner: Candidate) -> Iterator[tuple[str, int]]:
    for row in (*(row for row in report.candidates if row.role != "variant"), winner):
        if (size := row.metric("size_bytes")) is not None and size.value is not None:
            yield "model.onnx" if row is winner else f"{row.name}, for comparison", int(size.value)
    for file in winner.details.get("package", {}).values():
        yield file["file"], file["size_bytes"]


def _inputs(winner: Candidate) -> list[tuple[str, str, str]]:
    """Name, shape and dtype of each input, as latency was measured on; none where it was not."""
    for conditions in winner.details.get("latency", {}).values():
        found = [(name, _SHAPED.fullmatch(text)) for name, text in conditions.get("inputs", {}).items()]
        return [(name, f"[{form['shape'].replace(',', ', ')}]", form["dtype"]) for name, form in found if form]
    return []


def _steps(report: Report) -> Iterator[Row]:
    """The winner's stages: what each is, and the settings that differ from its defaults."""
    for stage in _chain(report):
        known = _STAGES.get(stage["kind"])
        given = dict(_settings(stage, known)) if known is not None else {}
        meaning = (known.__doc__ or "").partition("\n")[0].replace("``", "`") if known is not None else ""
        yield {
            "kind": stage["kind"],
            "settings": ", ".join(f"{name}: {value}" for name, value in given.items()),
            "meaning": meaning,
        }


def _settings(stage: Mapping[str, Any], known: Any) -> Iterator[tuple[str, str]]:
    """Numbers, switches and words alone: a nested setting may hold a path of the machine."""
    for name, field in known.model_fields.items():
        value = stage.get(name, field.default)
        if name != "kind" and value != field.default and isinstance(value, str | int | float):
            text = str(value).lower() if isinstance(value, bool) else str(value)
            if "/" not in text and "\\" not in text:
                yield name, _line(text)


def _chain(report: Report) -> list[Mapping[str, Any]]:
    config = report.config
    return [*config.get("stages", ()), *config.get("variants", {}).get(report.winner, ())]


def _packed(report: Report) -> Mapping[str, Any] | None:
    """What `package_ort` said of the winner; None where it was not packaged."""
    names = (f"{report.winner}/package_ort", "package_ort")
    return next((step.facts for name in names for step in report.steps if step.name == name), None)


def _warnings(report: Report) -> list[str]:
    """The report's, without those of other variants."""
    others = tuple(f"{row.name}{end}" for row in report.variants if row.name != report.winner for end in (": ", "/"))
    return [warning for warning in report.warnings if not warning.startswith(others)]


def _machine(report: Report) -> str:
    found = (report.machine.get(name) for name in ("processor", "architecture", "system"))
    return ", ".join([*map(str, filter(None, found)), f"onnxruntime {report.versions.get('onnxruntime', '')}"])


def _number(value: float, unit: str = "") -> str:
    return f"{value:.4g}{f' {unit}' if unit in {'dB', 'ms'} else ''}"


def _interval(metric: Metric) -> str:
    return "" if metric.lo is None or metric.hi is None else f"{metric.lo:.4g} to {metric.hi:.4g}"


def _line(text: str) -> str:
    """Text of others inside a line or a table: it can neither end the one nor divide the other."""
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", _one_line(text))


def _code(text: str) -> str:
    """Text of others as code: between more backticks than it has in a row."""
    words = _one_line(text)
    if "`" not in words:
        return f"`{words}`"
    fence = "`" * (max(map(len, re.findall("`+", words))) + 1)
    return f"{fence} {words} {fence}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _yaml(document: Mapping[str, Any]) -> str:
    """Quoted for readers of YAML 1.1, as Hugging Face's is: to them a bare ``no`` is false and ``1e-05`` is text."""
    text = io.StringIO()
    writer = YAML()
    writer.version = (1, 1)
    writer.width = 1 << 16
    writer.dump(dict(document), text)
    return text.getvalue().partition("---\n")[2]
