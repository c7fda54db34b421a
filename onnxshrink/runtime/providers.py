"""Which execution providers are here: built into ONNX Runtime, or brought by a plugin library."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime as ort

from onnxshrink.config.gates import Target
from onnxshrink.config.providers import SHORT_NAMES, full_name
from onnxshrink.core.errors import ConfigError, ProviderError

CPU = SHORT_NAMES["cpu"]

Placement: TypeAlias = Mapping[str, Sequence[tuple[str, str]]]
"""Provider, by ONNX Runtime's name, to the nodes that it runs: name and operator type of each, in the graph's order."""

# Wheels that hold the module onnxruntime, so that only one of them can be installed.
_WHEELS = {
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "openvino": "onnxruntime-openvino",
    "directml": "onnxruntime-directml",
    "migraphx": "onnxruntime-migraphx",
    "cann": "onnxruntime-cann",
}
# Wheels with a plugin library that goes beside any onnxruntime.
_PLUGINS = {
    "openvino": "onnxruntime-ep-openvino",
    "qnn": "onnxruntime-qnn",
    "tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx",
    "webgpu": "onnxruntime-ep-webgpu",
}
_ELSEWHERE = {
    "cpu": "reinstall onnxruntime",
    "azure": "pip install onnxruntime, on Linux or Windows",
    "coreml": "pip install onnxruntime, on macOS",
    "rocm": "ONNX Runtime has no ROCm provider since 1.23: use migraphx",
}
# Providers whose tensors can stay in the memory of a device, and ONNX Runtime's name of that memory.
_DEVICES = {"cuda": "cuda", "tensorrt": "cuda", "directml": "dml"}
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider that is here.

    Attributes:
        name: ONNX Runtime's name.
        devices: The device of a plugin that shall be used; empty for a provider that is built in.
    """

    name: str
    devices: tuple[Any, ...] = ()


def require_provider(target: Target) -> str:
    """ONNX Runtime's name of the target's provider.

    Raises:
        ConfigError: As of `find_provider`.
        ProviderError: As of `find_provider`.
    """
    return find_provider(target).name


def find_provider(target: Target) -> Provider:
    """The target's provider; one that comes as a plugin is loaded.

    Raises:
        ConfigError: An option is of no use: the CPU takes none, and only plugins can be told a ``device``.
        ProviderError: The provider is not here, or its plugin cannot be loaded or finds no hardware.
    """
    name = full_name(target.provider)
    if target.provider == "cpu" and target.options:
        raise ConfigError(
            "the CPU provider takes no options: ONNX Runtime ignores them without a word",
            where=f"targets: {target.name}",
            got=", ".join(target.options),
            want="`threads` and `optimization`",
        )
    if target.library is not None:
        _load(name, target.library)
    elif name in ort.get_available_providers():
        if target.device is not None:
            raise ConfigError(
                f"{name} is built in, and told its device by its own options",
                where=f"targets: {target.name}",
                got=f"device: {target.device}",
                fix="say it in `options`, such as device_type: GPU for openvino or device_id: 1 for cuda",
            )
        return Provider(name)
    offered = ort.get_ep_devices()
    mine = [device for device in offered if device.ep_name == name]
    fitting = [device for device in mine if target.device in (None, kind_of(device))]
    if fitting:
        return Provider(name, (fitting[0],))
    if mine:
        kinds = ", ".join(map(kind_of, mine))
        raise ProviderError(f"{name} has no {target.device} here", got=kinds, want=f"device: {target.device}")
    if target.library is not None:
        others = ", ".join(f"{device.ep_name} ({kind_of(device)})" for device in offered)
        raise ProviderError(
            f"the library of {target.provider!r} finds no hardware here that it can use",
            where=str(target.library),
            got=f"devices of {others}",
            want=f"a device of {name}",
            fix="check the device and its driver, and that the library is of this provider",
        )
    raise ProviderError(
        f"the execution provider {target.provider!r} is not available here",
        where=f"targets, onnxruntime {ort.__version__}",
        got=target.provider,
        want=", ".join(dict.fromkeys([*ort.get_available_providers(), *(device.ep_name for device in offered)])),
        fix=_remedy(target.provider),
    )


def kind_of(device: Any) -> str:
    """``cpu``, ``gpu`` or ``npu``: what an `onnxruntime.OrtEpDevice` runs on."""
    return str(device.device.type.name).lower()


