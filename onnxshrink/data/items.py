"""What the user's code gives for one batch or one sample, by name: a mapping, or the inputs in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from onnxshrink.core.errors import DataError, ShrinkError
from onnxshrink.core.tensors import LABELS, Array, TensorSpec, did_you_mean


@contextmanager
def users_code(where: str) -> Iterator[None]:
    """Whatever the user's code raises inside is the data's fault, and says so."""
    try:
        yield
    except ShrinkError:
        raise
    except (Exception, SystemExit) as e:  # it is the user's code, and may raise anything
        raise DataError(f"the reader failed: {type(e).__name__}: {e}", where=where, fix="mend the callable") from e


def named_arrays(
    item: Any, specs: Sequence[TensorSpec], rename: Mapping[str, str], *, where: str, what: str
) -> dict[str, Array]:
    """The arrays of an item, renamed, not yet checked against the model.

    Args:
        item: Name to array; or a tuple or list of the model's inputs in order, labels last where there are any; or an
            array for the only input. Arrays are all that numpy can make one of, such as torch's tensors on the CPU.
        specs: The model's inputs.
        rename: Name in a mapping to input name.
        where: The entry point.
        what: What to call the item in messages: ``batch 3``.

    Raises:
        DataError: It is something else, has another number of parts, or has no name that ``rename`` maps.
    """
    if isinstance(item, Mapping):
        for old in rename:
            if old not in item:
                raise DataError(
                    f"`rename` names {old!r}, which is no array of {what}",
                    where=where,
                    got=", ".join(map(repr, item)),
                    fix=did_you_mean(old, [str(name) for name in item]),
                )
        with users_code(where):
            return {str(rename.get(name, name)): np.asarray(value) for name, value in item.items()}
    inputs = [spec.name for spec in specs]
    parts = list(item) if isinstance(item, (tuple, list)) else [item] if hasattr(item, "shape") else None
    if parts is None or len(parts) - len(inputs) not in (0, 1):
        raise DataError(
            f"{what} is neither a mapping from input name to array, nor the inputs in order",
            where=where,
            got=type(item).__name__ + (f" of {len(parts)}" if parts is not None else ""),
            want=f"{{input: array, ...}}, or ({', '.join(inputs)}) with or without labels behind",
        )
    if rename:
        raise DataError(f"`rename` maps names, and {what} has none", where=where, fix="leave `rename` out")
    with users_code(where):
        return {name: np.asarray(value) for name, value in zip([*inputs, LABELS], parts, strict=False)}
