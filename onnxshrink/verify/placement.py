"""Which nodes of a model run where: a provider leaves to the CPU what it has no kernels for, without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxshrink.config.gates import Target
from onnxshrink.config.providers import full_name
from onnxshrink.core.report import Candidate
from onnxshrink.runtime.providers import Placement
from onnxshrink.runtime.session import Session

_MAX_NAMES = 50
_MAX_SAID = 4


def placements(model: Path, targets: Iterable[Target]) -> dict[str, Any]:
    """Where the nodes of a model run, for each target that is not plainly the CPU.

    Args:
        model: The ``.onnx`` file.
        targets: Where it is opened.

    Returns:
        By the target's name: ``provider``, ONNX Runtime's name of the one asked for; ``nodes``, for each provider the
        count of each operator type; ``n_elsewhere``, how many nodes are not on the provider asked for; ``elsewhere``,
        up to 50 of them, each with ``name``, ``op_type`` and ``provider``.

    Raises:
        ModelError: The model cannot be loaded.
        ProviderError: The provider is not there, or takes no node, or not every one for a target that requires it.
    """
    return {
        target.name: evidence(Session(model, target).placement, full_name(target.provider))
        for target in targets
        if target.provider != "cpu"
    }


def evidence(placement: Placement, wanted: str) -> dict[str, Any]:
    """One target's part of `placements`."""
    elsewhere = [
        {"name": name, "op_type": op_type, "provider": provider}
        for provider, nodes in placement.items()
        if provider != wanted
        for name, op_type in nodes
    ]
    return {
        "provider": wanted,
        "nodes": {provider: _counts(op_type for _, op_type in nodes) for provider, nodes in placement.items()},
        "n_elsewhere": len(elsewhere),
        "elsewhere": elsewhere[:_MAX_NAMES],
    }


def misplaced(candidates: Sequence[Candidate]) -> Iterator[str]:
    """A line for each row and target of which some nodes run on another provider than the one asked for."""
    for candidate in candidates:
        for target, found in candidate.details.get("placement", {}).items():
            if not found["n_elsewhere"]:
                continue
            total = sum(sum(counts.values()) for counts in found["nodes"].values())
            others = {name: counts for name, counts in found["nodes"].items() if name != found["provider"]}
            said = ", ".join(_said(counts) + f" on {name}" for name, counts in others.items())
            yield f"{candidate.name}: on {target}, {found['n_elsewhere']} of {total} nodes run elsewhere: {said}"


def _counts(op_types: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(op_types).items(), key=lambda item: (-item[1], item[0])))


def _said(counts: Mapping[str, int]) -> str:
    said = [f"{count} {op_type}" for op_type, count in list(counts.items())[:_MAX_SAID]]
    return ", ".join(said) + (" and others" if len(counts) > _MAX_SAID else "")
