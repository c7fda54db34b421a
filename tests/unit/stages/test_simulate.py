from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch_models
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.quant_utils import compute_data_quant_params, quantize_nparray
from torch import Tensor, nn
from torch_models import Bench, digits_like, source

from onnxshrink.calibration.prepare import SUITED_TO_TRANSFORMERS
from onnxshrink.config.data import DataRoles
from onnxshrink.config.stages import Export, Finetune, QuantizeStatic, QuantizeWeights
from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.torch_model import load_network
from onnxshrink.stages import simulate
from onnxshrink.stages.blocks import quantize_blocks
from onnxshrink.stages.fake_quantize import grid_of, round_activation, round_blocks, round_weights
from onnxshrink.stages.fold_batch_norm import fold_batch_norms
from onnxshrink.stages.simulate import Simulation, simulated

INT8 = QuantizeStatic(types="u8s8", isa="x86_vnni")


class Branching(nn.Module):
    """Chooses its way by its data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4) to (batch, 4)."""
        y = self.layer(x)
        return torch.relu(self.layer(y)) if x.mean() > 10 else y


class Shared(nn.Module):
    """A convolution whose output goes to BatchNorm and past it, and one that BatchNorm is alone to read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.ConvTranspose2d(4, 6, 3, bias=False)
        self.plain = nn.BatchNorm2d(6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 6, 6) to (batch, 6, 6, 6)."""
        y = self.first(x)
        y = self.norm(y) + y
        return self.plain(self.second(y))