def provider_options(target: Target) -> dict[str, str]:
    """The target's options as ONNX Runtime takes them: texts.

    Numbers and texts as they are written, booleans as ``True`` and ``False``, mappings and lists as JSON.

    Raises:
        ConfigError: An option has no value.
    """
    empty = [key for key, value in target.options.items() if value is None]
    if empty:
        raise ConfigError(
            f"the provider option {empty[0]!r} has no value",
            where=f"targets: {target.name}",
            fix="drop it, or fill it in",
        )
    return {
        key: json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)
        for key, value in target.options.items()
    }


def memory_of(target: Target) -> tuple[str, int]:
    """Where inputs and outputs can lie so that nothing is copied.

    Returns:
        ONNX Runtime's kind of memory and the device's number; ``("cpu", 0)`` where tensors come from the host.
    """
    if target.library is not None or target.provider not in _DEVICES:
        return "cpu", 0
    return _DEVICES[target.provider], int(target.options.get("device_id", 0))


def placement_of(session: ort.InferenceSession) -> Placement:
    """Which provider runs which nodes; the session was opened with ``session.record_ep_graph_assignment_info``.

    Nodes are those that ONNX Runtime divided among the providers: constants are folded by then, and what a provider
    fuses or compiles still counts as the nodes that it took.
    """
    placed: dict[str, list[tuple[str, str]]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        nodes = ((node.name, node.op_type) for node in subgraph.get_nodes())
        placed.setdefault(subgraph.ep_name, []).extend(nodes)
    return placed


def refuse_misplaced(target: Target, wanted: str, placement: Placement, *, where: str) -> None:
    """Raise where a provider took no node, or not every node of a target that requires all.

    Raises:
        ProviderError: It names nodes that run elsewhere.
    """
    elsewhere = [
        f"{name or 'a node'} ({op_type})"
        for other, nodes in placement.items()
        if other != wanted
        for name, op_type in nodes
    ]
    n_nodes = sum(map(len, placement.values()))
    if not elsewhere or (wanted in placement and not target.require_all):
        return
    took = (
        f"runs {n_nodes - len(elsewhere)} of {n_nodes} nodes" if wanted in placement else "takes no node of the model"
    )
    more = f" and {len(elsewhere) - _SHOWN} more" if len(elsewhere) > _SHOWN else ""
    raise ProviderError(
        f"{wanted} {took}; the others run on {', '.join(other for other in placement if other != wanted)}",
        where=where,
        got=", ".join(elsewhere[:_SHOWN]) + more,
        want="every node" if target.require_all else "at least one node",
        fix="drop this target" + (", or `require_all`: the nodes are then listed" if wanted in placement else ""),
    )


def refuse_fallback(wanted: str, got: Sequence[str], *, where: str) -> None:
    """Raise where a session runs on other providers than the one that was asked for.

    Raises:
        ProviderError: ``wanted`` is not the first of ``got``.
    """
    if not got or got[0] != wanted:
        raise ProviderError(
            f"ONNX Runtime dropped {wanted} without an error",
            where=where,
            got=", ".join(got) or "no provider",
            want=wanted,
            fix="check that the provider's libraries load (for CUDA: matching CUDA and cuDNN), or change `targets`",
        )


@cache
def _load(name: str, library: Path) -> None:
    """Load a plugin once; some plugins take the name that they are registered under as the provider's own."""
    try:
        ort.register_execution_provider_library(name, str(library))
    except Exception as e:  # ORT's Fail, and whatever the library's own code throws
        raise ProviderError(
            f"the library of {name} cannot be loaded: {str(e).strip()}",
            where=str(library),
            got=f"onnxruntime {ort.__version__}",
            want="a plugin library for this onnxruntime",
        ) from e


def _remedy(provider: str) -> str:
    if provider in _ELSEWHERE:
        return _ELSEWHERE[provider]
    ways = []
    if provider in _WHEELS:
        ways.append(f"pip install {_WHEELS[provider]}, in place of onnxruntime")
    if provider in _PLUGINS:
        ways.append(f"pip install {_PLUGINS[provider]}, and give the `library` in it")
    if ways:
        return "; or ".join(ways)
    if provider in SHORT_NAMES:
        return "no package on PyPI has it: build ONNX Runtime with it"
    near = difflib.get_close_matches(provider, SHORT_NAMES, n=1)
    return f"did you mean {near[0]!r}?" if near else "one of the above, or give the plugin's `library`"
