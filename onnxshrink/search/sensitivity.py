"""Which nodes of a model suffer in 8 bits, what each scheme for them costs, and the stage that mixes them best."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from onnxshrink.config.load import validate
from onnxshrink.config.stages import QuantizeMixed, QuantizeStatic
from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import ModelError
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.files import require_files
from onnxshrink.core.store import Store
from onnxshrink.runtime.graph import load_model, require_float
from onnxshrink.stages.memo import Memo


@dataclass(frozen=True, slots=True)
class Proposal:
    """What was found of a model.

    Attributes:
        model: Path of the file.
        stage: The stage to put into a config, behind ``optimize``: plain values that name every node that differs, so
            that nothing is searched again.
        facts: What `quantize_mixed` said: each group under ``sensitivity``, the most worthwhile first.
    """

    model: str
    stage: Mapping[str, Any]
    facts: Facts

    def to_json(self) -> str:
        """Everything as JSON text."""
        names = ("base", "decision", "sqnr_db_base", "sqnr_db_mixed", "min_sqnr_db", "max_float_ratio", "reached")
        more = ("float_ratio", "time_ratio", "singles", "assigned", "sensitivity")
        document = {"model": self.model, "stage": dict(self.stage)}
        document |= {name: self.facts[name] for name in (*names, *more)}
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    def to_yaml(self) -> str:
        """The stage as one item of a config's list of stages."""
        yaml, text = YAML(), io.StringIO()
        yaml.indent(mapping=2, sequence=4, offset=2)
        yaml.width = 120
        yaml.dump([dict(self.stage)], text)
        return text.getvalue()


def find_sensitivity(
    model: Path,
    data: Path,
    *,
    stage: Mapping[str, Any] | None = None,
    max_samples: int | None = None,
    events: Events | None = None,
) -> Proposal:
    """Optimize a model, measure each group of its nodes under each scheme, and choose the best mixture.

    Args:
        model: The float ``.onnx`` file.
        data: Calibration samples, ``.npz``.
        stage: Settings of `QuantizeMixed` that differ from the defaults.
        max_samples: Use at most this many samples, the first ones.
        events: Listener for progress.

    Raises:
        ConfigError: A file is not there, or a setting is wrong.
        ModelError: The model is quantized already, or has nothing to quantize, or nothing to choose.
        ShrinkError: As of `quantize_static`.
    """
    require_files(model=model, data=data)
    require_float(load_model(model), where=str(model))
    document = {
        "model": {"onnx": model},
        "data": {"calibration": {"npz": data, "max_samples": max_samples}},
        "stages": [{"kind": "optimize"}, {"kind": "quantize_mixed", **(stage or {})}],
    }
    config = validate({"name": "sensitivity", **document}, base=Path(), origin="arguments")
    settings = next(one for one in config.stages if isinstance(one, QuantizeMixed))
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
        memo = Memo(Store(Path(folder)), config.data, 0, events or Silent())
        memo.fold(memo.open(config.model), config.stages)
        facts = next(step.facts for step in memo.steps if step.kind == settings.kind)
    if "declined" in facts:
        raise ModelError(facts["declined"], where=str(model), want="MatMul, Gemm, Conv or the like")
    if "sensitivity" not in facts:
        raise ModelError("no node has a choice of schemes", where=str(model), got=facts["decision"])
    return Proposal(str(model), patch(settings, facts), facts)


def patch(settings: QuantizeMixed, facts: Facts) -> dict[str, Any]:
    """The stage that does again what was found, without a search.

    Returns:
        Plain values of ``quantize_static`` where all is static or float, else of ``quantize_mixed``.
    """
    assigned = facts["assigned"]
    if facts["base"] == "static" and {*assigned.values(), *settings.overrides.values()} <= {"float"}:
        excluded = (*settings.exclude_nodes, *settings.overrides, *assigned)
        stage: QuantizeStatic | QuantizeMixed = settings.static(tuple(dict.fromkeys(excluded)))
    else:
        fixed = {"schemes": (facts["base"],), "overrides": settings.overrides | assigned}
        stage = settings.model_copy(update=fixed)
    return {"kind": stage.kind} | stage.model_dump(mode="json", exclude_defaults=True)