def with_statistics(network: nn.Module) -> nn.Module:
    """BatchNorms that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.05, 4, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return network.eval()


def bench(root: Path, **settings: Any) -> Bench:
    """A run whose calibration samples have no labels."""
    root.mkdir()
    made = Bench(root, **settings)
    data = digits_like(root / "calibration.npz", labels=False, count=64)
    made.context = replace(made.context, data=DataRoles(calibration=data))
    return made


def quantized_by_onnx(values: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear, by ONNX Runtime."""
    constants = [
        numpy_helper.from_array(np.float32(scale), "scale"),
        numpy_helper.from_array(np.uint8(zero_point), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(values.shape)) for name in "xy"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": values})[0]
    return result


@pytest.mark.parametrize("limits", [(-1.3, 2.7), (0.0, 6.0), (-5.0, 0.0), (-1e-3, 300.0)])
def test_activations_are_rounded_as_onnx_runtime_rounds_them(limits: tuple[float, float]) -> None:
    """The same floats, inside the range and outside; ties apart."""
    values = np.random.default_rng(0).uniform(2 * limits[0] - 1, 2 * limits[1] + 1, 4001).astype(np.float32)
    scale, zero_point = grid_of(limits)
    zero, expected = compute_scale_zp_of(limits)
    assert (scale, zero_point) == (expected, zero)
    np.testing.assert_array_equal(
        round_activation(torch.from_numpy(values), limits).numpy(), quantized_by_onnx(values, scale, zero_point)
    )


def compute_scale_zp_of(limits: tuple[float, float]) -> tuple[int, float]:
    """Zero point and scale by ONNX Runtime."""
    zero, scale = compute_data_quant_params(np.float32(limits), TensorProto.UINT8, symmetric=False)
    return int(zero), float(scale)


@pytest.mark.parametrize(("bits", "signed"), [(8, True), (7, True), (8, False), (7, False)])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_weights_are_rounded_as_onnx_runtimes_quantizer_rounds_them(
    bits: int, axis: int | None, *, signed: bool
) -> None:
    """Bit for bit, per tensor and per channel, also where a channel is zero throughout."""
    weights = np.random.default_rng(1).normal(0, 0.3, (5, 4, 3)).astype(np.float32)
    weights[2] = 0
    rounded = round_weights(torch.from_numpy(weights), axis=axis, bits=bits, signed=signed).numpy()
    channels = [weights] if axis is None else list(np.moveaxis(weights, axis, 0))
    expected = []
    kind = TensorProto.INT8 if signed else TensorProto.UINT8
    for channel in channels:
        zero, scale = compute_data_quant_params(channel, kind, symmetric=signed, reduce_range=bits == 7)
        steps = quantize_nparray(kind, channel, scale, zero).astype(np.float32) - np.float32(zero)
        expected.append(steps * np.float32(scale))
    whole = expected[0] if axis is None else np.moveaxis(np.stack(expected), 0, axis)
    np.testing.assert_array_equal(rounded, whole)
    again = round_weights(torch.from_numpy(rounded), axis=axis, bits=bits, signed=signed).numpy()
    np.testing.assert_allclose(again, rounded, rtol=0, atol=1e-6)


def test_blocks_are_those_of_quantize_weights() -> None:
    """The same floats, from the same code; rounding twice changes next to nothing."""
    rows = np.random.default_rng(2).normal(0, 1, (6, 50)).astype(np.float32)
    rounded = round_blocks(torch.from_numpy(rows), bits=4, block_size=16)
    np.testing.assert_array_equal(rounded.numpy(), quantize_blocks(rows, bits=4, block_size=16).dequantized())
    assert len(np.unique(rounded[0, :16])) <= 16


def test_gradients_go_straight_through() -> None:
    """One where nothing is clipped, and none where an activation is."""
    weights = torch.randn(3, 32, requires_grad=True)
    for rounded in (round_weights(weights, axis=0), round_blocks(weights, bits=4, block_size=16)):
        (gradient,) = torch.autograd.grad((rounded * 3).sum(), weights)
        assert torch.equal(gradient, torch.full_like(weights, 3))
    values = torch.tensor([-2.0, -0.5, 0.3, 5.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(round_activation(values, (-1.0, 2.0)).sum(), values)
    assert gradient.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("factory", [torch_models.convolutions, Shared])
@torch.no_grad()
def test_folding_batch_norm_keeps_the_function_and_the_state_dict(factory: Any) -> None:
    """To 1e-5; what else reads a convolution's output is not folded, and a folded norm multiplies by one."""
    torch.manual_seed(0)
    network = with_statistics(factory())
    names = {name: value.shape for name, value in network.state_dict().items()}
    x = torch.randn(8, 1, 6, 6)
    before = network(x)
    folded = fold_batch_norms(network, (x,))
    assert len(folded) == (2 if factory is torch_models.convolutions else 1)
    assert float((network(x) - before).abs().max() / before.abs().max()) < 1e-5
    assert {name: value.shape for name, value in network.state_dict().items()} == names
    fresh = factory()
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(x), network(x))
    for norm in (pair.norm for pair in folded):
        ones = torch.ones(1, norm.num_features, 1, 1)
        torch.testing.assert_close(norm(ones) - norm(0 * ones), ones, rtol=0, atol=1e-6)


@torch.no_grad()
def test_outside_of_the_simulation_a_network_computes_in_float() -> None:
    """And its weights lie on their grid, so the quantize stage adds nothing to their rounding."""
    torch.manual_seed(0)
    network = with_statistics(torch_models.convolutions())
    x = torch.randn(40, 1, 6, 6)
    before = network(x)
    with simulated(network, INT8, [(x,)]) as simulation:
        inside = network(x)
        assert not network.training
        assert simulation.folded == 2
        # The input, two convolutions with Relu, the pool's output (and it flattened), the logits.
        assert 5 <= simulation.activations <= 6
    after = network(x)
    assert 0 < float((inside - before).norm() / before.norm()) < 0.05
    assert not torch.equal(inside, after)
    weights = network.get_parameter("0.weight")
    assert torch.allclose(round_weights(weights, axis=0), weights, rtol=0, atol=1e-6)


@torch.no_grad()
def test_relu_is_part_of_the_operator_before_it() -> None:
    """What is rounded is its output, on a grid that starts at zero."""
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).eval()
    x = torch.randn(32, 4)
    with simulated(network, INT8, [(x,)]) as simulation:
        lows = [limits[0] for limits in simulation._limits if limits is not None]
        assert len(lows) == 3
        assert lows[1] == 0


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 4])
def test_biases_are_corrected_before_training(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Channels keep the means that they have in float, however many the batches; without it they move tenfold."""
    x = torch.randn(400, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    scheme = INT8.model_copy(update={"granularity": "per_tensor"})

    def moved() -> float:
        torch.manual_seed(0)
        convolutions = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
        network = with_statistics(nn.Sequential(*convolutions))
        network.get_parameter("0.weight")[0] *= 40  # leaves the other channels a few levels
        wanted = network(x).mean(dim=(0, 2, 3))
        with simulated(network, scheme, [(part,) for part in x.chunk(count)]):
            return float((network(x).mean(dim=(0, 2, 3)) - wanted).norm() / wanted.norm())

    corrected = moved()
    monkeypatch.setattr(simulate, "HAS_BIAS", ())
    assert corrected < 0.1 * moved()


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_a_few_large_weights_give_way_where_all_share_one_scale(granularity: str) -> None:
    """As far as the output gains from finer steps; where channels have their own scales they stay."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    layer.weight[0, 0] = 20.0
    network = nn.Sequential(layer).eval()
    x = torch.randn(256, 64)
    x[:, 0] *= 1e-3  # what it meets is small
    wanted = network(x)
    whole = layer.weight.detach().clone()
    with simulated(network, INT8.model_copy(update={"granularity": granularity}), [(x,)]):
        pass
    if granularity == "per_channel":
        assert float(layer.weight.max()) == pytest.approx(20)
        return
    assert 0.1 < float(layer.weight.max()) < 2
    unclipped = nn.functional.linear(x, round_weights(whole, axis=None), layer.bias)
    assert float((network(x) - wanted).norm()) < 0.2 * float((unclipped - wanted).norm())


def test_operators_that_stay_in_float_are_not_rounded() -> None:
    """The settings' operator types count here too."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 2)).eval()
    x = torch.randn(32, 1, 6, 6)
    head = network.get_parameter("2.weight").clone()
    with simulated(network, INT8.model_copy(update={"op_types": ("Conv",)}), [(x,)]) as simulation:
        assert simulation.activations == 2
    torch.testing.assert_close(network.get_parameter("2.weight"), head, rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("setting", "left"), [("float_first", "0"), ("float_last", "4")])
def test_outermost_layers_stay_in_float_where_the_scheme_leaves_them(setting: str, left: str) -> None:
    """With the BatchNorm that becomes part of them; what the next layer reads is rounded."""
    network = with_statistics(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    )
    x = torch.randn(32, 1, 6, 6)
    fold_batch_norms(network, (x,))
    whole = {name: network.get_parameter(f"{name}.weight").clone() for name in ("0", "4")}
    with simulated(network, INT8.model_copy(update={setting: 1}), [(x,)]) as simulation:
        assert simulation.activations == 2  # what the other layer reads and writes
    for name, weights in whole.items():
        same = torch.allclose(network.get_parameter(f"{name}.weight"), weights, rtol=1e-6, atol=0)
        assert same == (name == left)


def test_a_transformer_rounds_what_its_quantize_stage_will() -> None:
    """Behind a LayerNorm only products and lookups, as `quantize_static` decides, unless `op_types` says otherwise."""
    inputs = [(torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)),)]
    counts = []
    for op_types in (None, SUITED_TO_TRANSFORMERS, ("Add", "LayerNormalization", "MatMul", "Softmax")):
        with simulated(torch_models.Transformer(), QuantizeStatic(op_types=op_types), inputs) as simulation:
            counts.append(simulation.activations)
    assert 0 < counts[0] == counts[1] < counts[2]


def test_another_way_through_the_forward_is_refused() -> None:
    """Ranges belong to places in one way through it."""
    network = Branching().eval()
    x = torch.randn(32, 4)
    with simulated(network, INT8, [(x,)]), pytest.raises(ModelError, match="another way"):
        network(x + 100)
    assert not Simulation(INT8).activations
    assert network(x + 100).shape == (32, 4)


def noise_of(made: Bench, original: Any, artifact: Any, variant: QuantizeStatic | QuantizeWeights) -> float:
    """Noise share of the variant's real artifact against the original network, on unseen samples."""
    model = made.run(variant, made.run(Export(), artifact))
    session = onnxruntime.InferenceSession(model.model_path, providers=["CPUExecutionProvider"])
    x = np.load(digits_like(model.path.parent / "unseen.npz", count=90).npz)["image"] + np.float32(0.05)
    network, _ = load_network(original)
    with torch.no_grad():
        wanted = network(torch.from_numpy(x))[0].numpy()
    given = session.run(None, {session.get_inputs()[0].name: x})[0]
    return float(np.square(given - wanted).sum() / np.square(wanted).sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "share"),
    [
        (QuantizeWeights(bits=4, block_size=32, activations="float"), 0.7),
        (QuantizeStatic(granularity="per_tensor", method="mse", reduce_range=True, isa="x86_vnni"), 1.0),
    ],
    ids=["int4", "7 bits per tensor"],
)
def test_training_for_quantization_makes_the_real_artifact_better(
    tmp_path: Path, scheme: QuantizeStatic | QuantizeWeights, share: float
) -> None:
    """Against the original network, on samples it has not seen; the same bytes again for the same seed."""
    made = bench(tmp_path / "a")
    original = made.open(source("Residual"))
    settings = Finetune(simulate=scheme, epochs=12, learning_rate=0.01)
    tuned = made.run(settings, original)
    epochs = made.facts["epochs"]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert noise_of(made, original, tuned, scheme) < share * noise_of(made, original, original, scheme)
    again = bench(tmp_path / "b")
    assert again.run(settings, again.open(source("Residual"))).digest == tuned.digest


def test_the_stage_reads_calibration_samples_without_labels(tmp_path: Path) -> None:
    """It needs no other data; the facts say what was simulated and what was not."""
    settings = Finetune(simulate=INT8.model_copy(update={"exclude_nodes": ("node_linear",)}), epochs=1)
    assert settings.needs == ("calibration",)
    assert Finetune().needs == ("train",)
    made = bench(tmp_path / "a")
    made.run(settings, made.open(source("convolutions")))
    assert made.facts["folded_batch_norms"] == 2
    assert made.facts["rounded_activations"] >= 5
    assert "exclude_nodes" in made.facts["declined"]
