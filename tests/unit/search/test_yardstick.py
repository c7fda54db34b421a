"""Models are only searched over where all of them are measured against the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import cnn

from onnxshrink.config.load import validate
from onnxshrink.core.errors import ConfigError
from onnxshrink.search.budget import fit
from onnxshrink.search.space import space_of
from onnxshrink.search.yardstick import require_yardstick

PRUNE: dict[str, Any] = {"kind": "prune_channels", "pruning_ratio": 0.4}
TUNE: dict[str, Any] = {"kind": "finetune", "epochs": 2}
DISTILL: dict[str, Any] = {"kind": "distill", "teacher": {"factory": "yard_nets:build"}, "epochs": 1}
TAIL: list[dict[str, Any]] = [{"kind": "export"}, {"kind": "optimize"}]
TORCH = {"factory": "yard_nets:build", "inputs": {"x": {"shape": ["batch", 3]}}, "outputs": ["y"]}
WEIGHTS = {**TORCH, "weights": "w.pt"}
ONNX = {"onnx": "m.onnx"}
WIDTH = {"model.args.width": [4, 8]}
TOP1 = "top1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(cnn(), str(tmp_path / "m.onnx"))
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 3), np.float32), labels=np.zeros(4, np.int64))
    (tmp_path / "yard_nets.py").write_text(
        "from torch import nn\n\n\ndef build(width=8):\n    return nn.Linear(3, width)\n"
    )
    (tmp_path / "w.pt").write_bytes(b"")
    return tmp_path


def document(model: Any, stages: list[Any], vary: dict[str, Any], metric: str | None, **budget: Any) -> dict[str, Any]:
    evaluation = {"npz": "data.npz", **({"metric": metric} if metric else {})}
    return {
        "name": "r",
        "model": model,
        "data": {"train": {"npz": "data.npz"}, "evaluation": evaluation},
        "stages": stages,
        "budget": {"max_size": "1 MB", "vary": vary, **budget},
    }


@pytest.mark.parametrize(
    ("model", "stages", "vary", "metric", "where"),
    [
        # Drift: against each trunk's own first ONNX model.
        (TORCH, [PRUNE, TUNE, *TAIL], {}, None, "stages[0].pruning_ratio"),
        (TORCH, [DISTILL, *TAIL], WIDTH, None, "model.args.width"),
        (TORCH, TAIL, {"stages[1].max_abs_error": [1e-4, 1e-3]}, None, None),
        (ONNX, [{"kind": "optimize"}], {"stages[0].max_abs_error": [1e-4, 1e-3]}, None, None),
        (ONNX, [], {"model.onnx": ["m.onnx"]}, None, "model.onnx"),
        # Accuracy: against the teacher, or the network before it was cut, or the source.
        (TORCH, [DISTILL, PRUNE, TUNE, *TAIL], WIDTH, TOP1, None),
        (TORCH, [DISTILL, *TAIL], {"stages[0].epochs": [1, 2]}, TOP1, None),
        (TORCH, [DISTILL, *TAIL], {"stages[0].teacher.args.width": [4, 8]}, TOP1, "stages[0].teacher.args.width"),
        (TORCH, [PRUNE, TUNE, *TAIL], {}, TOP1, None),
        (TORCH, [PRUNE, TUNE, *TAIL], WIDTH, TOP1, "model.args.width"),
        (TORCH, [TUNE, PRUNE, TUNE, *TAIL], {"stages[0].epochs": [1, 2]}, TOP1, "stages[0].epochs"),
        (TORCH, [TUNE, PRUNE, TUNE, *TAIL], {"stages[2].epochs": [1, 2]}, TOP1, None),
        (TORCH, [TUNE, *TAIL], {"stages[0].epochs": [1, 2]}, TOP1, "stages[0].epochs"),
        (WEIGHTS, [TUNE, *TAIL], {"stages[0].epochs": [1, 2]}, TOP1, None),
        (WEIGHTS, [TUNE, *TAIL], WIDTH, TOP1, "model.args.width"),
    ],
)
def test_trunks_without_a_common_yardstick_are_refused(
    folder: Path, model: Any, stages: list[Any], vary: dict[str, Any], metric: str | None, where: str | None
) -> None:
    """Whichever model it is that quality is measured against; the message has what, where, got, want and fix."""
    config = validate(document(model, stages, vary, metric), base=folder)
    assert config.budget is not None
    space = space_of(config, config.budget, base=folder)
    if where is None:
        require_yardstick(config, space)
        return
    with pytest.raises(ConfigError) as caught:
        require_yardstick(config, space)
    assert caught.value.where == where
    assert caught.value.got
    assert caught.value.want
    assert "families" in (caught.value.fix or "")


def test_the_fix_that_is_told_is_one(folder: Path) -> None:
    """Schemes alone are compared on one trunk."""
    stages = [PRUNE, TUNE, *TAIL]
    config = validate(document(TORCH, stages, {}, None, families=["fp16", "dynamic", "weight_only"]), base=folder)
    assert config.budget is not None
    require_yardstick(config, space_of(config, config.budget, base=folder))


def test_it_is_told_before_any_work(folder: Path) -> None:
    """By the search itself; no folder is made."""
    config = validate(document(TORCH, [PRUNE, TUNE, *TAIL], {}, None), base=folder)
    with pytest.raises(ConfigError, match="cannot be compared by their drift"):
        fit(config, runs=folder / "runs", base=folder)
    assert not (folder / "runs").exists()
