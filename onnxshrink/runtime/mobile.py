"""Whether the accelerators of phones would take a model, by ONNX Runtime's own estimate.

Source: onnxruntime.tools.mobile_helpers.usability_checker, which counts nodes of supported operators and the partitions
that they form; its thresholds call one partition with more than 75% of the nodes good. Its lists hold operators, not
their conditions, so a ``yes`` still has to be tried on a phone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx
from onnxruntime.tools.mobile_helpers import usability_checker

from onnxshrink.runtime.quiet import quiet
from onnxshrink.runtime.session import Session

Suits: TypeAlias = Literal["yes", "maybe", "no"]

_Check: TypeAlias = Callable[[onnx.ModelProto, bool], Any]

_CHECKS: dict[str, _Check] = {
    "nnapi": usability_checker.check_nnapi_partitions,
    "coreml_neural_network": partial(
        usability_checker.check_coreml_partitions, config_filename="coreml_supported_neuralnetwork_ops.md"
    ),
    "coreml_ml_program": partial(
        usability_checker.check_coreml_partitions, config_filename="coreml_supported_mlprogram_ops.md"
    ),
}


# Shapes follow from small constants alone, and a model above protobuf's 2 GiB has nowhere else to put its weights.
_WEIGHTS_ASIDE = {"session.optimized_model_external_initializers_file_name": "weights"}


@dataclass(frozen=True, slots=True)
class MobileUsability:
    """What one accelerator would make of a model.

    Attributes:
        provider: ``nnapi``, ``coreml_neural_network`` or ``coreml_ml_program``.
        suits: Whether it is worth a try with the model as it is.
        suits_if_fixed: The same with every length of the inputs fixed; equal to ``suits`` where all are.
        nodes: Nodes of the model after ONNX Runtime's basic optimization, subgraphs included.
        supported_nodes: Of these, what the accelerator takes with the model as it is.
        partitions: Pieces that they form; at each border tensors are copied.
        unsupported_op_types: Operators that it has not, with their domain, sorted.
    """

    provider: str
    suits: Suits
    suits_if_fixed: Suits
    nodes: int
    supported_nodes: int
    partitions: int
    unsupported_op_types: tuple[str, ...]


def mobile_usability(model: Path) -> tuple[MobileUsability, ...]:
    """Estimate, for NNAPI and both forms of CoreML, how much of a model they would run.

    Args:
        model: The ``.onnx`` file.

    Returns:
        One entry for each accelerator; nothing in them depends on this machine.

    Raises:
        ModelError: The file cannot be read, or ONNX Runtime cannot load it.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "basic.onnx"
        Session(model, optimization="basic", save_optimized=path, config=_WEIGHTS_ASIDE)
        graph = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False))
        return tuple(_usability(name, check, graph) for name, check in _CHECKS.items())


def _usability(name: str, check: _Check, model: onnx.ModelProto) -> MobileUsability:
    fixed = check(model, False)  # noqa: FBT003  theirs
    # The checker wants to be sure that shapes were inferred; where none could be, no node's shape is known.
    as_it_is = check(model, True) if model.graph.value_info or len(model.graph.node) < 2 else None  # noqa: FBT003
    return MobileUsability(
        provider=name,
        suits=_suits(as_it_is),
        suits_if_fixed=_suits(fixed),
        nodes=fixed.num_nodes,
        supported_nodes=as_it_is.num_supported_nodes if as_it_is else 0,
        partitions=as_it_is.num_partitions if as_it_is else 0,
        unsupported_op_types=tuple(sorted(fixed.unsupported_ops)),
    )


def _suits(found: Any) -> Suits:
    if found is None or found.num_nodes == 0:
        return "no"
    answers: dict[str, Suits] = {"YES": "yes", "MAYBE": "maybe", "NO": "no"}
    return answers[found.suitability().name]
