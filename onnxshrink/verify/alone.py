"""What one wrong tensor does to a model's outputs: the reference with a switch at each tensor of a window.

A switch is a Where between what the reference computes and what it is given, so that one session serves all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxshrink.core.tensors import Array, Batch
from onnxshrink.runtime.session import Session
from onnxshrink.verify.pairing import Tensors, showing

_MADE, _GIVEN, _SWITCH = "made:", "given:", "switch:"


class Switches:
    """A model whose tensors can be replaced one at a time.

    Args:
        tensors: The reference; one that is not in float32 has no switches.
        names: Tensors that nodes make; those of other types get no switch.
    """

    def __init__(self, tensors: Tensors, names: Collection[str]) -> None:
        self.names = tuple(
            name for name in dict.fromkeys(names) if name in tensors.maker and tensors.specs[name].dtype == "float32"
        )
        model = showing(tensors.model, tensors.outputs)
        switched = set(self.names)
        for node in model.graph.node:
            node.output[:] = [f"{_MADE}{name}" if name in switched else name for name in node.output]
        nodes = list(model.graph.node)
        del model.graph.node[:]
        for node in nodes:  # a switch stands right behind what it replaces: the order stays topological
            model.graph.node.append(node)
            for made in node.output:
                if made.startswith(_MADE):
                    model.graph.node.append(_switch(made.removeprefix(_MADE)))
        for name in self.names:
            model.graph.input.extend(
                [
                    helper.make_tensor_value_info(f"{_SWITCH}{name}", TensorProto.BOOL, []),
                    helper.make_tensor_value_info(f"{_GIVEN}{name}", TensorProto.FLOAT, None),
                ]
            )
        self._session = Session(model.SerializeToString(), optimization="disabled", name="the reference")
        self._off: dict[str, Array] = {}
        for name in self.names:
            self._off |= {f"{_SWITCH}{name}": np.zeros((), np.bool_), f"{_GIVEN}{name}": np.zeros((), np.float32)}

    def outputs_without(self, inputs: Batch) -> Mapping[str, Array]:
        """The model's outputs where nothing is replaced."""
        return self._session.run({**inputs, **self._off})

    def outputs_with(self, inputs: Batch, name: str, value: Array) -> Mapping[str, Array]:
        """The model's outputs where one tensor has this value.

        Args:
            inputs: The model's inputs, as its session takes them.
            name: One of ``names``.
            value: Of the tensor's own shape.
        """
        given = {f"{_SWITCH}{name}": np.ones((), np.bool_), f"{_GIVEN}{name}": value.astype(np.float32, copy=False)}
        return self._session.run({**inputs, **self._off, **given})


def _switch(name: str) -> onnx.NodeProto:
    inputs = [f"{_SWITCH}{name}", f"{_GIVEN}{name}", f"{_MADE}{name}"]
    return helper.make_node("Where", inputs, [name], name=f"{_SWITCH}{name}")
