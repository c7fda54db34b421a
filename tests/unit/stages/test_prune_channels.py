import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_models
from pydantic import ValidationError
from torch.nn import functional
from torch_models import Bench, source

from onnxshrink.config.source import FactorySource
from onnxshrink.config.stages import Export, Finetune, PruneChannels
from onnxshrink.config.torch_stages import Recovery
from onnxshrink.core.errors import ConfigError, DataError, ModelError
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


@pytest.mark.parametrize(
    ("importance", "norm", "shared"), [("group_norm", 2, True), ("magnitude_l1", 1, False), ("magnitude_l2", 2, False)]
)
def test_the_least_important_channels_go(tmp_path: Path, importance: str, norm: int, shared: bool) -> None:  # noqa: FBT001
    """Kept are the channels of largest norm: of the layer's own filters, or of all that shares the channel."""
    bench = Bench(tmp_path)
    given = bench.open(source("convolutions"))
    before, _ = load_network(given)
    settings = PruneChannels.model_validate({"pruning_ratio": 0.5, "importance": importance})
    after, _ = load_network(bench.run(settings, given))
    convolution, norms, following = (before.get_submodule(name).weight.detach() for name in ("0", "1", "3"))
    parts = [w.abs().pow(norm) for w in (convolution.flatten(1), norms[:, None], following.transpose(0, 1).flatten(1))]
    scores = [part.sum(1) for part in parts]
    total = sum(scores) if shared else scores[0]
    assert isinstance(total, torch.Tensor)
    kept = total.topk(4).indices.sort().values
    torch.testing.assert_close(after.get_submodule("0").weight, convolution[kept], rtol=0, atol=0)


@pytest.mark.parametrize("labels", [True, False])
def test_taylor_keeps_what_the_loss_would_miss(tmp_path: Path, labels: bool) -> None:  # noqa: FBT001
    """The score is |weight x gradient| over the layers that share a channel; without labels, of the outputs' square."""
    data = torch_models.digits_like(tmp_path / "d.npz", labels=labels)
    bench = Bench(tmp_path, data)
    given = bench.open(source("convolutions"))
    before, _ = load_network(given)
    after, _ = load_network(bench.run(PruneChannels(pruning_ratio=0.5, importance="taylor"), given))
    arrays = np.load(data.npz)
    logits = before(torch.from_numpy(arrays["image"]))
    chosen = torch.from_numpy(arrays["labels"]) if labels else None
    (0.5 * logits.square().sum() if chosen is None else functional.cross_entropy(logits, chosen)).backward()
    own, following = before.get_submodule("0").weight, before.get_submodule("3").weight
    assert own.grad is not None
    assert following.grad is not None
    score = (own * own.grad).abs().flatten(1).sum(1) + (following * following.grad).abs().sum((0, 2, 3))
    torch.testing.assert_close(
        after.get_submodule("0").weight, own[score.topk(4).indices.sort().values], rtol=0, atol=0
    )


def test_taylor_refuses_labels_that_do_not_fit(tmp_path: Path) -> None:
    """A class that the network does not have is found at the labels, not in a later loss."""
    bench = Bench(tmp_path, torch_models.digits_like(tmp_path / "d.npz"))
    with pytest.raises(DataError, match="has 2 classes"):
        bench.run(
            PruneChannels(pruning_ratio=0.5, importance="taylor"),
            bench.open(source("convolutions", args={"classes": 2})),
        )


def test_chance_is_seeded(tmp_path: Path) -> None:
    """`random` removes others for another seed, and the same for the same; `lamp` needs no seed."""
    kept = []
    for at, seed in enumerate((1, 1, 2)):
        bench = Bench(tmp_path / str(at), seed=seed)
        # The same weights for each seed: only the choice may differ.
        bench.context = dataclasses.replace(bench.context, seed=0)
        given = bench.open(source("convolutions"))
        bench.context = dataclasses.replace(bench.context, seed=seed)
        _, architecture = load_network(bench.run(PruneChannels(pruning_ratio=0.5, importance="random"), given))
        kept.append(architecture.pruning)
    assert kept[0] == kept[1] != kept[2]
    bench.run(PruneChannels(pruning_ratio=0.5, importance="lamp", scope="global"), given)
    assert sum(after for _, after in bench.facts["channels"].values()) == 12 + 3


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


QKV = {f"attention.{name}": 4 for name in "qkv"}


