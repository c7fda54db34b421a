from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch_models
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch_models import Bench, source

from onnxshrink.config.source import OnnxSource
from onnxshrink.core.artifact import digest_folder
from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.session import Session
from onnxshrink.runtime.torch_model import load_network, read_architecture
from onnxshrink.stages.source import open_source


def write_onnx(path: Path, *, operator: str = "MatMul") -> onnx.ModelProto:
    """Y = x · w with w (64, 3): large enough for external data."""
    weight = numpy_helper.from_array(np.ones((64, 3), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return model


def test_a_factory_becomes_an_artifact(tmp_path: Path) -> None:
    """Parameters, MACs and inputs are told, and the network in the artifact is the one that was built."""
    bench = Bench(tmp_path)
    artifact = bench.open(source("linear", ("batch", 4), outputs=("scores",)))
    assert bench.facts["parameters"] == 15
    assert bench.facts["macs"] == 12
    assert bench.facts["inputs"] == ["'image' float32[batch,4]"]
    assert read_architecture(artifact).outputs == ("scores",)
    assert not load_network(artifact)[0].training


def test_the_seed_decides_the_factorys_weights(tmp_path: Path) -> None:
    """The same seed gives the same artifact, another seed another one."""
    digests = []
    for index, seed in enumerate((0, 0, 1)):
        (tmp_path / str(index)).mkdir()
        open_source(source("convolutions"), tmp_path / str(index), seed=seed)
        digests.append(digest_folder(tmp_path / str(index)))
    assert digests[0] == digests[1] != digests[2]


def test_given_weights_are_loaded(tmp_path: Path) -> None:
    """As `.safetensors` or `.pth`; a prefix that had to be stripped stands in the facts."""
    state = {name: value + 2 for name, value in torch_models.linear().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    bench = Bench(tmp_path)
    for name in ("w.safetensors", "w.pth"):
        network, _ = load_network(bench.open(source("linear", ("batch", 4), weights=tmp_path / name)))
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert bench.facts["stripped_prefix"] == "module."


def test_a_network_that_does_not_take_its_inputs_is_refused(tmp_path: Path) -> None:
    """Declared inputs are tried at once, not found wrong after hours of training."""
    with pytest.raises(ModelError, match="fails on its inputs") as caught:
        open_source(source("linear", ("batch", 5)), tmp_path, seed=0)
    assert caught.value.got == "float32[2, 5]"
    with pytest.raises(ModelError, match="2 outputs and `outputs` names 1"):
        open_source(source("Residual", outputs=("logits",)), tmp_path, seed=0)


def test_an_onnx_file_keeps_its_bytes(tmp_path: Path) -> None:
    """Without external data the artifact is the user's file, byte for byte."""
    write_onnx(tmp_path / "mine.onnx")
    (tmp_path / "out").mkdir()
    facts = open_source(OnnxSource(onnx=tmp_path / "mine.onnx"), tmp_path / "out", seed=0)
    assert (tmp_path / "out/model.onnx").read_bytes() == (tmp_path / "mine.onnx").read_bytes()
    assert facts == {
        "parameters": 192,
        "inputs": ["'x' float32[batch,64]"],
        "outputs": ["'y' float32[batch,3]"],
        "classes": [3],
        "opset": 17,
    }


def test_external_data_comes_along(tmp_path: Path) -> None:
    """A model whose weights lie in another file is whole in the artifact."""
    model = write_onnx(tmp_path / "mine.onnx")
    onnx.save(model, str(tmp_path / "mine.onnx"), save_as_external_data=True, location="mine.data", size_threshold=0)
    (tmp_path / "out").mkdir()
    open_source(OnnxSource(onnx=tmp_path / "mine.onnx"), tmp_path / "out", seed=0)
    (tmp_path / "mine.data").unlink()
    outputs = Session(tmp_path / "out/model.onnx").run({"x": np.ones((2, 64), np.float32)})
    np.testing.assert_array_equal(outputs["y"], np.full((2, 3), 64.0))
    with pytest.raises(ModelError, match="external data"):
        open_source(OnnxSource(onnx=tmp_path / "mine.onnx"), tmp_path / "out", seed=0)


def test_an_invalid_onnx_file_is_refused(tmp_path: Path) -> None:
    """Garbage, and a graph with an operator that does not exist."""
    (tmp_path / "garbage.onnx").write_bytes(b"not a model")
    write_onnx(tmp_path / "odd.onnx", operator="NoSuchOperator")
    for name in ("garbage", "odd"):
        with pytest.raises(ModelError) as caught:
            open_source(OnnxSource(onnx=tmp_path / f"{name}.onnx"), tmp_path, seed=0)
        assert caught.value.where == str(tmp_path / f"{name}.onnx")
