"""Torch networks as ONNX: the user's names, the asked opset, the same numbers, or a refusal that says why."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch_models import Bench, source

from onnxshrink.config.stages import Export
from onnxshrink.core.errors import ModelError, ParityError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime.graph import input_specs, opset_of, output_specs
from onnxshrink.runtime.session import Session
from onnxshrink.runtime.torch_export import export_network
from onnxshrink.stages.export import compare, name_output_axes

DYNAMO = Export()
CLASSIC = Export(exporter="torchscript")
X = (TensorSpec("x", "float32", ("batch", 4)),)


class Calls(nn.Module):
    """A network that is one function of its inputs and of the parameter ``weight`` of four ones."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """Whatever the function gives."""
        return self.function(x, self.weight)


class Tokens(nn.Module):
    """Two inputs of two axes, two outputs: embeddings of the tokens, and their mean where the mask is one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Scores for each token, and for the sequence."""
        tokens = self.head(self.embedding(ids))
        kept = mask.unsqueeze(-1).to(tokens.dtype)
        return {"tokens": tokens, "pooled": (tokens * kept).sum(1) / kept.sum(1).clamp(min=1)}


TOKENS = (TensorSpec("ids", "int64", ("batch", "length")), TensorSpec("mask", "int64", ("batch", "length")))


def exported(
    network: nn.Module,
    inputs: Sequence[TensorSpec] = X,
    settings: Export = CLASSIC,
    outputs: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """The model, proven at two batch sizes, with its output axes named."""
    model, _ = export_network(network.eval(), inputs, outputs, settings)
    trials = compare(network, model, inputs, settings, seed=0)
    name_output_axes(model, inputs, trials)
    return model


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Facts and model file of a small residual network with batch norm, exported by the stage."""
    bench = Bench(tmp_path_factory.mktemp("residual"))
    artifact = bench.run(DYNAMO, bench.open(source("Residual", outputs=("logits", "features"))))
    return bench.facts, artifact.model_path


def test_the_stage_leaves_a_model_that_says_what_was_asked(residual: tuple[dict[str, Any], Path]) -> None:
    """The user's names for inputs, outputs and axes, the asked opset, valid, and it runs at any batch size."""
    facts, path = residual
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert input_specs(model) == (TensorSpec("image", "float32", ("batch", 1, 6, 6)),)
    assert [(spec.name, spec.shape[0]) for spec in output_specs(model)] == [("logits", "batch"), ("features", "batch")]
    assert opset_of(model) == facts["opset"] == 20
    assert Session(path).run({"image": np.zeros((7, 1, 6, 6), np.float32)})["logits"].shape[0] == 7


def test_the_facts_are_measured(residual: tuple[dict[str, Any], Path]) -> None:
    """Size, nodes, parameters and the error at both batch sizes; plain JSON."""
    facts, path = residual
    model = onnx.load(path)
    assert facts["bytes"] == path.stat().st_size
    assert facts["nodes"] == len(model.graph.node)
    assert facts["parameters"] > 0
    assert set(facts["max_error"]) == {"batch 1", "batch 3"}
    assert all(0 <= error <= facts["max_abs_error"] for error in facts["max_error"].values())
    json.dumps(facts, allow_nan=False)


def test_no_trace_of_the_machine_is_left(residual: tuple[dict[str, Any], Path]) -> None:
    """The exporter writes stack traces with file names into every node; the model holds none."""
    data = residual[1].read_bytes()
    assert b".py" not in data
    assert b"stack_trace" not in data
    assert str(Path(__file__).parent).encode() not in data


