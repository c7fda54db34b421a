"""What is refused before any work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
import torch

from onnxshrink.config.run import RunConfig
from onnxshrink.core.errors import ConfigError, ProviderError
from onnxshrink.stages.preflight import preflight


@pytest.mark.parametrize("batch", [1, 8])
def test_a_batch_that_the_model_cannot_take_is_refused(tmp_path: Path, batch: int) -> None:
    """A target's batch must be that of a model that takes no other; one that is not given may be anything."""
    model = nets.cnn()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "model.onnx")
    raw = {"model": {"onnx": str(tmp_path / "model.onnx")}, "stages": [{"kind": "optimize"}]}
    for targets in ([{}], [{"batch": 4}]):
        preflight(RunConfig.model_validate(raw | {"targets": targets}))
    with pytest.raises(ConfigError, match=rf"(?s)fixed to 4.*batch: {batch}.*batch: 4"):
        preflight(RunConfig.model_validate(raw | {"targets": [{"batch": batch}]}))


def test_a_missing_provider_is_told_before_what_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no CUDA can use no advice about it; who has it is told that int8 is no use there."""
    onnx.save(nets.cnn(), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", **nets.samples_of(nets.cnn(), 2))
    raw = {
        "model": {"onnx": str(tmp_path / "model.onnx")},
        "data": {"calibration": {"npz": str(tmp_path / "calib.npz")}},
        "stages": [{"kind": "quantize_static"}],
        "targets": [{"provider": "cuda"}],
    }
    config = RunConfig.model_validate(raw)

    def missing(_: object) -> None:
        raise ProviderError("it is not installed")

    monkeypatch.setattr("onnxshrink.stages.preflight.require_provider", missing)
    with pytest.raises(ProviderError, match="not installed"):
        preflight(config)
    monkeypatch.setattr("onnxshrink.stages.preflight.require_provider", lambda _: "CUDAExecutionProvider")
    with pytest.raises(ConfigError, match="fp16 on CUDA"):
        preflight(config)


def config_of(folder: Path, *stages: dict[str, Any]) -> RunConfig:
    """Stages on a residual network, before its export."""
    np.savez(folder / "d.npz", image=np.zeros((4, 1, 6, 6), np.float32), labels=np.arange(4) % 3)
    model = {"factory": "torch_models:Residual", "inputs": {"image": {"shape": ["batch", 1, 6, 6]}}}
    data = {"train": {"npz": str(folder / "d.npz")}}
    return RunConfig.model_validate({"model": model, "data": data, "stages": [*stages, {"kind": "export"}]})


TEACHER = {"factory": "torch_models:InvertedResidual", "train": {"epochs": 1}}
HINT = {"kind": "hint", "student": "stem", "teacher": "expand"}


@pytest.mark.parametrize(
    ("stage", "option", "fix"),
    [
        ({"kind": "prune_channels", "pruning_ratio": 0.5, "ignore": ["steem"]}, "ignore", "stem"),
        ({"kind": "prune_channels", "pruning_ratio": 0.5, "num_heads": {"haed": 2}}, "num_heads", "head"),
        ({"kind": "prune_weights", "sparsity": 0.5, "ignore": ["groupd"]}, "ignore", "grouped"),
        ({"kind": "distill", "teacher": TEACHER, "losses": [HINT | {"student": "stm"}]}, "hint.student", "stem"),
        ({"kind": "distill", "teacher": TEACHER, "losses": [HINT | {"teacher": "expnd"}]}, "hint.teacher", "expand"),
        (
            {
                "kind": "prune_channels",
                "pruning_ratio": 0.5,
                "steps": 2,
                "finetune": {"teacher": TEACHER, "losses": [HINT | {"kind": "attention", "teacher": "expnd"}]},
            },
            "attention.teacher",
            "expand",
        ),
    ],
)
def test_a_misspelt_module_is_found_before_any_training(
    tmp_path: Path, stage: dict[str, Any], option: str, fix: str
) -> None:
    """Of the network or of a teacher that is still to be trained, with the nearest name; the right name passes."""
    first = {"kind": "finetune", "epochs": 1}
    with pytest.raises(ConfigError, match=f"`{option}` names") as caught:
        preflight(config_of(tmp_path, first, stage))
    assert caught.value.fix == f"did you mean '{fix}'?"
    assert caught.value.where == f"model/{stage['kind']}"
    wrong = caught.value.got
    assert wrong is not None
    preflight(config_of(tmp_path, first, json.loads(json.dumps(stage).replace(wrong, fix))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has float16")
@pytest.mark.parametrize(
    "stage",
    [
        {"kind": "finetune", "precision": "float16"},
        {"kind": "distill", "teacher": TEACHER | {"train": {"precision": "float16"}}},
        {"kind": "prune_channels", "pruning_ratio": 0.5, "steps": 2, "finetune": {"precision": "float16"}},
    ],
)
def test_float16_without_a_gpu_is_found_before_any_training(tmp_path: Path, stage: dict[str, Any]) -> None:
    """Of whatever is trained."""
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        preflight(config_of(tmp_path, stage))