@pytest.mark.parametrize(
    ("factory", "args", "num_heads", "cut"),
    [
        ("InvertedResidual", {}, {}, {"stem": 4, "expand.0": 16, "depthwise.0": 16, "project.0": 4}),
        ("GroupedConvolutions", {}, {}, {"stem": 4, "grouped": 8, "depthwise": 8, "mix": 12, "hidden": 5}),
        ("Transformer", {}, QKV, {"embed": 8, "attention.q": 8, "attention.k": 8, "attention.out": 8, "up": 32}),
        ("Transformer", {"kind": "fused"}, {"attention.qkv": 4}, {"attention.qkv": 24, "attention.out": 8, "down": 8}),
        ("Transformer", {"kind": "torch"}, {}, {"embed": 8, "attention.out_proj": 8, "up": 32, "down": 8}),
    ],
)
def test_a_topology_is_pruned(
    tmp_path: Path, factory: str, args: dict[str, object], num_heads: dict[str, int], cut: dict[str, int]
) -> None:
    """Half of the channels go from every layer, and the result gives outputs of the old shape for every batch."""
    bench = Bench(tmp_path)
    given = bench.open(source(factory, args=args))
    artifact = bench.run(PruneChannels(pruning_ratio=0.5, num_heads=num_heads), given)
    facts = bench.facts
    assert {name: facts["channels"][name][1] for name in cut} == cut
    assert "declined" not in facts
    network, architecture = load_network(artifact)
    for batch in (1, 3):
        assert run_network(network, example_inputs(architecture.inputs, batch))[0].shape == (batch, 3)


@pytest.mark.parametrize(
    ("factory", "args", "cut", "whole", "reason"),
    [
        ("Shortcut", {}, {"first": 8}, {"stem", "second"}, "as by padding"),
        ("Shortcut", {"measured": True}, {"first": 8}, {"stem", "second"}, "as by padding"),
        ("GroupedConvolutions", {"flat": True}, {"hidden": 5}, {"stem", "grouped", "depthwise"}, "does not run"),
        ("Shuffle", {}, {"stem": 4, "last": 4}, {"other"}, "does not run"),
        ("Shuffle", {"spare": True}, {"stem": 4, "last": 4}, {"other"}, "other channels change"),
        ("Transformer", {}, {"embed": 8, "up": 32}, set(QKV), "does not run"),
    ],
)
def test_what_cannot_go_alone_is_declined(
    tmp_path: Path, factory: str, args: dict[str, object], cut: dict[str, int], whole: set[str], reason: str
) -> None:
    """Layers whose channels are misplaced by cutting stay whole, the facts say why, and the others are pruned."""
    bench = Bench(tmp_path)
    bench.run(PruneChannels(pruning_ratio=0.5), bench.open(source(factory, args=args)))
    assert {name: bench.facts["channels"][name][1] for name in cut} == cut
    assert {text.partition(":")[0] for text in bench.facts["declined"]} == whole
    assert all(reason in text for text in bench.facts["declined"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "num_heads"),
    [
        ("InvertedResidual", {}),
        ("GroupedConvolutions", {}),
        ("Shortcut", {}),
        ("Shuffle", {}),
        ("Transformer", QKV),
    ],
)
def test_a_pruned_topology_exports(tmp_path: Path, factory: str, num_heads: dict[str, int]) -> None:
    """ONNX Runtime gives the pruned network's numbers at two batch sizes, which the export itself checks."""
    bench = Bench(tmp_path)
    pruned = bench.run(PruneChannels(pruning_ratio=0.5, num_heads=num_heads), bench.open(source(factory)))
    bench.run(Export(), pruned)
    assert bench.ran[-1] == "export"


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """What an embedding shares with the output layer keeps its width and stays one tensor; the rest is pruned."""
    bench = Bench(tmp_path)
    tokens = {"image": {"shape": ("batch", 5), "dtype": "int64"}}
    given = bench.open(FactorySource.model_validate({"factory": "torch_models:TiedLanguage", "inputs": tokens}))
    network, _ = load_network(bench.run(PruneChannels(pruning_ratio=0.5), given))
    assert network.get_submodule("head").weight is network.get_submodule("embedding").weight
    assert bench.facts["channels"]["up"] == [32, 16]
    assert "embedding.weight and head.weight" in bench.facts["declined"][0]
    with pytest.raises(ModelError, match="nothing of the network can be pruned"):
        bench.run(PruneChannels(pruning_ratio=0.5), bench.open(source("Tied", ("batch", 4))))


