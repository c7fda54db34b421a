"""Where a run begins: the model that the config names, as an artifact."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path
from typing import assert_never

from onnxshrink.config.source import FactorySource, ModelSource, OnnxSource
from onnxshrink.core.artifact import ONNX_FILE, Facts
from onnxshrink.core.errors import ModelError


def open_source(settings: ModelSource, out: Path, *, seed: int) -> Facts:
    """Bring the config's model into an artifact's folder, and see that it can be used.

    Args:
        settings: A torch factory with weights, or an ONNX file.
        out: The folder to fill.
        seed: Torch's seed while the factory runs.

    Raises:
        ModelError: The model cannot be built or read, or does not run on the inputs it is said to have.
    """
    match settings:
        case FactorySource():
            return _open_factory(settings, out, seed=seed)
        case OnnxSource():
            return _open_onnx(settings.onnx, out)
        case _:
            assert_never(settings)


def _open_factory(settings: FactorySource, out: Path, *, seed: int) -> Facts:
    import torch

    from onnxshrink.runtime import torch_model as tm
    from onnxshrink.runtime.torch_weights import load_weights

    architecture = tm.Architecture.of(settings)
    network = tm.build_network(architecture, seed=seed)
    prefix = load_weights(network, settings.weights) if settings.weights else None
    with torch.no_grad():
        outputs = tm.run_network(network, tm.example_inputs(architecture.inputs, 2))
    if settings.outputs is not None and len(settings.outputs) != len(outputs):
        raise ModelError(
            f"the network has {len(outputs)} outputs and `outputs` names {len(settings.outputs)}",
            where=settings.factory,
            got=", ".join(settings.outputs),
            want=f"{len(outputs)} names",
        )
    tm.save_network(network, architecture, out)
    facts: Facts = {
        "parameters": tm.count_parameters(network),
        "macs": tm.count_macs(network, architecture.inputs),
        "inputs": list(map(str, architecture.inputs)),
        "outputs": len(outputs),
        "classes": [output.shape[1] for output in outputs if output.ndim == 2 and output.is_floating_point()],
    }
    if prefix:
        facts["stripped_prefix"] = prefix
    return facts


def _open_onnx(path: Path, out: Path) -> Facts:
    from onnxshrink.runtime.graph import (
        external_files,
        input_specs,
        load_model,
        opset_of,
        output_specs,
        require_valid,
        save_model,
    )

    model = load_model(path)
    require_valid(path)
    facts: Facts = {
        "parameters": sum(prod(tensor.dims) for tensor in model.graph.initializer),
        "inputs": list(map(str, input_specs(model))),
        "outputs": list(map(str, output_specs(model))),
        "classes": [
            spec.shape[1]
            for spec in output_specs(model)
            if len(spec.shape) == 2 and isinstance(spec.shape[1], int) and spec.dtype.startswith("float")
        ],
        "opset": opset_of(model),
    }
    if external_files(path):
        save_model(model, out)
    else:
        shutil.copy(path, out / ONNX_FILE)
    return facts
