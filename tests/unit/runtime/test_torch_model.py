import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_models
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch_models import Bench, source

from onnxshrink.config.stages import PruneChannels
from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime.torch_model import (
    Architecture,
    PruningPass,
    build_network,
    count_macs,
    count_parameters,
    example_inputs,
    load_network,
    run_network,
    save_network,
)
from onnxshrink.runtime.torch_weights import load_weights, read_state_dict

IMAGE = TensorSpec("image", "float32", ("batch", 1, 6, 6))


def test_a_reloaded_network_gives_the_same_numbers_in_another_process(tmp_path: Path) -> None:
    """Factory, history and tensors are the whole network: a process that has only these gets the same outputs."""
    bench = Bench(tmp_path)
    artifact = bench.run(PruneChannels(pruning_ratio=0.5), bench.open(source("Residual")))
    network, _ = load_network(artifact)
    here = run_network(network, example_inputs((IMAGE,), 3))
    script = """
import sys
from pathlib import Path
import numpy as np
from onnxshrink.core.artifact import Artifact, digest_folder
from onnxshrink.runtime.torch_model import example_inputs, load_network, run_network
folder = Path(sys.argv[1])
network, architecture = load_network(Artifact("torch", folder, digest_folder(folder)))
outputs = run_network(network, example_inputs(architecture.inputs, 3))
np.savez(sys.argv[2], *[output.detach().numpy() for output in outputs])
"""
    there = tmp_path / "there.npz"
    command = [sys.executable, "-c", script, str(artifact.path), str(there)]
    tests = str(Path(torch_models.__file__).parent)
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": tests})
    for ours, theirs in zip(here, np.load(there).values(), strict=True):
        np.testing.assert_array_equal(ours.detach().numpy(), theirs)


def test_an_architecture_survives_its_text() -> None:
    """What is written is what is read, pruning history included."""
    done = PruningPass((("0", True, (1, 3)), ("3", False, (0,))), {"block.heads": 2})
    architecture = Architecture.of(source("convolutions", args={"width": 4})).pruned(done)
    assert Architecture.from_json(architecture.to_json()) == architecture


def test_equal_networks_give_equal_bytes(tmp_path: Path) -> None:
    """A torch artifact's digest depends on the network alone, or the store would never find it again."""
    architecture = Architecture.of(source("convolutions"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_network(build_network(architecture, seed=5), architecture, tmp_path / name)
    files = [sorted((p.name, p.read_bytes()) for p in (tmp_path / name).iterdir()) for name in ("a", "b")]
    assert files[0] == files[1]


def test_building_leaves_the_callers_random_state_alone() -> None:
    """A factory draws from its own seed: what the caller draws next does not depend on it."""
    state = torch.get_rng_state()
    build_network(Architecture.of(source("convolutions")), seed=7)
    assert torch.equal(state, torch.get_rng_state())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """Weights that share memory are written, read and tied again, and count once."""
    bench = Bench(tmp_path)
    artifact = bench.open(source("Tied", ("batch", 4)))
    network, _ = load_network(artifact)
    assert isinstance(network, torch_models.Tied)
    assert network.first.weight is network.second.weight
    assert count_parameters(network) == 4 * 4 + 4 + 4


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_checkpoints_are_read_however_they_are_wrapped(tmp_path: Path, wrap: object) -> None:
    """A `.pth` may hold the state dict itself, or hold it beside the numbers of a training script."""
    state = torch_models.linear().state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")  # type: ignore[operator]
    read = read_state_dict(tmp_path / "w.pth")
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert list(read) == list(state)


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    """Reading weights never executes code from the file."""
    trace = tmp_path / "executed"

    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(trace),))

    torch.save({"weight": Malicious()}, tmp_path / "w.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Malicious()))
    for name in ("w.pth", "bare.pth"):
        with pytest.raises(ModelError, match="run code from it; it was not read") as caught:
            read_state_dict(tmp_path / name)
        assert "safetensors" in str(caught.value)
    assert not trace.exists()
    pickle.loads((tmp_path / "bare.pth").read_bytes())  # noqa: S301  # the trap does spring elsewhere
    assert trace.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_weights_are_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    """Garbage and empty files are refused in our words, not in a library's."""
    for content in (b"", b"not weights at all"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError) as caught:
            read_state_dict(tmp_path / name)
        assert name in str(caught.value.where)


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    """Tensors have to have names."""
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    torch.save({}, tmp_path / "empty.pth")
    for name, got in (("list", "list"), ("numbers", "'epoch': int"), ("empty", "an empty dict")):
        with pytest.raises(ModelError, match="no state dict") as caught:
            read_state_dict(tmp_path / f"{name}.pth")
        assert caught.value.got == got


def test_the_prefix_of_parallel_training_is_stripped_and_told(tmp_path: Path) -> None:
    """DataParallel puts `module.` before every name; only where all have it is it taken off."""
    network = torch_models.linear()
    path = tmp_path / "w.safetensors"
    save_file({f"module.{name}": value + 1 for name, value in network.state_dict().items()}, path)
    expected = {name: value + 1 for name, value in network.state_dict().items()}
    assert load_weights(network, path) == "module."
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    save_file({"module.weight": torch.ones(3, 4), "bias": torch.ones(3)}, path)
    with pytest.raises(ModelError, match="names differ"):
        load_weights(network, path)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    """A misspelt key gets a suggestion, a missing key and a wrong shape are named."""
    network, path = torch_models.linear(), tmp_path / "w.safetensors"
    save_file({"weigth": torch.ones(3, 4), "bias": torch.ones(3)}, path)
    with pytest.raises(ModelError) as caught:
        load_weights(network, path)
    assert caught.value.got == "unexpected 'weigth'"
    assert caught.value.want == "also 'weight'"
    assert "did you mean 'weight'?" in str(caught.value.fix)
    save_file({"bias": torch.ones(3)}, path)
    with pytest.raises(ModelError, match="names differ"):
        load_weights(network, path)
    save_file({"weight": torch.ones(10, 4), "bias": torch.ones(10)}, path)
    with pytest.raises(ModelError, match="'weight' has a shape") as caught:
        load_weights(network, path)
    assert (caught.value.got, caught.value.want) == ("[10, 4]", "[3, 4]")


def test_checkpoints_without_batch_counters_are_accepted(tmp_path: Path) -> None:
    """`num_batches_tracked` is no weight, and old checkpoints do not have it."""
    network = torch_models.convolutions()
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    load_weights(network, tmp_path / "w.safetensors")
    assert len(load_file(tmp_path / "w.safetensors")) == len(network.state_dict()) - 2


def test_a_factory_must_return_a_network() -> None:
    """Whatever goes wrong in the factory is told with its name, and its own exception stays visible."""
    with pytest.raises(ModelError, match="does not return a torch network") as caught:
        build_network(Architecture.of(source("no_module")))
    assert caught.value.got == "int"
    with pytest.raises(ModelError, match="the factory failed: ValueError: no such size") as caught:
        build_network(Architecture.of(source("failing")))
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ModelError, match="unexpected keyword") as caught:
        build_network(Architecture.of(source("linear", args={"clases": 3})))
    assert caught.value.fix == "check `args`"


