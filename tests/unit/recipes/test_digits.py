from pathlib import Path

import pytest
import torch
from torch_models import Bench

from onnxshrink import recipes
from onnxshrink.config.load import load_config
from onnxshrink.config.source import FactorySource
from onnxshrink.config.stages import Distill, PruneChannels
from onnxshrink.recipes import digits
from onnxshrink.runtime.torch_model import count_parameters, example_inputs, run_network

CONFIG = Path(recipes.__file__).with_name("digits.yaml")


@pytest.mark.parametrize(("network", "parameters"), [(digits.teacher(), 556_106), (digits.student(), 75_338)])
def test_the_networks_are_as_large_as_they_say(network: torch.nn.Module, parameters: int) -> None:
    """Ten logits for any number of images, and the parameters of the docstrings."""
    source = load_config(CONFIG).model
    assert isinstance(source, FactorySource)
    (logits,) = run_network(network.eval(), example_inputs(source.specs, 3))
    assert logits.shape == (3, 10)
    assert count_parameters(network) == parameters


def test_the_recipe_keeps_its_splits_apart() -> None:
    """Training, calibration and evaluation read different images of one file."""
    data = load_config(CONFIG).data
    roles = [data.train, data.calibration, data.evaluation]
    assert [role.split for role in roles if role is not None] == ["train", "calibration", "test"]


def test_the_recipe_prunes_to_whole_blocks_of_channels(tmp_path: Path) -> None:
    """Integer kernels take eight channels at a time: 64 become 40, as the recipe says."""
    config = load_config(CONFIG)
    prune = next(stage for stage in config.stages if isinstance(stage, PruneChannels))
    bench = Bench(tmp_path)
    bench.run(prune, bench.open(config.model))
    assert bench.facts["channels"] == {"0": [64, 40], "3": [64, 40], "6": [64, 40], "11": [10, 10]}


def test_the_recipe_trains_its_teacher_once() -> None:
    """Every stage that has a teacher has the same one, so the store finds it again."""
    stages = [stage for stage in load_config(CONFIG).stages if getattr(stage, "teacher", None)]
    assert isinstance(stages[0], Distill)
    assert len({stage.model_dump_json(include={"teacher"}) for stage in stages}) == 1
    assert len(stages) == 2
