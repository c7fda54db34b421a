"""What the quantize stages share: which nodes to leave alone, and ONNX Runtime's tools kept quiet and tidy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx

from onnxshrink.core.errors import ConfigError
from onnxshrink.core.tensors import did_you_mean
from onnxshrink.stages.origins import origins
from onnxshrink.verify.macs import multiplies


def excluded_nodes(
    names: Sequence[str], model: onnx.ModelProto, *, stage: str, field: str = "exclude_nodes"
) -> dict[str, str]:
    """The nodes that the config leaves alone, each with that as its reason.

    Args:
        names: The stage's ``exclude_nodes``: names in ``model``, or in the model that it was optimized from.
        model: A prepared model: every node has a name.
        stage: The stage's kind, for the message.
        field: The setting's name, for the message.

    Raises:
        ConfigError: No node has one of the names.
    """
    known = {node.name: [node.name] for node in model.graph.node}
    fused = {name: nodes for name, nodes in origins(model).items() if name not in known}
    excluded: dict[str, str] = {}
    for name in names:
        if name not in known and name not in fused:
            raise ConfigError(
                f"there is no node {name!r}",
                where=f"{stage}.{field}",
                got=name,
                want="the name of a node, such as " + ", ".join(map(repr, list(known)[:5])),
                fix=did_you_mean(name, [*known, *fused])
                or "take the name from the optimized model; unnamed nodes are <type>_<place>",
            )
        reason = "excluded in the config" + (f" as {name!r}" if name in fused else "")
        excluded |= dict.fromkeys((known | fused)[name], reason)
    return excluded


def outermost_nodes(model: onnx.ModelProto, first: int, last: int) -> dict[str, str]:
    """The first and the last nodes that multiply, each with the setting that leaves it alone as its reason.

    Args:
        model: A prepared model, its nodes in topological order.
        first: How many from the input on; at most all.
        last: How many before the output; at most all.
    """
    names = [node.name for node in model.graph.node if multiplies(node)]
    ending = dict.fromkeys(names[max(len(names) - last, 0) :], f"float_last: {last}")
    return ending | dict.fromkeys(names[:first], f"float_first: {first}")


def chosen_op_types(
    asked: Sequence[str] | None, known: Sequence[str], defaults: Sequence[str], *, stage: str, what: str
) -> tuple[str, ...]:
    """The operator types to work on, sorted.

    Args:
        asked: The stage's ``op_types``; None takes the defaults.
        known: Those that the stage can work on.
        defaults: Those that it works on unasked.
        stage: The stage's kind, for the message.
        what: What cannot be done with another type, for the message.

    Raises:
        ConfigError: A type that is not known.
    """
    for op_type in asked or ():
        if op_type not in known:
            raise ConfigError(
                f"{what} the operator type {op_type!r}",
                where=f"{stage}.op_types",
                got=op_type,
                want=", ".join(known),
                fix=did_you_mean(op_type, known),
            )
    return tuple(sorted(set(defaults if asked is None else asked)))


@contextmanager
def captured_warnings() -> Iterator[list[str]]:
    """Keep what ONNX Runtime logs on the root logger for the facts, and off the user's terminal."""
    root = logging.getLogger()
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            # ONNX Runtime takes an optional input that a node leaves out for a tensor without a name.
            if record.levelno >= logging.WARNING and text not in said and "the type of tensor: . " not in text:
                said.append(text)

    handlers, root.handlers = root.handlers, [Keep()]
    try:
        yield said
    finally:
        root.handlers = handlers


def strip(model: onnx.ModelProto) -> None:
    """Drop inferred types, whose tensors are mostly gone, and marks for ONNX Runtime's own tools."""
    del model.graph.value_info[:]
    kept = [entry for entry in model.metadata_props if not entry.key.startswith("onnx.")]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
