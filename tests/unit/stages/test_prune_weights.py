from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_models
from pydantic import ValidationError
from torch import nn
from torch_models import Bench, digits_like, source

from onnxshrink.config.data import DataRoles
from onnxshrink.config.load import load_config
from onnxshrink.config.source import FactorySource
from onnxshrink.config.stages import Finetune, PruneChannels, PruneWeights
from onnxshrink.core.artifact import Artifact
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.runtime.torch_model import load_network, read_architecture
from onnxshrink.stages.prune_weights import Weight, _from_rows, _masks, _weights, by_output

WEIGHTS = ("0.weight", "3.weight", "8.weight")


def zeros_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    network, architecture = load_network(artifact)
    return {name: network.get_parameter(name) == 0 for name in architecture.sparse}


def text_source(factory: str) -> FactorySource:
    inputs = {"x": {"shape": ("batch", 5), "dtype": "int64"}}
    return FactorySource.model_validate({"factory": f"torch_models:{factory}", "inputs": inputs})


@pytest.mark.parametrize("scope", ["per_layer", "global"])
def test_the_smallest_weights_go(tmp_path: Path, scope: str) -> None:
    """As many as asked for, of each layer or of all, are those that numpy puts first; the others are untouched."""
    bench = Bench(tmp_path)
    given = bench.open(source("convolutions"))
    pruned = bench.run(PruneWeights.model_validate({"sparsity": 0.7, "scope": scope}), given)
    before, after = ({n: p.detach().numpy() for n, p in load_network(a)[0].named_parameters()} for a in (given, pruned))
    parts = [(name,) for name in WEIGHTS] if scope == "per_layer" else [WEIGHTS]
    for names in parts:
        old, new = (np.concatenate([values[name].ravel() for name in names]) for values in (before, after))
        gone = np.argsort(np.abs(old))[: round(0.7 * old.size)]
        old[gone] = 0
        np.testing.assert_array_equal(new, old)
    assert all((before[name] == after[name]).all() for name in before if name not in WEIGHTS)
    assert bench.facts["sparsity"] == pytest.approx(0.7, abs=1e-3)


def test_the_facts_are_counts(tmp_path: Path) -> None:
    """Zeros by layer and in all, of the weights that may go, and parameters that are left."""
    bench = Bench(tmp_path)
    network, architecture = load_network(bench.run(PruneWeights(sparsity=0.5), bench.open(source("convolutions"))))
    assert architecture.sparse == WEIGHTS
    total, pruned = sum(p.numel() for p in network.parameters()), 36 + 576 + 24
    assert bench.facts["sparsity_by_layer"] == dict.fromkeys(WEIGHTS, 0.5)
    assert (bench.facts["weights"], bench.facts["nonzero_weights"]) == (2 * pruned, pruned)
    assert bench.facts["parameters"] == total
    assert bench.facts["nonzero_parameters"] == sum(int((p != 0).sum()) for p in network.parameters())


def test_every_output_sums_over_groups(tmp_path: Path) -> None:
    """Of every four in a row of a flattened filter two stay; of the ninth weight, alone in its group, all."""
    bench = Bench(tmp_path)
    artifact = bench.run(PruneWeights(pattern="2:4"), bench.open(source("convolutions")))
    zeros = zeros_of(artifact)
    assert zeros["3.weight"].flatten(1).unflatten(1, (-1, 4)).sum(-1).eq(2).all()
    assert zeros["0.weight"].flatten(1)[:, :8].unflatten(1, (-1, 4)).sum(-1).eq(2).all()
    assert not zeros["0.weight"].flatten(1)[:, 8].any()


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(6, 4), torch.randn(1, 6)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(1, 4, 3, 3)),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), torch.randn(1, 4, 1, 1)),
    ],
)
def test_a_row_is_what_one_output_sums_over(layer: nn.Module, inputs: torch.Tensor) -> None:
    """A gradient of one output channel touches one row of the weight, and the rows go back to where they were."""
    weight = layer.get_parameter("weight")
    assert torch.equal(_from_rows(layer, by_output(layer, weight), weight.shape), weight)
    outputs = layer(inputs).transpose(0, 1)
    for at, output in enumerate(outputs):
        (gradient,) = torch.autograd.grad(output.sum(), weight, retain_graph=True)
        touched = by_output(layer, gradient).abs().sum(1)
        assert touched.nonzero().flatten().tolist() == [at]


