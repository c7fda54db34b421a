"""What a search varies: the config of each point, and mistakes that are told before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxshrink.config.load import validate
from onnxshrink.config.stages import Finetune, PruneChannels
from onnxshrink.core.errors import ConfigError
from onnxshrink.search.require import require_space
from onnxshrink.search.space import VARIANT, Space, set_value, space_of
from onnxshrink.search.trial import SCHEME, Point

STAGES = [
    {"kind": "prune_channels", "pruning_ratio": 0.4},
    {"kind": "finetune", "epochs": 2},
    {"kind": "export"},
    {"kind": "optimize"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 3), np.float32), labels=np.zeros(4, np.int64))
    network = "from torch import nn\n\n\ndef build(width=8):\n    return nn.Linear(3, width)\n"
    (tmp_path / "space_nets.py").write_text(network)
    return tmp_path


def make_space(folder: Path, budget: dict[str, Any], **more: Any) -> Space:
    """The space of a torch network with all data."""
    document: dict[str, Any] = {
        "model": {"factory": "space_nets:build", "inputs": {"x": {"shape": ["batch", 3]}}, "outputs": ["y"]},
        "data": {
            "train": {"npz": "data.npz"},
            "calibration": {"npz": "data.npz"},
            "evaluation": {"npz": "data.npz", "metric": "top1"},
        },
        "stages": STAGES,
        "budget": {"max_size": "1 MB", **budget},
        **more,
    }
    config = validate(document, base=folder)
    assert config.budget is not None
    return space_of(config, config.budget, base=folder)


def point(space: Space, **chosen: str) -> Point:
    """The first option of everything but of what is chosen."""
    return {d.name: chosen.get(d.name.rpartition(".")[2], d.options[0].label) for d in space.dimensions}


def schemes(space: Space) -> list[str]:
    return [option.label for option in space.dimensions[-1].options]


def test_values_are_set_where_their_path_leads() -> None:
    """Through mappings and lists; a last key, and a mapping on the way, is made where it is not there."""
    document: dict[str, Any] = {"stages": [{"kind": "a"}, {"kind": "b", "deep": {"list": [1, 2]}}], "model": {}}
    set_value(document, "stages[1].deep.list[0]", 7)
    set_value(document, "stages[0].epochs", 3)
    set_value(document, "model.args.width", 16)
    assert document == {
        "stages": [{"kind": "a", "epochs": 3}, {"kind": "b", "deep": {"list": [7, 2]}}],
        "model": {"args": {"width": 16}},
    }


@pytest.mark.parametrize("path", ["stages[7].epochs", "stages.epochs.x", "model.onnx.args", "stages[0][1]", "[0].x"])
def test_a_path_that_leads_nowhere_is_named(path: str) -> None:
    """With the form that is wanted."""
    with pytest.raises(ConfigError, match="leads nowhere") as caught:
        set_value({"stages": [{"kind": "a"}], "model": {"onnx": "m.onnx"}}, path, 1)
    assert path in caught.value.what
    assert caught.value.where == "budget.vary"


def test_what_is_varied_is_in_the_config_of_its_point(folder: Path) -> None:
    """Arguments of the factory and settings of a stage; nothing else changes, and the budget is gone."""
    space = make_space(
        folder, {"vary": {"model.args.width": [4, 6], "stages[1].epochs": [2, 5]}, "families": ["pruned"]}
    )
    config = space.config(point(space, width="6", epochs="5", pruning_ratio="0.65"))
    assert config.model.model_dump()["args"] == {"width": 6}
    assert [stage.kind for stage in config.stages] == ["prune_channels", "finetune", "export", "optimize"]
    assert config.stages[0].model_dump()["pruning_ratio"] == 0.65
    assert config.stages[1].model_dump()["epochs"] == 5
    assert config.budget is None
    assert list(config.variants) == [VARIANT]
    points = list(space.points())
    assert len(points) == len(space) == 2 * 2 * 10 * len(schemes(space))
    assert len({tuple(sorted(one.items())) for one in points}) == len(points)


def test_a_ratio_of_the_users_own_is_tried_with_ours_and_nothing_is_pruned_at_zero(folder: Path) -> None:
    """In order; the stage is left out where it would cut nothing; a ratio that the user varies is left alone."""
    space = make_space(folder, {})
    labels = [option.label for option in space.dimensions[0].options]
    assert labels[:7] == ["0", "0.2", "0.35", "0.4", "0.5", "0.65", "0.8"]
    assert [stage.kind for stage in space.config(point(space)).stages] == ["finetune", "export", "optimize"]
    own = make_space(folder, {"vary": {"stages[0].pruning_ratio": [0.3, 0.1]}})
    assert [[option.label for option in d.options] for d in own.dimensions[:-1]] == [["0.3", "0.1"]]
    assert [d.name for d in make_space(folder, {"families": ["static"]}).dimensions] == [SCHEME]


def test_large_ratios_are_cut_in_steps_as_well(folder: Path) -> None:
    """With the settings of the training that follows between them; not where nothing trains, or steps are given."""
    space = make_space(folder, {})
    labels = [option.label for option in space.dimensions[0].options]
    assert labels[7:] == ["0.5 in 3 steps", "0.65 in 3 steps", "0.8 in 3 steps"]
    prune, finetune, *_ = space.config(point(space, pruning_ratio="0.65 in 3 steps")).stages
    assert isinstance(prune, PruneChannels)
    assert isinstance(finetune, Finetune)
    assert (prune.pruning_ratio, prune.steps) == (0.65, 3)
    assert prune.finetune is not None
    assert prune.finetune.epochs == finetune.epochs == 2
    for stages in ([STAGES[0], *STAGES[2:]], [{**STAGES[0], "steps": 2}, *STAGES[1:]]):
        assert len(make_space(folder, {}, stages=stages).dimensions[0].options) == 7


def test_training_for_quantization_comes_right_before_the_export(folder: Path) -> None:
    """It simulates the very stage that follows the export, whatever the trunk does before."""
    space = make_space(folder, {"families": ["quantization_aware", "pruned"]})
    config = space.config(point(space, pruning_ratio="0.5", scheme="trained_per_channel_compact"))
    assert [stage.kind for stage in config.stages] == ["prune_channels", "finetune", "finetune", "export", "optimize"]
    (quantize,) = config.variants[VARIANT]
    assert config.stages[2].model_dump()["simulate"] == quantize.model_dump()
    assert config.stages[1].model_dump()["simulate"] is None
    plain = space.config(point(space, pruning_ratio="0.5", scheme="fp32"))
    assert [stage.kind for stage in plain.stages] == ["prune_channels", "finetune", "export", "optimize"]


def test_the_users_variants_come_first_and_equal_schemes_once(folder: Path) -> None:
    """Of equal ones the user's name stays; each scheme is there once."""
    variants = {
        "mine": [{"kind": "quantize_static", "granularity": "per_tensor"}],
        "also": [{"granularity": "per_tensor", "kind": "quantize_static"}],
        "other": [{"kind": "quantize_static", "float_last": 1}],
    }
    found = schemes(make_space(folder, {"families": ["static"]}, variants=variants))
    assert found[:2] == ["mine", "other"]
    assert {"also", "static_per_tensor"}.isdisjoint(found)
    assert "static_per_channel" in found
    assert len(found) == len(set(found))