def test_example_inputs_fit_their_specs() -> None:
    """Axes of one name have one length, the batch is the asked one, and integers are valid as indices."""
    specs = (
        TensorSpec("ids", "int64", ("batch", "length")),
        TensorSpec("mask", "bool", ("batch", "length")),
        TensorSpec("table", "float32", (5, "batch")),
    )
    ids, mask, table = example_inputs(specs, 3)
    assert ids.shape == mask.shape
    assert table.shape == (5, 3)
    assert len(ids) == 3
    assert (ids.dtype, mask.dtype, table.dtype) == (torch.int64, torch.bool, torch.float32)
    assert set(ids.unique().tolist()) <= {0, 1}
    assert torch.equal(example_inputs(specs, 3)[2], table)


def test_macs_are_those_counted_by_hand() -> None:
    """A convolution costs out · in · k² · H · W, a linear layer out · in; nothing else counts."""
    width = 8
    by_hand = 36 * 9 * width + 36 * 9 * width * 2 * width + 2 * width * 3
    assert count_macs(torch_models.convolutions(width).eval(), (IMAGE,)) == by_hand


def test_outputs_of_any_structure_come_in_order() -> None:
    """Tuples, lists and dicts are flattened; something that is no tensor is refused."""

    class Structured(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return {"logits": x, "states": [x + 1, (x + 2,)]}

    class Text(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return str(x)

    x = torch.zeros(1)
    assert [float(output) for output in run_network(Structured(), (x,))] == [0, 1, 2]
    with pytest.raises(ModelError, match="gives no tensors"):
        run_network(Text(), (x,))
    with pytest.raises(ModelError, match="fails on its inputs"):
        run_network(torch_models.linear(), (torch.zeros(2, 5),))


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def test_one_name_of_tied_weights_is_enough(tmp_path: Path) -> None:
    """`save_model` of safetensors drops the other names; both layers get the weight, unless they are not tied."""
    source_network, network = Tied(), Tied()
    save_model(source_network, tmp_path / "tied.safetensors")
    assert len(load_file(tmp_path / "tied.safetensors")) == 1
    load_weights(network, tmp_path / "tied.safetensors")
    assert torch.equal(network.second.weight, source_network.first.weight)
    assert network.first.weight is network.second.weight
    untied = Tied()
    untied.second.weight = nn.Parameter(untied.second.weight.detach().clone())
    with pytest.raises(ModelError, match="their names differ"):
        load_weights(untied, tmp_path / "tied.safetensors")


class Exits(nn.Module):
    """Ends the program."""

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """As a script would."""
        raise SystemExit(0)


def test_users_code_cannot_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sys.exit` in a factory or a network is an error, not the end of the run with status 0."""

    def leave() -> nn.Module:
        raise SystemExit(0)

    monkeypatch.setattr(torch_models, "leave", leave, raising=False)
    with pytest.raises(ModelError, match="the factory failed: SystemExit"):
        build_network(Architecture("torch_models:leave", {}, "0", (IMAGE,)))
    with pytest.raises(ModelError, match="fails on its inputs: SystemExit"):
        run_network(Exits(), [torch.zeros(1)])