@pytest.mark.parametrize(
    ("pruning", "training"),
    [
        ({"pattern": "2:4"}, {"optimizer": "adamw", "weight_decay": 0.1}),
        ({"pattern": "2:4"}, {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1}),
        ({"sparsity": 0.8, "scope": "global"}, {"optimizer": "adamw", "ema_decay": 0.9}),
        ({"sparsity": 0.8}, {"optimizer": "sgd", "early_stopping": {"patience": 1}}),
    ],
)
def test_zeros_outlive_training(tmp_path: Path, pruning: dict[str, object], training: dict[str, object]) -> None:
    """Fine-tuning twice moves every weight that was kept and none that was pruned, whatever the optimizer carries."""
    bench = Bench(tmp_path, digits_like(tmp_path / "d.npz"))
    pruned = bench.run(PruneWeights.model_validate(pruning), bench.open(source("convolutions")))
    settings = Finetune.model_validate({"epochs": 2, "learning_rate": 0.01, **training})
    tuned = bench.run(settings, bench.run(settings, pruned))
    before, after = zeros_of(pruned), zeros_of(tuned)
    assert all(torch.equal(before[name], after[name]) for name in WEIGHTS)
    old, new = (load_network(artifact)[0].get_parameter("3.weight") for artifact in (pruned, tuned))
    assert (old != new)[~before["3.weight"]].float().mean() > 0.99


def test_zeros_outlive_training_for_quantization(tmp_path: Path) -> None:
    """BatchNorm is folded, weights are rounded and trained: what was pruned is zero after all of it."""
    data = digits_like(tmp_path / "d.npz", labels=False)
    bench = Bench(tmp_path)
    bench.context = replace(bench.context, data=DataRoles(calibration=data))
    pruned = bench.run(PruneWeights(pattern="2:4"), bench.open(source("convolutions")))
    settings = Finetune.model_validate({"epochs": 2, "simulate": {"kind": "quantize_static"}})
    before, after = zeros_of(pruned), zeros_of(bench.run(settings, pruned))
    assert all(after[name][before[name]].all() for name in WEIGHTS)
    assert before["3.weight"].sum() <= after["3.weight"].sum() < 0.7 * after["3.weight"].numel()


def test_pruning_goes_on_where_it_was(tmp_path: Path) -> None:
    """Half, then three quarters: what is zero counts, and stays zero."""
    bench = Bench(tmp_path)
    half = bench.run(PruneWeights(sparsity=0.5), bench.open(source("convolutions")))
    more = bench.run(PruneWeights(sparsity=0.75, ignore=("8",)), half)
    assert bench.facts["sparsity_by_layer"] == dict.fromkeys(WEIGHTS[:2], 0.75)
    before, after = zeros_of(half), zeros_of(more)
    assert set(after) == set(WEIGHTS)
    assert all(after[name][zeros].all() for name, zeros in before.items())


def test_channels_may_go_afterwards(tmp_path: Path) -> None:
    """The names still hold, and no zero comes back in the training after."""
    bench = Bench(tmp_path, digits_like(tmp_path / "d.npz"))
    sparse = bench.run(PruneWeights(sparsity=0.5), bench.open(source("convolutions")))
    cut = bench.run(PruneChannels(pruning_ratio=0.5), sparse)
    before = zeros_of(cut)
    assert before["3.weight"].any()
    after = zeros_of(bench.run(Finetune(epochs=1), cut))
    assert all(torch.equal(before[name], after[name]) for name in WEIGHTS)


