"""What is installed here, what of it really loads, and which combinations are known to go wrong."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

REQUIRED = ("numpy", "onnx", "onnxruntime")
"""Modules that nothing works without."""

_OPTIONAL = ("torch",)
_TRIED_SECONDS = 120

EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "torch": (
        ("torch", "torch-pruning", "safetensors", "accelerate"),
        "distil, prune, fine-tune and export torch networks",
    ),
    "images": (("pillow",), "read folders of images"),
    "hf": (("datasets",), "read data sets of Hugging Face"),
    "search": (("optuna",), "search for a budget, and fit"),
    "cuda": (("nvidia-ml-py",), "say how much memory of a GPU a session holds"),
    "dask": (("distributed",), "run the trials of a search on other machines"),
}
"""Extra to its packages and what they allow."""


@dataclass(frozen=True, slots=True)
class Library:
    """A module that was tried in a process of its own.

    Attributes:
        name: Of the module.
        version: Of its package, or None where none is installed.
        error: Last line of what importing it said, or None where it loads or is not installed.
    """

    name: str
    version: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """An execution provider: whether a small session opens on it, and if not why.

    Attributes:
        provider: Its short name.
        loads: A session opened, and its node ran there.
        why: What stood in the way and what to do about it; empty where it loads.
        built_in: ONNX Runtime says that it has it.
    """

    provider: str
    loads: bool
    why: str
    built_in: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about an installation that a person should know.

    Attributes:
        level: ``bad`` is known to go wrong; ``note`` may.
        what: What is so.
        fix: What to do about it.
        source: Who says so.
    """

    level: Literal["bad", "note"]
    what: str
    fix: str
    source: str


def try_libraries(run: Callable[[str], str | None] | None = None) -> tuple[Library, ...]:
    """Import each module that matters in a process of its own: what crashes there does not crash here.

    Args:
        run: Imports a module, and returns what was wrong or None; a child process by default.
    """
    tried = run or _import_error
    found = []
    for name in (*REQUIRED, *_OPTIONAL):
        is_here = importlib.util.find_spec(name) is not None
        error = tried(name) if is_here else "it is not installed" if name in REQUIRED else None
        found.append(Library(name, _version(name), error))
    return tuple(found)


def wheels_of(module: str = "onnxruntime") -> tuple[str, ...]:
    """The installed packages that hold ``module``, each with its version; more than one overwrote each other's files.

    Source: ONNX Runtime, "Get started with Python": only one of its packages at a time in any environment;
    microsoft/onnxruntime#26996.
    """
    names = metadata.packages_distributions().get(module, [])
    return tuple(f"{name} {metadata.version(name)}" for name in sorted(set(names)))


def try_providers() -> tuple[Loaded, ...]:
    """Open a session of one product on every provider that is known, those that are built in first.

    Raises:
        ImportError: onnx or onnxruntime does not load; `try_libraries` says so without raising.
    """
    import onnxruntime as ort

    from onnxshrink.config.gates import Target
    from onnxshrink.config.providers import SHORT_NAMES, full_name, short_name
    from onnxshrink.core.errors import ShrinkError
    from onnxshrink.runtime.session import Session

    model = _product()
    available = ort.get_available_providers()
    names = dict.fromkeys([*map(short_name, available), *SHORT_NAMES])
    found = []
    for name in sorted(names, key=lambda name: (full_name(name) not in available, name != "cpu")):
        why = ""
        try:
            Session(model, Target(provider=name), name="a small model")
        except ShrinkError as e:
            why = e.fix if full_name(name) not in available and e.fix else e.what
        found.append(Loaded(name, not why, why, full_name(name) in available))
    return tuple(found)


def missing_extras() -> dict[str, str]:
    """Extra to what it would allow, for those of which a package is missing."""
    return {extra: allows for extra, (names, allows) in EXTRAS.items() if not all(map(_version, names))}


