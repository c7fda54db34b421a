"""A report in MLflow: settings, figures with their intervals, and the files of the run."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxshrink.core.errors import DependencyError
from onnxshrink.core.report import Report
from onnxshrink.core.run_folder import BUNDLE_FOLDER

_LONGEST = 500
"""Characters of a parameter that every store of MLflow takes."""


def log_report(report: Report, folder: str | Path | None = None) -> None:
    """Log a report to the active run of MLflow, or to a new one with the report's name.

    Parameters are the config's values by their place (``stages.0.kind``); metrics are ``<row>/<metric>``, with output
    and target where there are some, and ``.lo`` and ``.hi`` for the ends of a 95% interval; tags are the winner, why,
    and each variant's outcome.

    Args:
        report: What a run found.
        folder: The run's folder; the winner, the pages, the report and the bundle are logged from it.

    Raises:
        DependencyError: MLflow is not installed.
    """
    mlflow = _mlflow()
    if mlflow.active_run() is None:
        with mlflow.start_run(run_name=report.name):
            _log(mlflow, report, folder)
    else:
        _log(mlflow, report, folder)


def _log(mlflow: Any, report: Report, folder: str | Path | None) -> None:
    mlflow.log_params({name: str(value)[:_LONGEST] for name, value in _flat(report.config)})
    mlflow.log_metrics(dict(_figures(report)))
    outcomes = {f"outcome.{_key(row.name)}": row.outcome for row in report.variants if row.verdicts}
    mlflow.set_tags({"winner": report.winner or "none", "selection": report.selection, **outcomes})
    if folder is None:
        return
    for path in sorted(Path(folder).iterdir()):
        if path.is_file():
            mlflow.log_artifact(str(path))
    if (Path(folder) / BUNDLE_FOLDER).is_dir():
        mlflow.log_artifacts(str(Path(folder) / BUNDLE_FOLDER), BUNDLE_FOLDER)


def _figures(report: Report) -> Iterator[tuple[str, float]]:
    for row in report.candidates:
        for metric in row.metrics:
            name = "/".join(_key(part) for part in (row.name, metric.name, metric.output, metric.target) if part)
            ends = ((name, metric.value), (f"{name}.lo", metric.lo), (f"{name}.hi", metric.hi))
            yield from ((key, value) for key, value in ends if value is not None)


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a config with their places; what was left out has none."""
    if isinstance(value, (dict, list)) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(part, f"{place}.{_key(str(key))}" if place else _key(str(key)))
    elif value is not None and value not in ({}, []):
        yield place, value


def _key(name: str) -> str:
    """A name as MLflow takes it; what it refuses becomes ``_``."""
    return re.sub(r"[^\w\-. ]", "_", name, flags=re.ASCII)


def _mlflow() -> Any:
    """The module, which is not ours to install.

    Raises:
        DependencyError: It is not there.
    """
    try:
        return importlib.import_module("mlflow")
    except ImportError as e:
        raise DependencyError(
            "mlflow is not installed", where="log_report", want="MLflow's tracking", fix="pip install mlflow-skinny"
        ) from e