def test_ignored_modules_stay_whole(tmp_path: Path) -> None:
    """With all they contain; a name that fits nothing is refused with the nearest."""
    bench = Bench(tmp_path)
    given = bench.open(source("Transformer"))
    settings = PruneWeights(sparsity=0.5, ignore=("attention", "head"))
    names = read_architecture(bench.run(settings, given)).sparse
    assert names == ("down.weight", "embed.weight", "up.weight")
    with pytest.raises(ConfigError, match="no such module") as caught:
        bench.run(PruneWeights(sparsity=0.5, ignore=("atention",)), given)
    assert caught.value.fix == "did you mean 'attention'?"


def test_attention_is_pruned_where_it_multiplies(tmp_path: Path) -> None:
    """The projections of torch's own attention are weights too; biases and norms are not."""
    bench = Bench(tmp_path)
    names = read_architecture(
        bench.run(PruneWeights(pattern="2:4"), bench.open(source("Transformer", args={"kind": "torch"})))
    ).sparse
    assert {"attention.in_proj_weight", "attention.out_proj.weight"} < set(names)
    assert not any("bias" in name or name.startswith(("before", "between", "after")) for name in names)


def test_embeddings_stay_and_tied_layers_count_once(tmp_path: Path) -> None:
    """A layer that is an embedding as well is left, and said; a weight of two layers is one weight."""
    bench = Bench(tmp_path)
    names = read_architecture(bench.run(PruneWeights(sparsity=0.5), bench.open(text_source("TiedLanguage")))).sparse
    assert names == ("down.weight", "up.weight")
    assert bench.facts["declined"] == ["head.weight: it is an embedding as well"]
    weights, declined = _weights(torch_models.Tied(), [])
    assert ([weight.name for weight in weights], declined) == (["first.weight"], [])


def test_equal_weights_go_from_the_end() -> None:
    """Of equal magnitudes the first are kept, in a group and in a layer."""
    layer = nn.Linear(4, 2)
    weight = Weight("weight", layer, nn.Parameter(torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]])))
    groups, flat = (
        _masks([weight], PruneWeights(**s))[0].int().tolist() for s in ({"pattern": "2:4"}, {"sparsity": 0.25})
    )
    assert groups == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert flat == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_layer_without_weights_is_warned_of(tmp_path: Path) -> None:
    """What nothing of is left computes its bias alone: the user should know."""
    bench = Bench(tmp_path)
    given = bench.open(source("convolutions"))
    bench.run(PruneWeights(sparsity=0.9), given)
    assert "warnings" not in bench.facts
    bench.run(PruneWeights(sparsity=0.99), given)
    assert bench.facts["warnings"] == ["every weight of 8.weight is zero: lower `sparsity`, or use `ignore`"]


def test_a_network_without_weights_is_refused(tmp_path: Path) -> None:
    """Everything ignored: nothing to do is a mistake."""
    bench = Bench(tmp_path)
    with pytest.raises(ModelError, match="no weight of the network can be pruned") as caught:
        bench.run(PruneWeights(sparsity=0.5, ignore=("0", "3", "8")), bench.open(source("convolutions")))
    assert str(caught.value.got).endswith("outside `ignore`")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither `sparsity` nor `pattern`"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "is a sparsity too"),
        ({"pattern": "4:4"}, "keeps every weight"),
        ({"pattern": "0:4"}, "pattern"),
        ({"pattern": "half"}, "pattern"),
        ({"pattern": "2:4", "scope": "global"}, "`scope` is for `sparsity`"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    """One way to prune, and one that prunes."""
    with pytest.raises(ValidationError, match=message):
        PruneWeights.model_validate(settings)


def test_a_pattern_needs_no_quotes(tmp_path: Path) -> None:
    """YAML 1.2 reads 2:4 as text."""
    path = tmp_path / "c.yaml"
    path.write_text(
        'model: {factory: "torch_models:convolutions", inputs: {image: {shape: [batch, 1, 6, 6]}}}\n'
        "stages: [{kind: prune_weights, pattern: 2:4}, {kind: export}]\n"
    )
    stage = load_config(path).stages[0]
    assert isinstance(stage, PruneWeights)
    assert stage.group == (2, 4)