@pytest.mark.slow
def test_the_same_network_gives_the_same_bytes(residual: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Nothing in the file depends on when or how often it was exported."""
    bench = Bench(tmp_path)
    again = bench.run(DYNAMO, bench.open(source("Residual", outputs=("logits", "features"))))
    assert again.model_path.read_bytes() == residual[1].read_bytes()


@pytest.mark.parametrize("settings", [DYNAMO, CLASSIC], ids=["dynamo", "torchscript"])
def test_several_inputs_and_outputs_keep_names_order_dtypes_and_axes(settings: Export) -> None:
    """Integer inputs with a dynamic sequence axis, outputs of a dict: one name, one axis, everywhere."""
    model = exported(Tokens(), TOKENS, settings, ["tokens", "pooled"])
    assert input_specs(model) == TOKENS
    assert output_specs(model) == (
        TensorSpec("tokens", "float32", ("batch", "length", 3)),
        TensorSpec("pooled", "float32", ("batch", 3)),
    )
    result = Session(model.SerializeToString()).run({"ids": np.ones((2, 9), int), "mask": np.ones((2, 9), int)})
    assert result["tokens"].shape == (2, 9, 3)


def test_outputs_without_names_are_numbered() -> None:
    """One is ``output``, several are ``output_0`` and so on, whatever the exporter calls them."""
    assert [value.name for value in exported(Calls(lambda x, w: x * w)).graph.output] == ["output"]
    two = exported(Calls(lambda x, w: (x * w, x + w)))
    assert [value.name for value in two.graph.output] == ["output_0", "output_1"]


@pytest.mark.parametrize("settings", [DYNAMO, CLASSIC], ids=["dynamo", "torchscript"])
def test_an_input_named_like_a_parameter_does_not_become_it(settings: Export) -> None:
    """The parameter gives way, and the numbers stay right."""
    specs = (TensorSpec("weight", "float32", ("batch", 4)),)
    network = Calls(lambda x, w: 3 * x + w)
    model, renamed = export_network(network.eval(), specs, None, settings)
    compare(network, model, specs, settings, seed=0)
    assert "weight" not in {tensor.name for tensor in model.graph.initializer}
    assert list(renamed) == ["weight"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [DYNAMO, CLASSIC], ids=["dynamo", "torchscript"])
def test_an_output_named_like_an_internal_value_does_not_become_it(settings: Export) -> None:
    """Whatever the exporter calls the first node's output, the user may call an output so."""
    network = Calls(lambda x, w: torch.relu(x * w).sum(1))
    model, _ = export_network(network.eval(), X, None, settings)
    name = model.graph.node[0].output[0]
    model, renamed = export_network(network.eval(), X, [name], settings)
    compare(network, model, X, settings, seed=0)
    assert [value.name for value in model.graph.output] == [name]
    assert list(renamed) == [name]
    assert sum(name in node.output for node in model.graph.node) == 1


def test_an_output_named_like_a_parameter_does_not_become_it() -> None:
    """Nor does it take the name of a weight."""
    network = Calls(lambda x, w: torch.relu(x * w))
    model, renamed = export_network(network.eval(), X, ["weight"], CLASSIC)
    compare(network, model, X, CLASSIC, seed=0)
    assert [value.name for value in model.graph.output] == ["weight"]
    assert list(renamed) == ["weight"]


def test_an_input_that_is_returned_gets_a_name_of_its_own() -> None:
    """ONNX has no output that is an input: an Identity stands between, also for a value returned twice."""
    model = exported(Calls(lambda x, w: (x, x * w, x)), outputs=["a", "b", "c"])
    assert [value.name for value in model.graph.input] == ["x"]
    assert [value.name for value in model.graph.output] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["x", "y"], "'x' is given to two"),
        (["y", "y"], "'y' is given to two"),
        (["y"], "has 2 outputs, and 1 are named"),
        (["y", "z", "u"], "has 2 outputs, and 3 are named"),
    ],
)
def test_names_that_cannot_be_are_refused(outputs: list[str], message: str) -> None:
    """An output named like an input, twice the same name, too few or too many."""
    with pytest.raises(ModelError, match=message):
        exported(Calls(lambda x, w: (x * w, x + w)), outputs=outputs)


def test_an_input_that_is_not_used_stays_or_is_refused() -> None:
    """The newer exporter keeps it; no exporter moves the names of the others."""
    model = exported(Calls(lambda x, _: x + 1), settings=DYNAMO)
    assert input_specs(model) == X


def test_an_axis_that_the_code_fixes_is_named() -> None:
    """Torch makes the axis static; the error says which, and for which length."""
    network = Calls(lambda x, _: x + torch.arange(2.0).reshape(2, 1))
    with pytest.raises(ModelError, match=r"axis 0 \('batch'\) of the input 'x'.*length 2") as error:
        exported(network, settings=DYNAMO)
    assert error.value.__cause__ is not None
    assert "model.inputs.x.shape" in str(error.value.fix)


def test_two_names_for_axes_that_must_be_equal_are_refused() -> None:
    """They get different lengths, and the network itself refuses these."""

    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    specs = (TensorSpec("x", "float32", ("n", 4)), TensorSpec("y", "float32", ("m", 4)))
    with pytest.raises(ModelError, match="size of tensor a") as error:
        exported(Sum(), specs, DYNAMO)
    assert error.value.got == "float32[2, 4], float32[3, 4]"