def test_whole_heads_are_removed(tmp_path: Path) -> None:
    """The heads that stay give what they gave before: silencing the others by hand gives the same numbers."""
    bench = Bench(tmp_path)
    given = bench.open(source("Transformer"))
    others = ("embed", "up", "down", "attention.out")
    artifact = bench.run(PruneChannels(pruning_ratio=0.5, num_heads=QKV, ignore=others), given)
    after, architecture = load_network(artifact)
    before, _ = load_network(given)
    assert architecture.pruning[0].attributes == {"attention.num_heads": 2}
    ((root, out, channels),) = architecture.pruning[0].cuts
    assert (root, out, len(channels)) == ("attention.out", False, 8)
    assert {channel // 4 for channel in channels} == {channels[0] // 4, channels[-1] // 4}
    inputs = example_inputs(architecture.inputs, 3)
    with torch.no_grad():
        before.get_submodule("attention.out").weight[:, list(channels)] = 0
        torch.testing.assert_close(run_network(after, inputs), run_network(before, inputs))


def test_a_network_that_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    """A network that counts its channels by number is refused where nothing of it can go, with the reason."""
    bench = Bench(tmp_path)
    with pytest.raises(ModelError, match="pruned") as caught:
        bench.run(PruneChannels(pruning_ratio=0.4), bench.open(source("Grouped")))
    assert "conv: the network does not run" in str(caught.value.got)


def test_heads_must_fit_their_layers(tmp_path: Path) -> None:
    """`num_heads` names linear layers that divide into so many heads."""
    bench = Bench(tmp_path)
    given = bench.open(source("Transformer"))
    with pytest.raises(ConfigError, match="gives 5 heads"):
        bench.run(PruneChannels(pruning_ratio=0.5, num_heads={"attention.q": 5}), given)
    with pytest.raises(ConfigError, match="no such module"):
        bench.run(PruneChannels(pruning_ratio=0.5, num_heads={"attention.x": 4}), given)


@pytest.mark.parametrize("scope", ["per_layer", "global"])
def test_a_macs_budget_is_met(tmp_path: Path, scope: str) -> None:
    """The search ends within the budget, and what the next smaller ratio tried would give is above it."""
    bench = Bench(tmp_path)
    given = bench.open(source("convolutions", args={"width": 16}))
    settings = PruneChannels.model_validate({"max_macs_ratio": 0.5, "scope": scope})
    bench.run(settings, given)
    (step,) = bench.facts["steps"]
    assert bench.facts["macs_after"] <= step["limit"] == 0.5 * bench.facts["macs_before"]
    over = [value for ratio, value in step["tried"] if ratio < step["pruning_ratio"]]
    assert min(over) > step["limit"]
    assert bench.facts["macs_after"] in [value for _, value in step["tried"]]
    bench.run(PruneChannels(pruning_ratio=step["pruning_ratio"], scope=settings.scope), given)
    assert bench.facts["steps"] == [{"pruning_ratio": step["pruning_ratio"]}]


def test_a_size_is_met_or_refused(tmp_path: Path) -> None:
    """The estimate after pruning is within `max_size`; a size out of reach names the smallest that is not."""
    bench = Bench(tmp_path)
    given = bench.open(source("convolutions", args={"width": 32}))
    bench.run(PruneChannels(max_size=10_000), given)
    assert bench.facts["int8_bytes_after_estimate"] <= 10_000 < bench.facts["int8_bytes_before_estimate"]
    with pytest.raises(ModelError, match="cannot be pruned to 1,000 bytes") as caught:
        bench.run(PruneChannels(max_size=1_000), given)
    smallest = int(str(caught.value.got).split()[0].replace(",", ""))
    bench.run(PruneChannels(max_size=smallest), given)
    assert {after for name, (_, after) in bench.facts["channels"].items() if name != "8"} == {1}
    bench.run(PruneChannels(max_size=100_000), given)
    assert bench.facts["parameters_after"] == bench.facts["parameters_before"]


def test_a_target_out_of_reach_is_told_before_the_training_between_steps(tmp_path: Path) -> None:
    """The first of several steps looks at where the last one must come to."""
    bench = Bench(tmp_path, torch_models.digits_like(tmp_path / "d.npz"))
    given = bench.open(source("convolutions"))
    settings = PruneChannels(max_size=1_000, steps=3, finetune=Recovery(epochs=1))
    with pytest.raises(ModelError, match="cannot be pruned to 1,000 bytes"):
        bench.run(settings, given)
    assert bench.ran == ["source"]


@pytest.mark.parametrize("target", [{"pruning_ratio": 0.5}, {"max_macs_ratio": 0.4}])
def test_steps_with_training_between_replay_exactly(tmp_path: Path, target: dict[str, float]) -> None:
    """A little is pruned, the rest is trained, and again; the target is that of one step, and the history is whole."""
    bench = Bench(tmp_path, torch_models.digits_like(tmp_path / "d.npz"))
    given = bench.open(source("convolutions"))
    bench.run(PruneChannels.model_validate(target), given)
    at_once = bench.facts["channels"]
    bench.ran.clear()
    settings = {"steps": 3, "finetune": {"epochs": 1, "batch_size": 16}, **target}
    stepwise, architecture = load_network(bench.run(PruneChannels.model_validate(settings), given))
    assert bench.ran == ["finetune", "finetune", "prune_channels"]
    assert bench.facts["channels"] == at_once
    assert len(architecture.pruning) == len(bench.facts["steps"]) == 3
    shapes = {name: value.shape for name, value in build_network(architecture).state_dict().items()}
    assert shapes == {name: value.shape for name, value in stepwise.state_dict().items()}
    original = load_network(given)[0].get_submodule("0").weight
    kept = stepwise.get_submodule("0").weight
    assert not any(torch.equal(row, other) for row in kept for other in original)


def test_one_target_is_wanted() -> None:
    """None, or two, are refused when the config is read; so is training between the steps of one step."""
    for wrong, says in [
        ({}, "no target"),
        ({"pruning_ratio": 0.5, "max_size": "1 MB"}, "2 targets"),
        ({"pruning_ratio": 0.5, "finetune": {}}, "one step"),
    ]:
        with pytest.raises(ValidationError, match=says):
            PruneChannels.model_validate(wrong)
    assert PruneChannels(pruning_ratio=0.5).needs == ()
    assert PruneChannels(pruning_ratio=0.5, importance="taylor").needs == ("train",)


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