def test_families_say_what_is_tried_and_the_float_model_always_is(folder: Path) -> None:
    """Without calibration samples nothing that needs ranges."""
    assert schemes(make_space(folder, {"families": ["fp16", "weight_only"]})) == [
        "fp32",
        "fp16",
        "weights_8",
        "weights_4",
    ]
    no_ranges = {"evaluation": {"npz": "data.npz", "metric": "top1"}, "train": {"npz": "data.npz"}}
    found = schemes(make_space(folder, {}, data=no_ranges))
    assert found == ["fp32", "fp16", "dynamic", "weights_8", "weights_4"]


def test_points_of_one_trunk_share_a_config(folder: Path) -> None:
    """So that a trunk is trained once; schemes that train have a trunk of their own."""
    space = make_space(folder, {"vary": {"model.args.width": [4, 6]}, "families": ["fp16", "quantization_aware"]})
    chosen = {
        "a": point(space, width="4", scheme="fp32"),
        "b": point(space, width="6", scheme="fp16"),
        "c": point(space, width="4", scheme="fp16"),
        "d": point(space, width="4", scheme="trained_per_tensor_compact"),
    }
    parts = space.together(chosen)
    assert [sorted(part.variants) for part in parts] == [["a", "c"], ["b"], ["d"]]
    assert parts[0].variants["a"] == ()


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        ({"stages[9].epochs": [1]}, "stages[9].epochs"),
        ({"stages[1].epochs": [1, -1]}, "-1"),
        ({"stages[1].epoch": [1]}, "epoch"),
        ({"model.argz.width": [1]}, "argz"),
        ({"model.args.depth": [1, 2]}, "depth"),
        ({"stages[0].pruning_ratio": [0.5, 1.5]}, "1.5"),
    ],
)
def test_a_mistake_in_one_option_is_told_before_any_work(folder: Path, vary: dict[str, Any], says: str) -> None:
    """By what is wrong with it, whichever option it is."""
    with pytest.raises(ConfigError) as caught:
        require_space(make_space(folder, {"vary": vary}))
    assert says in str(caught.value)
    assert caught.value.want or caught.value.fix
    assert not (folder / "runs").exists()
