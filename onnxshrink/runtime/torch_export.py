"""Torch networks written as ONNX by either of torch's exporters, under the user's names and never under others."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch
from torch import nn

from onnxshrink.config.stages import Export
from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import Array, TensorSpec
from onnxshrink.runtime.graph import opset_of, output_specs
from onnxshrink.runtime.parity import AXIS_LENGTHS, axis_lengths, random_batch
from onnxshrink.runtime.quiet import quiet
from onnxshrink.runtime.torch_model import run_network

_TRACE_BATCH = 2  # torch.export takes an axis of length 0 or 1 for a constant
_STATIC = re.compile(r"inferred a static shape of (\d+) for dimension inputs\['(\w+)'\]\.shape\[(\d+)\]")


def export_network(
    network: nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str] | None,
    settings: Export,
    *,
    seed: int = 0,
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Export a module, and give inputs, outputs and dynamic axes the user's names.

    Args:
        network: In eval mode.
        inputs: What ``forward`` takes, in order; strings in the shapes become the names of the ONNX axes.
        outputs: Names of the outputs; None gives ``output``, or ``output_0``, ``output_1``.
        settings: Opset and exporter.
        seed: Seed of the inputs that are traced.

    Returns:
        The model, checked, and the internal values whose names were taken by an input or output, old name to new.

    Raises:
        ModelError: See `export`.
    """
    lengths = runnable_lengths(network, inputs, batch=_TRACE_BATCH, seed=seed)
    batch = random_batch(inputs, lengths, seed=seed)
    arguments = tuple(torch.from_numpy(batch[spec.name]) for spec in inputs)
    write = _export_dynamo if settings.exporter == "dynamo" else _export_torchscript
    try:
        with quiet(), _no_fused_attention():
            exported = write(network, arguments, inputs, settings)
    except Exception as e:  # both exporters raise a dozen unrelated types
        raise _refusal(e, network, inputs, settings) from e
    renamed = _name_interface(exported, [spec.name for spec in inputs], outputs)
    # Stack traces: they name this machine's files, and outweigh a small network.
    ir_passes.ClearMetadataAndDocStringPass()(exported)
    model = ir.serde.serialize_model(exported)
    _check(model, inputs, settings)
    return model, renamed


def runnable_lengths(network: nn.Module, inputs: Sequence[TensorSpec], *, batch: int, seed: int) -> dict[str, int]:
    """Lengths of the named axes with which the network runs.

    Raises:
        ModelError: It runs with none that was tried.
    """
    refusals: list[ModelError] = []
    for length in AXIS_LENGTHS:
        lengths = axis_lengths(inputs, batch=batch, length=length)
        try:
            run_torch(network, inputs, random_batch(inputs, lengths, seed=seed))
        except ModelError as e:
            refusals.append(e)
        else:
            return lengths
    refusal = refusals[0]
    raise ModelError(
        refusal.what,
        where=refusal.where,
        got=refusal.got,
        want=", ".join(map(str, inputs)),
        fix="check `model.inputs`: order, shape, dtype, and fixed lengths where the network takes one length only",
    ) from refusal


def run_torch(network: nn.Module, inputs: Sequence[TensorSpec], batch: Mapping[str, Array]) -> list[Array]:
    """The network's outputs in order, without gradients.

    Raises:
        ModelError: The network fails on the batch.
    """
    with torch.no_grad():
        outputs = run_network(network, [torch.from_numpy(batch[spec.name]) for spec in inputs])
    return [output.numpy(force=True) for output in outputs]