def test_a_batch_that_the_classic_exporter_bakes_in_is_found() -> None:
    """It traces a length as a number; the second batch size shows it."""
    with pytest.raises(ParityError, match=r"'output' at batch=1"):
        exported(Calls(lambda x, w: x * w * int(x.shape[0])))
    with pytest.raises(ParityError, match=r"does not run at batch=1"):
        exported(Calls(lambda x, w: (x * w).reshape(int(x.shape[0]), 2, 2)))


def test_wrong_numbers_are_found() -> None:
    """A model whose weight is off by one in a thousand is refused, with output, error and limit."""
    network = Calls(lambda x, w: x * w).eval()
    model, _ = export_network(network, X, ["y"], CLASSIC)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.001), weight.name))
    with pytest.raises(ParityError, match="'y'") as error:
        compare(network, model, X, CLASSIC, seed=0)
    assert re.search(r"= 0\.0\d+ of", str(error.value.got))
    compare(network, model, X, Export(max_abs_error=0.01), seed=0)


@pytest.mark.slow
def test_a_network_that_cannot_be_exported_says_what_to_try() -> None:
    """The cause is kept, and the other exporter is suggested."""
    with pytest.raises(ModelError, match="dynamo exporter cannot take the network") as error:
        exported(Calls(lambda x, _: torch.linalg.eig(x[:, :, None] * x[:, None]).eigenvalues.real), settings=DYNAMO)
    assert error.value.fix.startswith("exporter: torchscript; or write the operator with others")
    assert error.value.__cause__ is not None


@pytest.mark.parametrize("opset", [13, 17, 20])
def test_the_classic_exporter_writes_the_asked_opset(opset: int) -> None:
    """Old ones as well."""
    assert opset_of(exported(Calls(lambda x, w: x * w), settings=Export(exporter="torchscript", opset=opset))) == opset


def test_an_opset_that_the_exporter_silently_leaves_out_is_refused() -> None:
    """The newer exporter starts at 18 and reports success when it cannot convert down."""
    network = Calls(lambda x, w: torch.relu(x * w).mean(1))
    with pytest.raises(ModelError, match="cannot write opset 13") as error:
        exported(network, settings=Export(opset=13))
    assert error.value.got == "opset 18"


def test_a_fixed_batch_is_compared_at_that_batch() -> None:
    """Where nothing is dynamic there is one batch size to try."""
    specs = (TensorSpec("x", "float32", (5, 4)),)
    network = Calls(lambda x, w: x * w).eval()
    model, _ = export_network(network, specs, None, CLASSIC)
    trials = compare(network, model, specs, CLASSIC, seed=0)
    assert [trial.batch for trial in trials] == [5]
    assert output_specs(model)[0].shape == (5, 4)


def test_inputs_that_the_network_cannot_take_are_told_before_exporting() -> None:
    """The message is the network's, and names the inputs as the config gave them."""
    with pytest.raises(ModelError, match="fails on its inputs") as error:
        exported(nn.Linear(5, 2))
    assert error.value.want == "'x' float32[batch,4]"


@pytest.mark.slow
def test_a_network_that_needs_short_sequences_is_traced_with_them() -> None:
    """Axis lengths are tried until the network runs: here positions end at 16."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(16.0))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table[torch.arange(x.shape[1])]

    specs = (TensorSpec("x", "float32", ("batch", "length")),)
    assert output_specs(exported(Positions(), specs, DYNAMO))[0].shape == ("batch", "length")


@pytest.mark.slow
def test_a_forward_with_star_arguments_is_exported() -> None:
    """Torch gathers its inputs in one tuple; the axes follow."""

    class Star(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return inputs[0] + inputs[1]

    specs = (*X, TensorSpec("y", "float32", ("batch", 4)))
    assert input_specs(exported(Star(), specs, DYNAMO)) == specs


def test_frozen_attention_is_exported_by_the_classic_exporter() -> None:
    """Without gradients torch takes a fused kernel that has no ONNX counterpart; it must not be traced."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(x, src_key_padding_mask=mask == 2)

    specs = (TensorSpec("x", "float32", ("batch", 3, 4)), TensorSpec("mask", "int64", ("batch", 3)))
    model = exported(Masked().requires_grad_(requires_grad=False), specs)
    assert "Softmax" in {node.op_type for node in model.graph.node}


def test_exporting_is_silent_and_leaves_logging_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither exporter prints, logs or warns, and the process logs afterwards as before."""
    before = logging.root.manager.disable
    for settings in (DYNAMO, CLASSIC):
        exported(Calls(lambda x, w: x * w), settings=settings)
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == before
