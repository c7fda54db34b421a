"""The sections that show how the models came to be: training, calibration, steps, and how to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from onnxshrink.core.report import Report, Step
from onnxshrink.report.blocks import Block, Code, Figure, Note, Section, facts, plain, table, text
from onnxshrink.report.figures import curves
from onnxshrink.report.terminal import format_bytes, format_count


def warnings(report: Report) -> Section:
    """What the user should know."""
    return Section("warnings", "Warnings", tuple(Note(f"⚠ {line}", "warning") for line in report.warnings))


def calibration(report: Report) -> Section:
    """How far the samples settle the ranges, and what is shared between roles of the data."""
    blocks: list[Block] = []
    for step in report.steps:
        health = step.facts.get("health")
        if isinstance(health, Mapping):
            blocks += _health(step, health)
        if step.kind == "health" and step.facts.get("shared_samples") is not None:
            shared = step.facts["shared_samples"]
            samples = (step.facts.get("samples") or {}).items()
            rows = [(text(role), text(plain(n), "num"), text(plain(shared.get(role, 0)), "num")) for role, n in samples]
            blocks.append(
                table(
                    "Samples of the stages, and those of them that evaluation uses",
                    ("data", "samples", "also in evaluation"),
                    rows,
                )
            )
    return Section("calibration", "Calibration", tuple(blocks))


def training(report: Report) -> Section:
    """The loss of every training, epoch by epoch; a teacher that serves several stages was trained once."""
    once = {step.digest: step for step in reversed(report.steps)}

    return Section(
        "training", "Training", tuple(figure for step in reversed(once.values()) for figure in _trained(step))
    )


def steps(report: Report) -> Section:
    """Every arrow of the run."""
    rows = [
        (
            text(step.name), text(step.kind, "code"),
            text("from the store" if step.cached else f"{step.seconds:.1f} s", "num"), text(step.digest[:12], "code"),
        )
        for step in report.steps
    ]  # fmt: skip
    title = f"The {len(rows)} steps of the run, {sum(step.cached for step in report.steps)} of them from the store"
    blocks: list[Block] = [table(title, ("step", "stage", "time", "sha256"), rows, folded=True)] if rows else []
    declined = [(text(s.name), text(plain(s.facts["declined"]))) for s in report.steps if s.facts.get("declined")]
    if declined:
        blocks.append(table("What stages left out", ("step", "what, and why"), declined))
    return Section("steps", "Steps", tuple(blocks))


def environment(report: Report) -> Section:
    """Where it ran, with what, and how to do it again."""
    machine = {name: value for name, value in report.machine.items() if value is not None}
    if "memory_bytes" in machine:
        machine["memory"] = format_bytes(machine.pop("memory_bytes"))
    rows = [
        (text(row.name), text(row.role), text(row.model, "code"), text(row.digest, "code digest"))
        for row in report.candidates
        if row.digest
    ]
    inputs = [(text(name), text(line, "code digest")) for name, line in _digests(report.inputs)]
    file, version = f"{report.name}.yaml", report.versions.get("onnxshrink", "as it was")
    tables = (
        facts("Machine", machine),
        facts("Versions of the libraries", report.versions, folded=True),
        table("Digests of the models", ("model", "role", "file", "sha256"), rows, folded=True),
        table("Digests of what went in", ("input", "sha256"), inputs, folded=True),
    )
    blocks: tuple[Block, ...] = (
        Code(f"Again, with onnxshrink {version} and the config below as {file}", f"onnxshrink run {shlex.quote(file)}"),
        Code(f"{file}, with every default filled in", config_yaml(report.config)),
        *(found for found in tables if found.rows),
    )
    return Section("reproduce", "Environment, and how to do it again", blocks)


def config_yaml(config: Mapping[str, Any]) -> str:
    """The config as YAML that ``onnxshrink run`` reads; options that are not set are left out."""
    writer = YAML()
    writer.default_flow_style = False
    writer.width = 110
    stream = StringIO()
    writer.dump(_without_none(config), stream)
    return stream.getvalue()


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def _health(step: Step, health: Mapping[str, Any]) -> Iterator[Block]:
    known = {
        "samples": step.facts.get("samples"),
        "tensors": step.facts.get("tensors"),
        "judged tensors": health.get("judged_tensors"),
        "ranges on a quarter of the samples, of those on all": health.get("span_of_quarter"),
        "ranges on half of the samples, of those on all": health.get("span_of_half"),
        "largest share that held-out samples would clip": health.get("largest_clipped_ratio"),
    }
    yield facts(f"Health of {step.name}", {name: value for name, value in known.items() if value is not None})
    for finding in health.get("findings") or ():
        what = finding.get("what") or plain(finding) if isinstance(finding, Mapping) else str(finding)
        fix = f": {finding['fix']}" if isinstance(finding, Mapping) and finding.get("fix") else ""
        yield Note(f"⚠ {what}{fix}", "warning")


def _trained(step: Step) -> Iterator[Figure]:
    epochs = [epoch for epoch in step.facts.get("epochs") or () if isinstance(epoch, Mapping) and "loss" in epoch]
    if len(epochs) < 2:
        return
    series: dict[str, list[float]] = {"loss": [float(epoch["loss"]) for epoch in epochs]}
    for name in dict.fromkeys(name for epoch in epochs for name in epoch.get("terms") or ()):
        series[name] = [float((epoch.get("terms") or {}).get(name, 0.0)) for epoch in epochs]
    if all("held_out" in epoch for epoch in epochs):
        series["held out"] = [float(epoch["held_out"]) for epoch in epochs]
    rates = [epoch.get("learning_rate") for epoch in epochs]
    best = f", best at epoch {step.facts['best_epoch']}" if "best_epoch" in step.facts else ""
    title = (
        f"{step.name}: loss over {len(epochs)} epochs on {format_count(step.facts.get('samples') or 0)} samples{best}"
    )
    rows = [
        (
            text(n),
            *(text(f"{row[n - 1]:.6g}", "num") for row in series.values()),
            text("" if rate is None else plain(rate)),
        )
        for n, rate in enumerate(rates, 1)
    ]
    yield Figure(title, curves(series, title, axis="loss"), table(title, ("epoch", *series, "learning rate"), rows))


def _digests(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Whatever in the fingerprints of the inputs is a sha256."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _digests(item, f"{name} {key}".strip())
    elif isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        yield name, value