def _export_dynamo(
    network: nn.Module, arguments: tuple[torch.Tensor, ...], inputs: Sequence[TensorSpec], settings: Export
) -> ir.Model:
    # Names, not torch.export.Dim: given a Dim, the exporter makes an axis static without a word where the code does so.
    shapes = tuple({axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in inputs)
    program = torch.onnx.export(
        network,
        arguments,
        dynamo=True,
        dynamic_shapes=_as_forward_takes(network, shapes) if any(shapes) else None,
        opset_version=settings.opset,
        external_data=False,
        verbose=False,
    )
    return cast("torch.onnx.ONNXProgram", program).model  # None is for the classic exporter


def _as_forward_takes(network: nn.Module, shapes: tuple[dict[int, str], ...]) -> tuple[object, ...]:
    """Shapes in the structure of ``forward``'s parameters: torch gathers what ``*args`` takes in one tuple."""
    parameters = list(inspect.signature(network.forward).parameters.values())
    for index, parameter in enumerate(parameters):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return (*shapes[:index], shapes[index:])
    return shapes


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    """Keep torch from kernels that the classic exporter cannot write; it takes them where nothing needs a gradient."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _export_torchscript(
    network: nn.Module, arguments: tuple[torch.Tensor, ...], inputs: Sequence[TensorSpec], settings: Export
) -> ir.Model:
    # Own names while it traces: the user's may be those of its internal values, and it would not say so.
    names = [f"onnxshrink::input_{index}" for index in range(len(inputs))]
    axes = {
        name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for name, spec in zip(names, inputs, strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            network,
            arguments,
            path,
            dynamo=False,
            input_names=names,
            dynamic_axes={name: dims for name, dims in axes.items() if dims},
            opset_version=settings.opset,
            verbose=False,
        )
        return ir.serde.deserialize_model(onnx.load(path))


def _name_interface(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str] | None) -> dict[str, str]:
    """Name the graph's inputs and outputs; an internal value or initializer of such a name gets another.

    Returns:
        Old to new name of what had to give way.

    Raises:
        ModelError: The numbers of names do not fit, or one name is given twice.
    """
    ir_passes.OutputFixPass()(model)  # an input that is returned, or a value returned twice, gets its own Identity
    count = len(model.graph.outputs)
    if outputs is None:
        outputs = ["output"] if count == 1 else [f"output_{index}" for index in range(count)]
    for kind, names, values in (("input", inputs, model.graph.inputs), ("output", outputs, model.graph.outputs)):
        if len(names) != len(values):
            raise ModelError(
                f"the exported model has {len(values)} {kind}s, and {len(names)} are named",
                got=", ".join(str(value.name) for value in values) or "none",
                want=", ".join(names),
                fix=f"name as many {kind}s as the network has" + ", and only those it uses" * (kind == "input"),
            )
    twice = sorted({name for name in (*inputs, *outputs) if [*inputs, *outputs].count(name) > 1})
    if twice:
        raise ModelError(
            f"the name {twice[0]!r} is given to two inputs or outputs",
            got=f"inputs {', '.join(inputs)}; outputs {', '.join(outputs)}",
            want="names that differ",
            fix="rename one under `model.inputs` or `model.outputs`",
        )
    before = {value: value.name for value in _internal_values(model)}
    for value, name in zip((*model.graph.inputs, *model.graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name
    ir_passes.NameFixPass()(model)  # inputs and outputs keep their names
    return {old: str(value.name) for value, old in before.items() if old and value.name != old}


def _internal_values(model: ir.Model) -> list[ir.Value]:
    outer = {*model.graph.inputs, *model.graph.outputs}
    values = [
        *model.graph.initializers.values(),
        *(value for node in model.graph.all_nodes() for value in node.outputs),
    ]
    return [value for value in values if value not in outer]


def _check(model: onnx.ModelProto, inputs: Sequence[TensorSpec], settings: Export) -> None:
    """Refuse a model that is not what was asked for, though the exporter reported success."""
    if opset_of(model) != settings.opset:
        raise ModelError(
            f"the {settings.exporter} exporter cannot write opset {settings.opset} for this network",
            got=f"opset {opset_of(model)}",
            want=f"opset {settings.opset}",
            fix=f"opset: {opset_of(model)}, or exporter: torchscript",
        )
    for spec, value in zip(inputs, model.graph.input, strict=True):
        for axis, (want, dim) in enumerate(zip(spec.shape, value.type.tensor_type.shape.dim, strict=True)):
            got = dim.dim_value if dim.HasField("dim_value") else dim.dim_param
            if got != want:
                raise _axis_error(spec, axis, f"the exporter made it {got!r}")
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as e:  # the checker and shape inference raise types without a common base
        raise ModelError(
            f"the exported model is not valid ONNX: {_first_line(e)}", fix=fix_for(settings), got=type(e).__name__
        ) from e
    specs = output_specs(model)
    if any(spec.dtype == "unknown" for spec in specs):
        raise ModelError("an output of the exported model has no type", got=", ".join(map(str, specs)))


def _refusal(error: Exception, network: nn.Module, inputs: Sequence[TensorSpec], settings: Export) -> ModelError:
    """The exporter's failure in a user's terms: the axis that the code fixes, or the innermost cause."""
    static = _STATIC.search(str(error))
    if static:
        length, argument, axis = static.groups()
        arguments = list(inspect.signature(network.forward).parameters)
        index = arguments.index(argument) if argument in arguments else len(inputs)
        if index < len(inputs):
            return _axis_error(inputs[index], int(axis), f"the network's code works for length {length} only")
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return ModelError(
        f"the {settings.exporter} exporter cannot take the network: {type(cause).__name__}: {_first_line(cause)}",
        where=type(network).__name__,
        got=type(cause).__name__,
        want="operators that ONNX can express, and code that can be traced",
        fix=f"{fix_for(settings)}; or write the operator with others, such as exp, log and matmul",
    )


def _axis_error(spec: TensorSpec, axis: int, why: str) -> ModelError:
    name = spec.shape[axis]
    return ModelError(
        f"axis {axis} ({name!r}) of the input {spec.name!r} cannot be dynamic as asked: {why}",
        got=str(spec),
        want="code that takes every length of a named axis, and one name for axes that are always equally long",
        fix=f"give axis {axis} its length in `model.inputs.{spec.name}.shape`, or use x.shape in the code",
    )


def fix_for(settings: Export) -> str:
    """What to try next: the other exporter."""
    return "exporter: torchscript" if settings.exporter == "dynamo" else "exporter: dynamo"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