def find_conflicts(libraries: Sequence[Library], wheels: Sequence[str]) -> Iterator[Finding]:
    """The combinations that are known to go wrong, as far as this installation shows them."""
    if len(wheels) > 1:
        yield Finding(
            "bad",
            f"{' and '.join(wheels)} are installed together: they hold the same files, and the last one wins",
            f"pip uninstall {' '.join(wheel.split()[0] for wheel in wheels)}, then install the one you need",
            "onnxruntime.ai/docs/get-started/with-python.html; microsoft/onnxruntime#26996",
        )
    for library in libraries:
        if library.error is not None:
            yield Finding(
                "bad",
                f"{library.name} does not load: {library.error}",
                f"pip install --force-reinstall {library.name}",
                f"python -c 'import {library.name}'",
            )
    yield from _unmet()
    if all(library.error is None for library in libraries):
        yield from _too_new()
    if os.environ.get("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION") == "python":
        yield Finding(
            "note",
            "protobuf runs in pure Python: reading and writing models is many times slower",
            "unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION",
            "protobuf.dev/reference/python/python-generated",
        )
    if version := _version("onnxruntime-tools"):
        yield Finding(
            "note",
            f"onnxruntime-tools {version} is from 2021: its optimizer raises AssertionError on today's exports",
            "pip uninstall onnxruntime-tools; its parts live on in onnxruntime.transformers",
            "pypi.org/project/onnxruntime-tools",
        )


def _unmet() -> Iterator[Finding]:
    """Requirements of this package, and of the packages it needs, that what is installed does not meet."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # it comes with onnxruntime, whose absence is told already
        return
    extras = [extra for extra in ("", *EXTRAS) if extra not in missing_extras()]
    seen: set[str] = set()
    queue = ["onnxshrink"]
    while queue:
        owner = queue.pop(0)
        for text in _requires(owner):
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            wanted = extras if owner == "onnxshrink" else [""]
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
                continue
            name = _folded(requirement.name)
            version = _version(name)
            is_ort = name == "onnxruntime" and version is None and bool(wheels_of())
            if not is_ort and (version is None or not requirement.specifier.contains(version, prereleases=True)):
                yield Finding(
                    "bad",
                    f"{owner} needs {requirement.name}{requirement.specifier}, and "
                    + (f"{version} is installed" if version else "it is not installed"),
                    f"pip install '{requirement.name}{requirement.specifier}'",
                    f"the metadata of {owner} {_version(owner)}",
                )
            if version is not None and name not in seen:
                seen.add(name)
                queue.append(name)


def _too_new() -> Iterator[Finding]:
    """A model as onnx writes it by default, that this ONNX Runtime refuses."""
    import onnx
    import onnxruntime as ort

    from onnxshrink.core.errors import ModelError
    from onnxshrink.runtime.session import Session

    model = onnx.load_from_string(_product())
    model.ir_version = onnx.IR_VERSION
    try:
        Session(model.SerializeToString())
    except ModelError as e:
        yield Finding(
            "note",
            f"models of onnx {onnx.__version__} load in onnxruntime {ort.__version__} only with an older IR version: "
            + e.what[max(0, e.what.find("Unsupported")) :],
            "pip install --upgrade onnxruntime, or an older onnx, or set model.ir_version before saving",
            "onnxruntime.ai/docs/reference/compatibility.html; microsoft/onnxruntime#20559",
        )


def _product() -> bytes:
    """A model of one MatMul, float32 ``(1, 4)`` times ``(4, 4)``, that every ONNX Runtime of today reads."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [0.5] * 16)],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _import_error(module: str) -> str | None:
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TRIED_SECONDS)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"importing it takes more than {_TRIED_SECONDS} seconds"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines and done.returncode > 0 else f"the process died with status {done.returncode}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        owners = metadata.packages_distributions().get(name.replace("-", "_"), []) if name in REQUIRED else []
        return metadata.version(owners[0]) if owners else None


def _requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def _folded(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
