from pathlib import Path

import pytest
import torch
import torch_models
from torch_models import Bench, source

from onnxshrink.config.stages import Finetune, PruneChannels
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.runtime.torch_model import Architecture, build_network, example_inputs, load_network, run_network

WIDTH = 8


def test_channels_are_really_removed(tmp_path: Path) -> None:
    """Half of each layer's channels go, the output layer's stay, and the facts are the counts made by hand."""
    bench = Bench(tmp_path)
    artifact = bench.run(PruneChannels(pruning_ratio=0.5), bench.open(source("convolutions", args={"width": WIDTH})))
    network, _ = load_network(artifact)
    assert bench.facts["channels"] == {"0": [8, 4], "3": [16, 8], "8": [3, 3]}
    assert bench.facts["kept_for_outputs"] == ["8"]
    assert bench.facts["parameters_after"] == 9 * 4 + 2 * 4 + 9 * 4 * 8 + 2 * 8 + 8 * 3 + 3
    assert bench.facts["macs_after"] == 36 * 9 * 4 + 36 * 9 * 4 * 8 + 8 * 3
    assert bench.facts["parameters_before"] == 9 * 8 + 2 * 8 + 9 * 8 * 16 + 2 * 16 + 16 * 3 + 3
    assert "declined" not in bench.facts
    assert run_network(network, example_inputs(Architecture.of(source("convolutions")).inputs, 5))[0].shape == (5, 3)


@pytest.mark.parametrize(("importance", "norm"), [("magnitude_l1", 1), ("magnitude_l2", 2)])
def test_the_least_important_channels_go(tmp_path: Path, importance: str, norm: int) -> None:
    """Kept are the channels of largest norm, over the layer and all that depends on it, each scaled to mean one."""
    bench = Bench(tmp_path)
    given = bench.open(source("convolutions"))
    before, _ = load_network(given)
    settings = PruneChannels.model_validate({"pruning_ratio": 0.5, "importance": importance})
    after, _ = load_network(bench.run(settings, given))
    convolution, norms, following = (before.get_submodule(name).weight.detach() for name in ("0", "1", "3"))
    parts = [w.abs().pow(norm) for w in (convolution.flatten(1), norms[:, None], following.transpose(0, 1).flatten(1))]
    scores = [part.sum(1) for part in parts]
    total = sum(scores)
    assert isinstance(total, torch.Tensor)
    kept = total.topk(4).indices.sort().values
    torch.testing.assert_close(after.get_submodule("0").weight, convolution[kept], rtol=0, atol=0)


def test_dependencies_are_followed_and_every_output_is_kept(tmp_path: Path) -> None:
    """Additions, concatenations, groups and flattening lose matching channels; outputs lose none."""
    bench = Bench(tmp_path)
    given = bench.open(source("Residual"))
    before = run_network(load_network(given)[0], example_inputs((source("Residual").specs), 2))
    after = run_network(
        load_network(bench.run(PruneChannels(pruning_ratio=0.5), given))[0], example_inputs(source("Residual").specs, 2)
    )
    assert [output.shape for output in after] == [output.shape for output in before]
    assert bench.facts["channels"] == {
        "stem": [8, 4],
        "left": [8, 4],
        "grouped": [8, 4],
        "features": [8, 8],
        "head": [3, 3],
    }
    assert set(bench.facts["kept_for_outputs"]) == {"features", "head"}


def test_pruning_twice_is_replayed_twice(tmp_path: Path) -> None:
    """The history of a network that was pruned again builds the network of the second pass."""
    bench = Bench(tmp_path)
    once = bench.run(PruneChannels(pruning_ratio=0.5), bench.open(source("Residual")))
    network, architecture = load_network(bench.run(PruneChannels(pruning_ratio=0.5), once))
    assert len(architecture.pruning) == 2
    assert bench.facts["channels"]["stem"] == [4, 2]
    again = build_network(architecture)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_channels_are_kept_in_multiples(tmp_path: Path) -> None:
    """`round_to` decides how many stay; a layer that would lose everything is left whole, and the facts say so."""
    bench = Bench(tmp_path)
    settings = PruneChannels(pruning_ratio=0.3, round_to=8)
    bench.run(settings, bench.open(source("convolutions", args={"width": WIDTH})))
    assert bench.facts["channels"] == {"0": [8, 8], "3": [16, 8], "8": [3, 3]}
    assert bench.facts["declined"] == ["0: all 8 channels kept"]


def test_global_scope_ranks_across_layers(tmp_path: Path) -> None:
    """Over the whole network, the share is that of all channels together."""
    bench = Bench(tmp_path)
    bench.run(PruneChannels(pruning_ratio=0.25, scope="global"), bench.open(source("convolutions", args={"width": 16})))
    (_, first), (_, second) = bench.facts["channels"]["0"], bench.facts["channels"]["3"]
    assert first + second == 16 + 32 - 12


def test_ignored_modules_are_left_alone(tmp_path: Path) -> None:
    """What `ignore` names keeps its channels; what it misspells is an error with a suggestion."""
    bench = Bench(tmp_path)
    given = bench.open(source("Residual"))
    bench.run(PruneChannels(pruning_ratio=0.5, ignore=("grouped",)), given)
    assert bench.facts["channels"]["grouped"] == [8, 8]
    assert bench.facts["channels"]["stem"] == [8, 4]
    with pytest.raises(ConfigError, match="no such module") as caught:
        bench.run(PruneChannels(pruning_ratio=0.5, ignore=("gruoped",)), given)
    assert caught.value.fix == "did you mean 'grouped'?"


def test_a_network_that_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    """A network that counts its channels by number breaks: that is found here, not in a later stage."""
    bench = Bench(tmp_path)
    with pytest.raises(ModelError, match="prune") as caught:
        bench.run(PruneChannels(pruning_ratio=0.4), bench.open(source("Grouped")))
    assert "ignore" in str(caught.value.fix)


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    """Tracing needs gradients everywhere; afterwards the factory's choice of what to train holds again."""
    bench = Bench(tmp_path)
    network, _ = load_network(bench.run(PruneChannels(pruning_ratio=0.5), bench.open(source("frozen_stem"))))
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["0.weight"]


def test_a_pruned_network_can_be_trained_and_reloaded(tmp_path: Path) -> None:
    """Fine-tuning keeps the history: the trained network is again factory, history and tensors."""
    bench = Bench(tmp_path, torch_models.digits_like(tmp_path / "d.npz"))
    pruned = bench.run(PruneChannels(pruning_ratio=0.5), bench.open(source("convolutions")))
    tuned, architecture = load_network(bench.run(Finetune(epochs=1, batch_size=16), pruned))
    assert len(architecture.pruning) == 1
    assert not torch.equal(tuned.get_submodule("0").weight, load_network(pruned)[0].get_submodule("0").weight)
