"""Check a model against its bundle: does it still do what it did when the bundle was made?

    python check.py [BUNDLE] [MODEL.onnx] [--json] [--junit OUT.xml] [--sarif OUT.sarif] [--update]

This one file needs Python 3.9, numpy and onnxruntime, and nothing else: it lies in every bundle, so that the device the
model runs on can be asked. ``onnxshrink check`` and the pytest plugin run the very same code.

Without MODEL the bundle's own model is checked: no byte may have changed, and it has to give the outputs it gave. With
MODEL, that one has to be the same network: the same inputs, outputs, operators and weights, and the same outputs within
the bundle's tolerances; ``--behaviour-only`` lets operators and weights differ. ``--update`` makes MODEL the baseline.

Exit status: 0 passed or inconclusive, 1 an item failed, 2 you can fix it (the message says how), 3 a bug of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree as ET

SCHEMA = 1
"""Raised when the meaning of a field of the manifest changes; adding a field does not raise it."""

MANIFEST, MODEL, INPUTS, OUTPUTS, SCRIPT = (
    "manifest.json",
    "model.onnx",
    "golden_inputs.npz",
    "golden_outputs.npz",
    "check.py",
)

MAX_LATENCY_RATIO = 1.05
MAX_SIZE_RATIO = 1.05
SIZE_SLACK_BYTES = 4096
"""What names and metadata may add to a model of any size."""

MAX_MANIFEST_BYTES = 64_000_000
"""A manifest has some hundred bytes for each weight; what is larger is none, and is not read."""

MAX_THREADS = 1024
"""ONNX Runtime starts as many as it is told, whatever the machine has."""

_LEVELS = ("disabled", "basic", "extended", "all")

# ---------------------------------------------------------------------------------------------------------------------
# What a check says
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One thing that was checked.

    Attributes:
        name: What, different for every item of a result: ``integrity FILE``, ``model``, ``opset``, ``operators``,
            ``graph``, ``weights``, ``inputs``, ``outputs``, ``size_bytes``, ``max_abs_error OUTPUT``, ``relative_l2
            OUTPUT``, ``top1_agreement OUTPUT`` and ``latency_ratio``.
        outcome: passed, failed, inconclusive, or skipped where it could not be looked into.
        reason: One line that a person can act on.
        value: What was measured, or None.
        limit: What it may be, or None.
        output: The model output it belongs to, or None.
        sample: Number of the golden sample where it is worst, or None.
        baseline: When the baseline it was compared with was made, ISO 8601, or None.
        file: The damaged file, relative to the bundle, or None.
    """

    name: str
    outcome: str
    reason: str
    value: float | None = None
    limit: float | None = None
    output: str | None = None
    sample: int | None = None
    baseline: str | None = None
    file: str | None = None

    @property
    def rule(self) -> str:
        """The name without what it is about: equal for equal checks of several outputs or files."""
        return self.name.partition(" ")[0]


@dataclass(frozen=True)
class Result:
    """Everything a check says.

    Attributes:
        bundle: The bundle's folder, as it was named.
        items: In the order in which they were looked into.
        outcome: ``failed`` if any item failed, else inconclusive if any is, else passed.
        since: When the baseline was made, ISO 8601 in UTC.
        model: The model that was checked, as it was named.
        seconds: How long it took.
    """

    bundle: str
    items: tuple[Item, ...]
    outcome: str
    since: str
    model: str = ""
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """1 if an item failed, else 0: what cannot be told is no alarm."""
        return 1 if self.outcome == "failed" else 0


class BundleError(Exception):
    """A mistake the user can fix, told as what, where, got, want and fix.

    Args:
        what: What is wrong, with the value, on one line.
        where: The file.
        got: What was found there.
        want: What would have been accepted.
        fix: What to do about it.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: str | None = None,
        want: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.got, self.want, self.fix = what, where, got, want, fix

    def __str__(self) -> str:
        rows = (("where", self.where), ("got", self.got), ("want", self.want), ("fix", self.fix))
        return "\n".join([self.what, *(f"  {label:<6} {text}" for label, text in rows if text)])


class ManifestChangedError(BundleError):
    """The manifest is whole and not as it was signed."""


class UnavailableError(BundleError):
    """What a check needs is not installed here: no verdict on the model."""


def check_bundle(
    folder: str | Path, model: str | Path | None = None, *, latency: bool | None = None, behaviour_only: bool = False
) -> Result:
    """Check a model against a bundle.

    Args:
        folder: The bundle.
        model: The model in question; the bundle's own by default.
        latency: Whether to time the model against the bundle's, in turn. By default only a model that differs, and only
            on the machine the bundle was made on.
        behaviour_only: Let the opset, the operators and the weights differ, as for a model that was trained anew: what
            counts is what goes in and what comes out, how large it is and how long it takes.

    Returns:
        A verdict for each item. A damaged file is an item that failed, not an error.

    Raises:
        BundleError: There is no bundle or no model, the manifest is damaged, or onnxruntime is missing.
    """
    start = time.perf_counter()
    bundle = Bundle.open(Path(folder))
    model = None if model is None else Path(model)
    if model is not None and not model.is_file():
        raise BundleError("there is no model", where=str(model), want="an .onnx file")
    items = list(_integrity(bundle))
    damaged = {item.file for item in items if item.outcome == "failed"}
    items += _comparison(bundle, model or bundle.folder / MODEL, damaged, own=model is None, loose=behaviour_only)
    loaded = all(item.name != "model" or item.outcome != "failed" for item in items)
    items.append(
        _latency_item(bundle, model, damaged, wanted=latency) if loaded else _untimed("the model cannot be run")
    )
    completed = _completed(items, bundle)
    outcomes = {item.outcome for item in completed}
    outcome = next((outcome for outcome in ("failed", "inconclusive") if outcome in outcomes), "passed")
    seconds = round(time.perf_counter() - start, 3)
    return Result(str(folder), completed, outcome, bundle.since, str(model or Path(folder) / MODEL), seconds)


def item_names(folder: Path) -> tuple[str, ...]:
    """The `Item.name` of every item that `check_bundle` gives for a bundle, in that order, whatever it finds.

    Raises:
        BundleError: There is no bundle, or its manifest is damaged.
    """
    return _names(Bundle.open(folder).manifest)


def _names(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    names = [f"integrity {name}" for name in manifest["files"]]
    names += ["model", "opset", "operators", "graph", "weights", "inputs", "outputs", "size_bytes"]
    for spec in manifest["model"]["outputs"]:
        limits = manifest["tolerances"][spec["name"]]
        names.append(f"max_abs_error {spec['name']}")
        names += [f"relative_l2 {spec['name']}"] if limits["relative_l2"] is not None else []
        names += [f"top1_agreement {spec['name']}"] if limits["ranks_classes"] else []
    return (*names, "latency_ratio")


def _completed(items: Sequence[Item], bundle: Bundle) -> tuple[Item, ...]:
    """The items in their order, with those that could not be looked into, and with the baseline's date."""
    known = {item.name: item for item in items}
    failed = next((item.name for item in items if item.outcome == "failed"), "another item")
    rows = []
    for name in _names(bundle.manifest):
        missing = Item(name, "skipped", f"not looked into: {failed} failed")
        rows.append(replace(known.get(name, missing), baseline=bundle.since))
    return tuple(rows)


# ---------------------------------------------------------------------------------------------------------------------
# The bundle's folder
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest is sound; its other files may be anything.

    Attributes:
        folder: Where it lies.
        manifest: What ``manifest.json`` holds.
    """

    folder: Path
    manifest: dict[str, Any] = field(repr=False)

    @staticmethod
    def open(folder: Path) -> Bundle:
        """Read the manifest.

        Raises:
            BundleError: There is none, or it is damaged, changed by hand, or newer than this file.
        """
        return Bundle._open(folder, must_be_signed=True)

    @staticmethod
    def _open(folder: Path, *, must_be_signed: bool) -> Bundle:
        take_back(folder)
        path = folder / MANIFEST
        try:
            manifest = _read_json(path)
            signature, schema, own = manifest["digest"], manifest["schema"], _signature(manifest)
            if not _is(schema, int) or schema <= SCHEMA:
                _require_fields(manifest)
        except FileNotFoundError as e:
            raise BundleError(
                f"there is no bundle: it has no {MANIFEST}",
                where=str(folder),
                want="the folder `bundle` that `onnxshrink run` leaves",
            ) from e
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:  # unreadable, no text, or other JSON
            raise BundleError(
                f"the manifest is truncated or damaged: {type(e).__name__}: {e}",
                where=str(path),
                want="the file as it was written",
                fix="restore it from version control, or make the bundle anew: onnxshrink run",
            ) from e
        if must_be_signed and signature != own:
            raise ManifestChangedError(
                "the manifest has been changed since it was written",
                where=str(path),
                got=f"digest {own[:12]}",
                want=f"digest {str(signature)[:12]}",
                fix="restore it from version control, or accept what the model does now: --update",
            )
        if schema > SCHEMA:
            raise BundleError(
                "the bundle was written by a newer onnxshrink",
                where=str(path),
                got=f"schema {schema}",
                want=f"schema {SCHEMA} or older",
                fix=f"use the {SCRIPT} inside the bundle",
            )
        return Bundle(folder, manifest)

    @property
    def since(self) -> str:
        """When the baseline was made."""
        return str(self.manifest["since"])

    def golden(self, name: str) -> list[dict[str, Any]]:
        """The samples in one of the golden files: tensor name to array, as the model takes or gives them."""
        np = _need("numpy")
        side = "inputs" if name == INPUTS else "outputs"
        names = [spec["name"] for spec in self.manifest["model"][side]]
        count = self.manifest["golden"]["n_samples"]
        try:
            with np.load(self.folder / name, allow_pickle=False) as archive:
                return [{name: archive[f"{i}.{k}"] for k, name in enumerate(names)} for i in range(count)]
        except Exception as e:  # numpy and zipfile raise BadZipFile, ValueError, KeyError, EOFError and more
            raise BundleError(
                f"the golden samples cannot be read: {type(e).__name__}: {e}",
                where=str(self.folder / name),
                fix="restore the file from version control, or make the bundle anew: onnxshrink run",
            ) from e


def _read_json(path: Path) -> Any:
    """What a file of a bearable size holds.

    Raises:
        ValueError: The file is larger, is no JSON, or holds a number that no float is near, such as NaN.
    """
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"it is larger than {MAX_MANIFEST_BYTES} bytes")
    text = path.read_text(encoding="utf-8")
    return json.loads(text, parse_int=_finite(int), parse_float=_finite(float), parse_constant=_finite(float))


def _finite(kind: Any) -> Any:
    """Reads a number of JSON."""

    def read(text: str) -> Any:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text[:20]} is no number that a manifest can hold")
        return kind(text)

    return read


_SPEC = {"name": str, "type": str, "shape": [(None, int, str)]}
_SHAPE: Any = {
    "schema": int,
    "digest": str,
    "since": str,
    "model": {
        "sha256": str,
        "size_bytes": int,
        "opsets": {...: int},
        "op_types": {...: int},
        "structure": str,
        "weights": [[str]],
        "inputs": [_SPEC],
        "outputs": [_SPEC],
        "external": [str],
    },
    "session": {"provider": str, "options": {...: str}, "threads": int, "optimization": (None, str)},
    "golden": {"n_samples": int},
    "machine": {"id": str},
    "tolerances": {
        ...: {
            "max_abs": float,
            "relative_l2": (None, float),
            "learned_relative_l2": (None, float),
            "ranks_classes": bool,
        }
    },
    "versions": {...: str},
    "files": {...: {"sha256": str, "size_bytes": int}},
    "latency": (None, {"p50_ms": (None, float)}),
    "history": (None, [{}]),
}
"""What a check reads of a manifest: a type; any of several; a list of them; an object's fields, ``...`` for all."""

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", None: "null"}


def _require_fields(manifest: Any) -> None:
    """Refuse a manifest that lacks what a check reads, or has something else there, or names a file outside its folder.

    What no check reads (``metrics``, ``config`` and the like) may be anything.

    Raises:
        ValueError: It is so; the message says where.
    """
    misfit = _misfit(manifest, _SHAPE, "manifest")
    if misfit:
        raise ValueError(misfit)
    model, session = manifest["model"], manifest["session"]
    for name in (*manifest["files"], *model["external"]):
        _require_inside(name)
    for wrong, flaw in (
        (manifest["golden"]["n_samples"] < 1, "golden.n_samples is less than one"),
        (not 0 <= session["threads"] <= MAX_THREADS, f"session.threads is not between 0 and {MAX_THREADS}"),
        (session.get("optimization") not in (None, *_LEVELS), "session.optimization is no level"),
        (any(len(pair) != 2 for pair in model["weights"]), "model.weights are no pairs of name and digest"),
        ({spec["name"] for spec in model["outputs"]} - {*manifest["tolerances"]}, "an output has no tolerance"),
    ):
        if wrong:
            raise ValueError(flaw)


def _misfit(value: Any, shape: Any, where: str) -> str | None:
    """The first place where a value of JSON is not of a shape, in words; None where all of it is."""
    found: Iterator[str | None]
    if isinstance(shape, tuple):
        tried = [_misfit(value, one, where) for one in shape]
        return None if None in tried else tried[-1]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        found = (_misfit(item, shape[0], f"{where}[{at}]") for at, item in enumerate(value))
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where} is no object"
        every = shape.get(...)
        fields = dict.fromkeys(value, every) if every else shape
        found = (_misfit(value.get(name), inner, f"{where}.{name}") for name, inner in fields.items())
    else:
        return None if _is(value, shape) else f"{where} is missing, or no {_WORDS[shape]}"
    return next((flaw for flaw in found if flaw), None)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a type; true and false are no numbers, whole numbers are, and have 64 bits."""
    if kind is None or isinstance(value, bool):
        return value is None if kind is None else kind is bool
    if kind is int:
        return isinstance(value, int) and abs(value) < 1 << 64
    return isinstance(value, (int, float) if kind is float else kind)


def _require_inside(name: str) -> None:
    """Refuse the name of a file that would lie outside the folder it is relative to.

    Raises:
        ValueError: It does, or no file can be called so.
    """
    os.fsencode(name)
    if "\0" in name:
        raise ValueError(f"no file is called {name!r}")
    path = Path(name)
    if path.is_absolute() or path.drive or ".." in path.parts:
        raise ValueError(f"the file {name!r} lies outside the folder")


def save_golden(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write samples as an archive of arrays named ``<sample>.<position>``; the names of tensors are the manifest's."""
    np = _need("numpy")
    named = {f"{i}.{k}": array for i, sample in enumerate(samples) for k, array in enumerate(sample.values())}
    plain = {key: array.astype(str) if array.dtype.kind == "O" else array for key, array in named.items()}
    np.savez_compressed(path, **plain)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Sign every file of a bundle: write the manifest with the sha256 of each, and of itself."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): {"sha256": digest_file(path), "size_bytes": path.stat().st_size}
        for path in paths
        if "__pycache__" not in path.parts
    }
    signed = {**manifest, "files": files}
    text = json.dumps({**signed, "digest": _signature(signed)}, indent=1, allow_nan=False) + "\n"
    scratch = folder / f".{MANIFEST}"
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(folder / MANIFEST)


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            sha.update(chunk)
    return sha.hexdigest()


def _signature(manifest: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _integrity(bundle: Bundle) -> Iterator[Item]:
    """One item for each file that the manifest names."""
    for name, want in bundle.manifest["files"].items():
        path = bundle.folder / name
        if not os.path.isfile(path):  # noqa: PTH113  Path.is_file raises where a name is too long for the system
            yield Item(f"integrity {name}", "failed", f"{name} is missing", file=name)
            continue
        size, whole = path.stat().st_size, want["size_bytes"]
        if size < whole:
            yield Item(
                f"integrity {name}", "failed", f"{name} is truncated: {size} of {whole} bytes", size, whole, file=name
            )
        elif digest_file(path) != want["sha256"]:
            text = f"{name} was changed: sha256 {digest_file(path)[:12]}, and {want['sha256'][:12]} in the manifest"
            yield Item(f"integrity {name}", "failed", text, file=name)
        else:
            yield Item(f"integrity {name}", "passed", f"sha256 {want['sha256'][:12]}", file=name)


# ---------------------------------------------------------------------------------------------------------------------
# What a model is: read from the file, without onnx
#
# ONNX is protobuf: a message is a row of fields, each a number with its wire type and a value. The numbers below are
# those of onnx.proto; fields that say nothing of what the network computes are not looked at.
# ---------------------------------------------------------------------------------------------------------------------


def describe_model(path: Path) -> dict[str, Any]:
    """What network a file holds, whatever its tensors are called.

    Returns:
        ``ir_version``, ``producer``, ``opsets`` (domain to version), ``op_types`` (how many nodes of each, subgraphs
        included), ``structure`` (sha256 of nodes, attributes and connections), ``weights`` (name and sha256 of each
        initializer, in order of first use), ``steps`` (output to the size of its quantization step, for outputs that a
        DequantizeLinear gives), ``sha256`` and ``size_bytes`` (both with external data) and ``external`` (those files).

    Raises:
        BundleError: The file is no ONNX model, or is truncated.

    Source: onnx.proto; "Protocol Buffers Encoding", protobuf.dev.
    """
    try:
        return _description(path)
    except (OSError, ValueError, LookupError, RecursionError, struct.error) as e:
        raise BundleError(
            f"the model cannot be read: {e}", where=str(path), want="a whole .onnx file with its external data"
        ) from e


def _description(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    model = _grouped(memoryview(data))
    if 7 not in model:
        raise ValueError("it holds no graph")
    graph = _grouped(model[7][-1])
    nodes = [_grouped(node) for node in graph.get(1, ())]
    weights, external = _initializers(graph, path.parent)
    structure, used = _structure(graph, nodes, weights, [*model.get(25, ()), *graph.get(15, ())])
    order = [*used, *sorted(set(weights) - set(used))]
    opsets = [_grouped(entry) for entry in model.get(8, ())]
    return {
        "ir_version": model.get(1, [0])[-1],
        "producer": " ".join(_text(model.get(number, [b""])[-1]) for number in (2, 3)).strip(),
        "opsets": {_text(entry.get(1, [b""])[-1]): entry.get(2, [0])[-1] for entry in opsets},
        "op_types": dict(sorted(Counter(_op_types(graph)).items())),
        "structure": structure,
        "weights": [[name, weights[name]] for name in order],
        "steps": _output_steps(graph, nodes),
        "sha256": _digest_with(data, path.parent, external),
        "size_bytes": len(data) + sum((path.parent / name).stat().st_size for name in external),
        "external": external,
    }


def _digest_with(data: bytes, folder: Path, external: Sequence[str]) -> str:
    """sha256 of a file's bytes and of those of its external data."""
    sha = hashlib.sha256(data)
    for name in external:
        sha.update((folder / name).read_bytes())
    return sha.hexdigest()


def _initializers(graph: Mapping[int, Sequence[Any]], folder: Path) -> tuple[dict[str, str], list[str]]:
    """sha256 of the type, shape and values of each initializer; and the files that values lie in."""
    digests: dict[str, str] = {}
    files: dict[str, memoryview] = {}
    for tensor in map(_grouped, graph.get(5, ())):
        sha = hashlib.sha256()
        for number in (1, 2, 4, 5, 6, 7, 9, 10, 11):  # dims, data_type, and the values in their various places
            for value in tensor.get(number, ()):
                sha.update(f"{number}:".encode() + (str(value).encode() if isinstance(value, int) else bytes(value)))
        entries = [_grouped(entry) for entry in tensor.get(13, ())]
        place = {_text(entry[1][-1]): _text(entry[2][-1]) for entry in entries}
        if place:
            name, start = place["location"], int(place.get("offset", 0))
            if name not in files:
                _require_inside(name)
                files[name] = memoryview((folder / name).read_bytes())
            end = start + int(place["length"]) if "length" in place else len(files[name])
            if end > len(files[name]):
                raise ValueError(f"its external data {name!r} is truncated")
            sha.update(files[name][start:end])
        digests[_text(tensor.get(8, [b""])[-1])] = sha.hexdigest()[:32]
    return digests, sorted(files)


def _structure(
    graph: Mapping[int, Sequence[Any]],
    nodes: Sequence[Mapping[int, Sequence[Any]]],
    weights: Mapping[str, str],
    verbatim: Sequence[Any],
) -> tuple[str, list[str]]:
    """sha256 of what is computed from what, with tensors numbered in place of their names; weights by first use."""
    sha = hashlib.sha256()
    known: dict[str, str] = {"": "-"}
    used: list[str] = []
    for value in graph.get(11, ()):
        known.setdefault(_text(_grouped(value)[1][-1]), f"i{len(known)}")
    for name in weights:
        known.pop(name, None)  # in old models every initializer is an input as well
    for node in nodes:
        row = [_text(node.get(number, [b""])[-1]) for number in (7, 4)]
        for name in map(_text, node.get(1, ())):
            if name not in known and name in weights:
                known[name] = f"w{len(used)}"
                used.append(name)
            row.append(known.get(name, name))
        for name in map(_text, node.get(2, ())):
            known.setdefault(name, f"t{len(known)}")
        row.append(f"-> {len(node.get(2, ()))}")
        sha.update("\0".join(row).encode())
        for attribute in sorted(map(_raw, node.get(5, ()))):
            sha.update(b"\1" + attribute)
    for value in graph.get(12, ()):
        name = _text(_grouped(value)[1][-1])
        sha.update(b"\2" + known.get(name, name).encode())
    for message in verbatim:  # functions and sparse initializers
        sha.update(b"\3" + _raw(message))
    return sha.hexdigest(), used


def _op_types(graph: Mapping[int, Sequence[Any]]) -> Iterator[str]:
    """The operator of every node, those of other domains than ONNX's with their domain, also in subgraphs."""
    for node in map(_grouped, graph.get(1, ())):
        domain, op_type = (_text(node.get(number, [b""])[-1]) for number in (7, 4))
        yield op_type if domain in ("", "ai.onnx") else f"{domain}.{op_type}"
        for attribute in map(_grouped, node.get(5, ())):
            for subgraph in (*attribute.get(6, ()), *attribute.get(11, ())):
                yield from _op_types(_grouped(subgraph))


def _output_steps(graph: Mapping[int, Sequence[Any]], nodes: Sequence[Mapping[int, Sequence[Any]]]) -> dict[str, float]:
    """Scale of the DequantizeLinear that gives an output, where it is one float32 for the whole tensor."""
    scales = {}
    for tensor in map(_grouped, graph.get(5, ())):
        values = b"".join(map(_raw, (*tensor.get(9, ()), *tensor.get(4, ()))))
        if tensor.get(2, [0])[-1] == 1 and len(values) == 4:
            scales[_text(tensor.get(8, [b""])[-1])] = float(struct.unpack("<f", values)[0])
    outputs = {_text(_grouped(value)[1][-1]) for value in graph.get(12, ())}
    steps = {}
    for node in nodes:
        if _text(node.get(4, [b""])[-1]) == "DequantizeLinear":
            output, scale = _text(node[2][0]), _text(node[1][1])
            if output in outputs and scale in scales:
                steps[output] = scales[scale]
    return steps


def _grouped(message: Any) -> dict[int, list[Any]]:
    """The fields of a message by number: integers as such, everything else as its bytes."""
    fields: dict[int, list[Any]] = {}
    if isinstance(message, int):
        raise ValueError("it is no ONNX model")  # noqa: TRY004  a flaw of the file, not of a type
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        value: Any
        if tag & 7 == 0:
            value, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}.get(tag & 7)
            if tag & 7 == 2:
                size, at = _varint(message, at)
            if size is None:
                raise ValueError("it is no ONNX model")
            value, at = message[at : at + size], at + size
        if at > end:
            raise ValueError("it is truncated")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(data: Any, at: int) -> tuple[int, int]:
    """An integer in groups of 7 bits, lowest first, and where the next field begins."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("it is truncated")
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("it is no ONNX model")


def _text(value: Any) -> str:
    return _raw(value).decode("utf-8", "replace")


def _raw(value: Any) -> bytes:
    """The bytes of a field that must not be an integer, as it may be in a damaged file."""
    if isinstance(value, int):
        raise ValueError("it is no ONNX model")  # noqa: TRY004  a flaw of the file, not of a type
    return bytes(value)


# ---------------------------------------------------------------------------------------------------------------------
# Running a model
# ---------------------------------------------------------------------------------------------------------------------


def open_session(
    model: Path, settings: Mapping[str, Any], *, level: str | None = None, threads: int | None = None
) -> Any:
    """An inference session on the provider that the bundle names.

    Args:
        model: The file.
        settings: ``provider`` and ``options`` as ONNX Runtime has them, ``threads``, ``optimization`` (all by default).
        level: disabled, basic, extended or all, in place of the settings'.
        threads: In place of the settings'; 0 takes all cores.

    Raises:
        BundleError: The provider is not there, or ONNX Runtime dropped it, or it cannot load the model.
    """
    ort = _need("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings["threads"] if threads is None else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    level = level or settings.get("optimization") or "all"
    name = "ORT_DISABLE_ALL" if level == "disabled" else f"ORT_ENABLE_{level.upper()}"
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, name)
    provider = settings["provider"]
    if provider not in ort.get_available_providers():
        raise UnavailableError(
            f"the bundle's execution provider {provider} is not available here",
            got=", ".join(ort.get_available_providers()),
            want=provider,
            fix="install the build of onnxruntime that has it",
        )
    providers: list[Any] = [(provider, dict(settings["options"]))]
    if provider != "CPUExecutionProvider":
        providers.append("CPUExecutionProvider")
    try:
        session = ort.InferenceSession(str(model), options, providers=providers)
    except Exception as e:  # ORT raises a dozen unrelated types, RuntimeException and Fail among them
        raise BundleError(f"ONNX Runtime cannot load the model: {_first_line(e)}", where=str(model)) from e
    if session.get_providers()[0] != provider:
        raise UnavailableError(
            f"ONNX Runtime dropped {provider} without an error", got=session.get_providers()[0], want=provider
        )
    return session


def run_samples(session: Any, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The outputs for each sample, name to array.

    Raises:
        BundleError: ONNX Runtime refuses a sample.
    """
    np = _need("numpy")
    names = [value.name for value in session.get_outputs()]
    rows = []
    for number, sample in enumerate(samples):
        feed = {name: array.astype(object) if array.dtype.kind == "U" else array for name, array in sample.items()}
        try:
            rows.append({name: np.asarray(value) for name, value in zip(names, session.run(names, feed))})
        except Exception as e:  # as above: InvalidArgument and RuntimeException share no base but Exception
            raise BundleError(f"ONNX Runtime cannot run golden sample {number}: {_first_line(e)}") from e
    return rows


def interface_of(session: Any) -> dict[str, list[dict[str, Any]]]:
    """Name, element type and shape of every input and output; a string names a dynamic axis, None an unnamed one."""
    sides = (("inputs", session.get_inputs()), ("outputs", session.get_outputs()))
    return {
        side: [{"name": v.name, "type": v.type, "shape": [d or None for d in v.shape or ()]} for v in values]
        for side, values in sides
    }


def machine_facts() -> dict[str, Any]:
    """What decides how fast a model runs here and which kernels do it; ``id`` is equal where all of it is equal."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for row in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = row.partition(":")
            fields.setdefault(name.strip(), value.strip())  # the first processor stands for all
    facts = {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "features": sorted((fields.get("flags") or fields.get("Features") or "").split()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "onnxruntime": str(_need("onnxruntime").__version__),
    }
    text = json.dumps(facts, sort_keys=True)
    return {**facts, "id": hashlib.sha256(text.encode()).hexdigest()[:16], "system": platform.platform(terse=True)}


def _need(name: str) -> Any:
    """A module, imported when it is first needed, so that ``--help`` works without it."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UnavailableError(
            f"{name} cannot be imported: {e}", want=f"Python with numpy and {name}", fix=f"pip install {name}"
        ) from e


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# ---------------------------------------------------------------------------------------------------------------------
# How far outputs are apart, and how far they may be
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """How far an output is from the golden one, over all samples.

    Attributes:
        max_abs: Largest difference; for outputs that are no floats, the share of values that differ.
        relative_l2: ``||golden - got|| / ||golden||``; 0 for outputs that are no floats.
        sample: The golden sample where ``max_abs`` is.
        flaw: What makes the outputs incomparable: a shape, a dtype, a NaN; or None.
        flips: Golden samples whose winning class is another, and by what margin it had won.
    """

    max_abs: float = 0.0
    relative_l2: float = 0.0
    sample: int = 0
    flaw: str | None = None
    flips: tuple[tuple[int, float], ...] = ()


def distance(golden: Sequence[Any], got: Sequence[Any]) -> Distance:
    """Compare one output on every sample.

    Args:
        golden: One array for each sample.
        got: The same of the model in question.
    """
    np = _need("numpy")
    worst, at, flips = 0.0, 0, []
    squares = total = 0.0
    for number, (want, have) in enumerate(zip(golden, got)):
        if want.shape != have.shape or want.dtype.kind not in (have.dtype.kind, "U"):
            flaw = f"{have.dtype}{list(have.shape)} in place of {want.dtype}{list(want.shape)}"
            return Distance(math.inf, math.inf, number, flaw)
        if want.dtype.kind != "f":
            error = float(np.mean(want != have.astype(want.dtype))) if want.size else 0.0
        else:
            flaw = _flaw(want, have) or ""
            if flaw:
                return Distance(math.inf, math.inf, number, flaw)
            finite = np.isfinite(want)
            a, b = want[finite].astype(np.float64), have[finite].astype(np.float64)
            error = float(np.abs(a - b).max(initial=0.0))
            squares, total = squares + float(np.square(a - b).sum()), total + float(np.square(a).sum())
            flips += [(number, margin) for margin in _flips(want, have)]
        if error > worst:
            worst, at = error, number
    relative = math.sqrt(squares / total) if total else (math.inf if squares else 0.0)
    return Distance(worst, relative, at, None, tuple(flips))


def _flaw(want: Any, have: Any) -> str | None:
    np = _need("numpy")
    if not np.array_equal(np.isnan(want), np.isnan(have)):
        return "NaN" if np.isnan(have).any() else "a number in place of NaN"
    unlike = (np.isinf(want) | np.isinf(have)) & (want != have)
    return "an infinity in place of a number, or the reverse" if unlike.any() else None


def _flips(want: Any, have: Any) -> list[float]:
    """By which margin the winning class had won, for rows where another wins now."""
    if not ranks_classes(want):
        return []
    rows = [row for row in range(len(want)) if want[row].argmax() != have[row].argmax()]
    return [float(want[row].max() - want[row][have[row].argmax()]) for row in rows]


def ranks_classes(array: Any) -> bool:
    """True of outputs ``(n, n_classes)`` that have a winning class."""
    return bool(array.dtype.kind == "f" and array.ndim == 2 and array.shape[1] > 1)


NOISE_FACTOR = 4.0
"""How many times the largest spread that was seen is allowed: the golden samples are few."""

STEPS = 2.0
"""Quantization steps that an output may move where another processor rounds in another way."""

FLOAT_ERROR = {"tensor(float16)": 2.0**-10, "tensor(bfloat16)": 2.0**-7, "tensor(double)": 1e-12}
FLOAT32_ERROR = 1e-5
PRODUCTS = ("Conv", "MatMul", "Gemm", "ConvTranspose", "Attention", "LSTM", "GRU")


def learn_tolerances(
    model: Path, settings: Mapping[str, Any], description: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The golden outputs, and how far from them each output may be.

    What is seen here: the same model again in its session, with one thread and with all, at every optimization level,
    one sample at a time and all at once. The largest distance from the golden outputs, times `NOISE_FACTOR`, is
    allowed.

    What is known of elsewhere: sums are added in another order. A product of K terms in float32 is then off by about
    ``sqrt(K) * 2**-24`` of its size, some 4e-6 for K = 4096, and L products in a row add up to ``sqrt(L)`` times that;
    `FLOAT32_ERROR` ``* sqrt(L)`` of the largest output is twice as much and more. float16 and bfloat16 round every
    tensor, to 2**-11 and 2**-8 of its size. In integers such a difference moves a value by a whole step where it lies
    at the edge of one, so `STEPS` steps of the output are allowed: its own scale, or 1/255 of its golden range where it
    has none.

    Neither is ever zero; the larger counts.

    Args:
        model: The file.
        settings: Of `open_session`.
        description: Of `describe_model`.
        samples: Golden inputs.

    Returns:
        The golden outputs of each sample; and for each output ``max_abs``, ``relative_l2`` and what they follow from.
    """
    session = open_session(model, settings)
    golden = run_samples(session, samples)
    types = {value.name: value.type for value in session.get_outputs()}
    seen: dict[str, list[Distance]] = {name: [] for name in types}
    ways = (("all", 0), ("all", 1), ("extended", 1), ("basic", 1), ("disabled", 1))
    others = (open_session(model, settings, level=level, threads=threads) for level, threads in ways)
    for again in chain([session], others):  # what draws at random draws alike in a fresh session, and not in this one
        rows = run_samples(again, samples)
        for name, distances in seen.items():
            distances.append(distance([row[name] for row in golden], [row[name] for row in rows]))
    for name, gap in _together(session, samples, golden).items():
        seen[name].append(gap)
    return golden, {
        name: _tolerance(name, types[name], [row[name] for row in golden], seen[name], description) for name in types
    }


def _together(session: Any, samples: Sequence[Any], golden: Sequence[Any]) -> dict[str, Distance]:
    """Distances when all samples go in at once; none where the model does not take them so."""
    np = _need("numpy")
    inputs = session.get_inputs()
    dynamic = all(value.shape and not isinstance(value.shape[0], int) for value in inputs)
    if not inputs or not dynamic or len({tuple(array.shape for array in sample.values()) for sample in samples}) > 1:
        return {}
    counts = [len(next(iter(sample.values()))) for sample in samples]
    batch = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    try:
        outputs = run_samples(session, [batch])[0]
    except BundleError:  # a model may fix its batch inside, whatever its inputs say
        return {}
    ends = np.cumsum(counts)[:-1]
    found = {}
    for name, output in outputs.items():
        if output.ndim and len(output) == sum(counts):
            gap = distance([row[name] for row in golden], np.split(output, ends))
            found.update({} if gap.flaw else {name: gap})
    return found


def _tolerance(
    name: str, kind: str, golden: Sequence[Any], seen: Sequence[Distance], description: Mapping[str, Any]
) -> dict[str, Any]:
    np = _need("numpy")
    sound = [gap for gap in seen if gap.flaw is None]
    noise = max((gap.max_abs for gap in sound), default=0.0)
    noise_l2 = max((gap.relative_l2 for gap in sound), default=0.0)
    if golden[0].dtype.kind != "f":
        values = max(1, sum(array.size for array in golden))
        return {
            "max_abs": max(NOISE_FACTOR * noise, 1.0 / max(2, values)),  # one value alone may not differ
            "relative_l2": None,
            "learned_max_abs": noise,
            "ranks_classes": False,
            "rule": f"share of values that differ: {NOISE_FACTOR:g} times what was seen, or one of {max(2, values)}",
        }
    flat = np.concatenate([array[np.isfinite(array)].ravel() for array in golden] or [[]]).astype(np.float64)
    size, rms = float(np.abs(flat).max(initial=0.0)), float(np.sqrt(np.square(flat).mean())) if flat.size else 0.0
    counts = description["op_types"]
    depth = sum(n for op, n in counts.items() if any(product in op for product in PRODUCTS))
    relative = FLOAT_ERROR.get(kind, FLOAT32_ERROR) * math.sqrt(max(1, depth))
    limit, limit_l2, rule = relative * size, relative, f"{relative:.2g} of the largest value ({depth} products)"
    if any("Quantize" in op or "Integer" in op or op.startswith("com.microsoft.Q") for op in counts):
        step = description["steps"].get(name) or float(np.ptp(flat)) / 255 if flat.size else 0.0
        limit, limit_l2 = max(limit, STEPS * step), max(limit_l2, STEPS * step / math.sqrt(12) / rms if rms else 0.0)
        rule = f"{STEPS:g} quantization steps of {step:.3g}"
    tiny = float(np.finfo(np.float32).tiny) ** 0.5
    return {
        "max_abs": max(NOISE_FACTOR * noise, limit, tiny),
        # Nothing is relative to outputs that are all zero: the least noise would be infinitely far.
        "relative_l2": max(NOISE_FACTOR * noise_l2, limit_l2, tiny) if rms else None,
        "learned_max_abs": noise,
        "learned_relative_l2": noise_l2 if rms else None,
        "ranks_classes": ranks_classes(golden[0]),
        "rule": f"the larger of {NOISE_FACTOR:g} times what was seen and {rule}",
    }


# ---------------------------------------------------------------------------------------------------------------------
# A model against the baseline
# ---------------------------------------------------------------------------------------------------------------------


def _comparison(bundle: Bundle, model: Path, damaged: set[str | None], *, own: bool, loose: bool) -> Iterator[Item]:
    """What network it is, what goes in and comes out, and what it computes."""
    want = bundle.manifest["model"]
    try:
        have = describe_model(model)
        session = open_session(model, bundle.manifest["session"])
    except UnavailableError:
        raise
    except BundleError as e:
        yield Item("model", "failed", f"{model.name}: {e.what}")
        return
    same = have["sha256"] == want["sha256"]
    which = "the bundle's own model" if own else "byte for byte the baseline" if same else "other bytes"
    yield Item("model", "passed", f"{which}, sha256 {have['sha256'][:12]}")
    yield from _network(want, have, loose=loose)
    contract = interface_of(session)
    for side in ("inputs", "outputs"):
        changes = _interface_changes(want[side], contract[side])
        yield Item(side, "failed" if changes else "passed", changes or ", ".join(map(_spec, want[side])))
    limit = max(MAX_SIZE_RATIO * want["size_bytes"], want["size_bytes"] + SIZE_SLACK_BYTES)
    grown = have["size_bytes"] > limit
    text = f"{have['size_bytes']} bytes, {want['size_bytes']} in the baseline"
    yield Item("size_bytes", "failed" if grown else "passed", text, have["size_bytes"], round(limit))
    yield from _behaviour(bundle, session, damaged)


def _network(want: Mapping[str, Any], have: Mapping[str, Any], *, loose: bool) -> Iterator[Item]:
    """Opsets, operators, connections and weights."""
    weights = _weight_changes(want["weights"], have["weights"])
    rows = (
        ("opset", _opsets(want["opsets"]), _opsets(have["opsets"])),
        ("operators", want["op_types"], have["op_types"]),
        ("graph", want["structure"], have["structure"]),
    )
    for name, before, now in rows:
        if before == now:
            said = {"opset": str(now), "operators": f"{sum(want['op_types'].values())} nodes"}
            yield Item(name, "passed", said.get(name, "the same nodes, connections and attributes"))
            continue
        text = {
            "opset": f"opset {now}, and {before} in the baseline",
            "operators": _histogram_changes(want["op_types"], have["op_types"]),
            "graph": "nodes, connections or attributes differ from the baseline's",
        }[name]
        yield Item(name, "passed" if loose else "failed", f"{text}; allowed" if loose else text)
    if weights is None:
        yield Item("weights", "passed", f"{len(want['weights'])} tensors, the same values")
    else:
        yield Item("weights", "passed" if loose else "failed", f"{weights}; allowed" if loose else weights)


def _opsets(versions: Mapping[str, int]) -> str:
    return ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(versions.items()))


def _histogram_changes(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    names = sorted(name for name in {*before, *now} if before.get(name, 0) != now.get(name, 0))
    return "nodes differ: " + _some([f"{name} {before.get(name, 0)} -> {now.get(name, 0)}" for name in names])


def _weight_changes(before: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> str | None:
    """Which initializers differ; None where the values are the same in the same places, whatever they are called."""
    if [digest for _, digest in before] == [digest for _, digest in now]:
        return None
    old, new = {name: digest for name, digest in before}, {name: digest for name, digest in now}  # noqa: C416
    changed = [name for name in old if name in new and old[name] != new[name]]
    gone, added = [name for name in old if name not in new], [name for name in new if name not in old]
    parts = [
        f"{label} {_some(names)}"
        for label, names in (("changed:", changed), ("missing:", gone), ("new:", added))
        if names
    ]
    return f"{len(changed) + len(gone)} of {len(old)} tensors differ; " + ("; ".join(parts) or "their order of use")


def _interface_changes(before: Sequence[Any], now: Sequence[Any]) -> str:
    """What differs in names, order, types and shapes; how a dynamic axis is called does not matter."""
    if list(map(_signature_of, before)) == list(map(_signature_of, now)):
        return ""
    return f"{', '.join(map(_spec, now))}, and {', '.join(map(_spec, before))} in the baseline"


def _signature_of(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    return spec["name"], spec["type"], tuple(d if isinstance(d, int) else None for d in spec["shape"])


def _spec(spec: Mapping[str, Any]) -> str:
    return f"{spec['name']!r} {spec['type'][7:-1]}[{','.join(str(d or '?') for d in spec['shape'])}]"


def _behaviour(bundle: Bundle, session: Any, damaged: set[str | None]) -> Iterator[Item]:
    """Outputs against the golden ones."""
    names = [spec["name"] for spec in bundle.manifest["model"]["outputs"]]
    broken = [name for name in (INPUTS, OUTPUTS) if name in damaged]
    if broken:
        for name in names:
            yield Item(f"max_abs_error {name}", "skipped", f"{broken[0]} is damaged", output=name)
        return
    golden = bundle.golden(OUTPUTS)
    try:
        rows = run_samples(session, bundle.golden(INPUTS))
    except BundleError as e:
        for name in names:
            yield Item(f"max_abs_error {name}", "failed", e.what, output=name)
        return
    for name in names:
        if name not in rows[0]:
            yield Item(f"max_abs_error {name}", "failed", "the model has no such output", output=name)
            continue
        gap = distance([row[name] for row in golden], [row[name] for row in rows])
        yield from _drift_items(name, gap, golden, bundle)


def _drift_items(name: str, gap: Distance, golden: Sequence[Any], bundle: Bundle) -> Iterator[Item]:
    limits = bundle.manifest["tolerances"][name]
    if gap.flaw:
        yield Item(
            f"max_abs_error {name}", "failed", f"sample {gap.sample}: {gap.flaw}", output=name, sample=gap.sample
        )
        return
    blind = _tells_nothing(limits)
    version, here = bundle.manifest["versions"].get("onnxruntime"), str(_need("onnxruntime").__version__)
    elsewhere = f"; onnxruntime {here} here, {version} then" if here != version else ""
    for measure, value, limit in (
        ("max_abs_error", gap.max_abs, limits["max_abs"]),
        ("relative_l2", gap.relative_l2, limits["relative_l2"]),
    ):
        if limit is None:
            continue
        failed = not value <= limit
        text = f"{value:.3g} where {limit:.3g} is allowed, worst at sample {gap.sample}" if value else "identical"
        unsure = blind and value > 0 and not failed
        yield Item(
            f"{measure} {name}",
            "failed" if failed else "inconclusive" if unsure else "passed",
            text + (elsewhere if failed else "; the baseline differs from itself as much" if unsure else ""),
            value if math.isfinite(value) else None,
            limit,
            output=name,
            sample=gap.sample if value else None,
        )
    if not limits["ranks_classes"]:
        return
    if not all(ranks_classes(row[name]) for row in golden):
        text = "the golden outputs have no winning classes"
        yield Item(f"top1_agreement {name}", "failed", text, output=name)
        return
    # A class that had won by less than two outputs may move is no winner to rely on.
    lost = [(sample, margin) for sample, margin in gap.flips if margin > 2 * limits["max_abs"]]
    n_rows = sum(len(row[name]) for row in golden)
    agreement = 1 - len(lost) / max(1, n_rows)
    text = f"{n_rows - len(lost)} of {n_rows} keep their class" + (
        f"; sample {lost[0][0]} had won by {lost[0][1]:.3g}" if lost else ""
    )
    sample = lost[0][0] if lost else None
    yield Item(
        f"top1_agreement {name}", "failed" if lost else "passed", text, agreement, 1.0, output=name, sample=sample
    )


def _tells_nothing(limits: Mapping[str, Any]) -> bool:
    """True of outputs that may be anything, as those of a Dropout that was left on: the baseline is as far from itself.

    A share of values, or an error as large as the output, from 1 on.
    """
    if limits["relative_l2"] is None:
        return bool(limits["max_abs"] >= 1)
    return NOISE_FACTOR * (limits.get("learned_relative_l2") or 0.0) >= 1


# ---------------------------------------------------------------------------------------------------------------------
# Latency: the model and the bundle's, timed in turn
# ---------------------------------------------------------------------------------------------------------------------

N_ROUNDS = 12
"""Each with sessions opened anew: where their memory lies makes some faster than others for as long as they live."""

_ROUND_NS = 100_000_000
_SAMPLE_NS = 50_000


def _untimed(reason: str) -> Item:
    return Item("latency_ratio", "skipped", reason)


def _latency_item(bundle: Bundle, model: Path | None, damaged: set[str | None], *, wanted: bool | None) -> Item:
    """The model's latency over the baseline's, if it is to be measured and can be."""
    if wanted is False:
        return _untimed("not asked for")
    broken = sorted(str(name) for name in damaged if name not in (None, SCRIPT, OUTPUTS))
    if broken:
        return _untimed(f"{broken[0]} is damaged, so there is nothing to compare with")
    same = model is None or describe_model(model)["sha256"] == bundle.manifest["model"]["sha256"]
    here, there = machine_facts()["id"], bundle.manifest["machine"]["id"]
    if same and wanted is None:
        return _untimed("the baseline itself")
    if wanted is None and here != there:
        return _untimed(f"another machine than the baseline's ({here}, and {there} then); --latency measures anyway")
    settings, samples = bundle.manifest["session"], bundle.golden(INPUTS)
    try:
        ratios, p50_ms = measure_ratio(bundle.folder / MODEL, model or bundle.folder / MODEL, settings, samples[0])
    except BundleError as e:
        return _untimed(e.what)
    if same:
        then = bundle.manifest.get("latency") or {}
        p50_then = then.get("p50_ms")
        known = f", {p50_then:.3g} ms when the baseline was made" if p50_then and here == there else ""
        return Item("latency_ratio", "passed", f"the baseline itself: {p50_ms:.3g} ms{known}", 1.0, MAX_LATENCY_RATIO)
    ordered = sorted(ratios)
    value, lo, hi = ordered[len(ordered) // 2], ordered[1], ordered[-2]
    outcome = "failed" if lo > MAX_LATENCY_RATIO else "passed" if hi <= MAX_LATENCY_RATIO else "inconclusive"
    text = (
        f"{value:.3f} of the baseline's, {lo:.3f} to {hi:.3f} ({p50_ms:.3g} ms); at most {MAX_LATENCY_RATIO} is allowed"
    )
    return Item("latency_ratio", outcome, text, value, MAX_LATENCY_RATIO)


def measure_ratio(
    baseline: Path, model: Path, settings: Mapping[str, Any], sample: Mapping[str, Any]
) -> tuple[list[float], float]:
    """Time two models in turn.

    Whatever slows the machine meets both alike, so each round's ratio stays right. Between the second smallest and the
    second largest of `N_ROUNDS` = 12 ratios lies the median one with 99.4%, whatever their distribution: the chance
    of fewer than two on one side is 2 (1 + 12) / 2**12.

    Returns:
        The ratio of the medians of each round, model over baseline; and the model's median in milliseconds.

    Raises:
        BundleError: One of them cannot be run on the sample.
    """
    np = _need("numpy")
    rng = np.random.default_rng(0)
    ratios: list[float] = []
    times: list[float] = []
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in rng.permutation(N_ROUNDS) % 2:  # who goes first has a part in the ratio: each does, half the time
            paths = [(0, baseline), (1, model)]
            calls: dict[int, Any] = {}
            for which, path in reversed(paths) if turn else paths:
                calls[which] = _call(open_session(path, settings), sample)
            warm = max(min(_time(calls[which], 1) for _ in range(5)) for which in (0, 1))
            inner = math.ceil(_SAMPLE_NS / max(warm, 1.0))
            n_pairs = max(3, min(100, int(_ROUND_NS / max(2 * warm * inner, 1.0))))
            rows = np.empty((n_pairs, 2))
            for row, first in zip(rows, (rng.permutation(n_pairs) + turn) % 2):
                for which in (first, 1 - first):
                    row[which] = _time(calls[which], inner)
            medians = np.median(rows, axis=0)
            ratios.append(float(medians[1] / medians[0]))
            times.append(float(medians[1]) / 1e6)
    finally:
        if was_enabled:
            gc.enable()
    return ratios, sorted(times)[len(times) // 2]


def _call(session: Any, sample: Mapping[str, Any]) -> Any:
    run_samples(session, [sample])
    names = [value.name for value in session.get_outputs()]
    feed = {name: array.astype(object) if array.dtype.kind == "U" else array for name, array in sample.items()}
    return lambda: session.run(names, feed)


def _time(call: Any, count: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(count):
        call()
    return (time.perf_counter_ns() - start) / count


# ---------------------------------------------------------------------------------------------------------------------
# A new baseline
# ---------------------------------------------------------------------------------------------------------------------


def write_baseline(folder: Path, manifest: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Complete a bundle whose ``model.onnx`` is in place: golden samples, tolerances, this file, the signed manifest.

    Args:
        folder: The bundle.
        manifest: ``session`` at least, and whatever else is to be kept.
        samples: Golden inputs, name to array, in the model's order.

    Returns:
        The manifest, but for the digests of files.

    Raises:
        BundleError: The model cannot be run on the samples.
    """
    model, settings = folder / MODEL, manifest["session"]
    description = describe_model(model)
    contract = interface_of(open_session(model, settings))
    golden, tolerances = learn_tolerances(model, settings, description, samples)
    save_golden(folder / INPUTS, samples)
    save_golden(folder / OUTPUTS, golden)
    (folder / SCRIPT).write_bytes(Path(__file__).read_bytes())
    whole = {
        "schema": SCHEMA,
        **manifest,
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {**description, **contract},
        "golden": {**manifest.get("golden", {}), "n_samples": len(samples)},
        "tolerances": tolerances,
        "machine": machine_facts(),
        "versions": {
            **manifest.get("versions", {}),
            "numpy": str(_need("numpy").__version__),
            "onnxruntime": str(_need("onnxruntime").__version__),
            "python": platform.python_version(),
        },
    }
    write_manifest(folder, whole)
    return whole


def update_bundle(folder: Path, model: Path | None = None) -> list[str]:
    """Make ``model``, or the bundle's own as it is now, the baseline.

    The golden inputs stay; outputs, tolerances, signatures and ``check.py`` are made anew, in a copy that then takes
    the bundle's place. The manifest's ``history`` names the baselines before.

    Returns:
        What changed, one line each.

    Raises:
        BundleError: The golden inputs are damaged or do not fit the model, or the model cannot be run.
    """
    folder = folder.resolve()
    try:
        bundle, result = Bundle.open(folder), check_bundle(folder, model, latency=False)
    except ManifestChangedError:
        bundle, result = Bundle._open(folder, must_be_signed=False), None  # noqa: SLF001  our own, for this alone
    items = [item for item in result.items if item.outcome == "failed"] if result else []
    if any(item.file == INPUTS for item in items):
        raise BundleError(
            f"{INPUTS} is damaged, and a baseline cannot be made without it",
            where=str(folder / INPUTS),
            fix="restore it from version control, or make the bundle anew: onnxshrink run",
        )
    before, samples = bundle.manifest, bundle.golden(INPUTS)
    fresh, old = _aside(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(folder, fresh, copy_function=shutil.copyfile)  # what may not be written there can be here
    try:
        if model is not None and model.resolve() != folder / MODEL:
            _replace_model(fresh, model, before["model"]["external"])
        same = describe_model(fresh / MODEL)["sha256"] == before["model"]["sha256"]
        kept = before if same else {**before, "metrics": [], "config": None, "latency": None}
        event = {"since": before["since"], "sha256": before["model"]["sha256"]}
        write_baseline(fresh, {**kept, "history": [*(before.get("history") or ()), event]}, samples)
        folder.rename(old)
        try:
            fresh.rename(folder)
        except OSError:
            old.rename(folder)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    now = Bundle.open(folder).manifest
    changes = [f"{item.name}: {item.reason}" for item in items]
    if result is None:
        changes.insert(0, "manifest: it had been changed by hand, and is signed anew")
    if before["model"]["sha256"] != now["model"]["sha256"]:
        changes.insert(0, f"model: {before['model']['sha256'][:12]} -> {now['model']['sha256'][:12]}")
    for name, limits in now["tolerances"].items():
        was = before["tolerances"].get(name, {}).get("max_abs")
        if was != limits["max_abs"]:
            changes.append(
                f"tolerance {name}: {was:.3g} -> {limits['max_abs']:.3g}" if was else f"tolerance {name}: new"
            )
    return changes


def _aside(folder: Path) -> tuple[Path, Path]:
    """Where an update makes the new bundle, and where the old one lies while both are exchanged."""
    folder = folder.resolve()
    return folder.parent / f".{folder.name}.new", folder.parent / f".{folder.name}.old"


def take_back(folder: Path) -> None:
    """Put the bundle back in its place if an update was killed while it exchanged both."""
    old = _aside(folder)[1]
    if old.is_dir() and not folder.exists():
        with contextlib.suppress(FileNotFoundError):  # another process has just done so
            old.rename(folder.resolve())


def _replace_model(folder: Path, model: Path, external: Sequence[str]) -> None:
    """Put a model and its external data in the place of a bundle's."""
    description = describe_model(model)
    if {MANIFEST, INPUTS, OUTPUTS, SCRIPT, MODEL} & set(description["external"]):
        raise BundleError(
            "the model's external data cannot lie in a bundle",
            where=str(model),
            got=", ".join(description["external"]),
            fix="save it with one data file beside it, such as model.onnx.data",
        )
    for name in external:
        (folder / name).unlink(missing_ok=True)
    for name in description["external"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.parent / name, folder / name)
    shutil.copyfile(model, folder / MODEL)


# ---------------------------------------------------------------------------------------------------------------------
# How it is told
# ---------------------------------------------------------------------------------------------------------------------


def to_text(result: Result) -> str:
    """The result for people: every item that did not pass, and how many did."""
    shown = [item for item in result.items if item.outcome in ("failed", "inconclusive")]
    rows = [f"  {item.outcome:<12} {item.name:<28} {item.reason}" for item in shown]
    passed = sum(item.outcome == "passed" for item in result.items)
    skipped = [f"{item.name} ({item.reason})" for item in result.items if item.outcome == "skipped"]
    rows.append(f"  {passed} of {len(result.items)} passed" + (f"; skipped: {', '.join(skipped)}" if skipped else ""))
    head = f"{result.outcome}  {result.model}  against {result.bundle}, the baseline since {result.since}"
    return "\n".join([head, *rows]) + "\n"


def to_json(result: Result) -> str:
    """The result as JSON."""
    return json.dumps({"schema": SCHEMA, **asdict(result)}, indent=2, allow_nan=False) + "\n"


def to_junit(result: Result) -> str:
    """The result as JUnit XML, one test case for each item; inconclusive counts as skipped.

    Source: the schema of Apache Ant's JUnit task, as Jenkins and GitLab read it.
    """
    outcomes = Counter(item.outcome for item in result.items)
    counts = {
        "name": "onnxshrink check",
        "tests": str(len(result.items)),
        "failures": str(outcomes["failed"]),
        "errors": "0",
        "skipped": str(outcomes["skipped"] + outcomes["inconclusive"]),
        "time": f"{result.seconds:.3f}",
    }
    total = {name: value for name, value in counts.items() if name != "skipped"}  # Jenkins' schema has it in no root
    root = ET.Element("testsuites", total)
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    suite = ET.SubElement(root, "testsuite", {**counts, "timestamp": stamp, "hostname": platform.node() or "localhost"})
    for item in result.items:
        names = {"classname": _clean(f"onnxshrink.{Path(result.bundle).name}"), "name": _clean(item.name)}
        case = ET.SubElement(suite, "testcase", {**names, "time": "0.000"})
        if item.outcome == "failed":
            failure = ET.SubElement(case, "failure", {"message": _clean(item.reason), "type": item.rule})
            failure.text = _clean(f"{item.reason}\nbaseline since {item.baseline}")
        elif item.outcome != "passed":
            ET.SubElement(case, "skipped", {"message": _clean(f"{item.outcome}: {item.reason}")})
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    """Text less the control characters that XML does not have."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def to_sarif(result: Result) -> str:
    """What failed, or could not be told, as SARIF: code scanning shows it at the file it is about.

    Source: OASIS, "Static Analysis Results Interchange Format (SARIF) Version 2.1.0".
    """
    shown = [item for item in result.items if item.outcome in ("failed", "inconclusive")]
    rules = [
        {"id": name, "shortDescription": {"text": f"{name} against the baseline"}}
        for name in sorted({item.rule for item in shown})
    ]
    results = [
        {
            "ruleId": item.rule,
            "level": "error" if item.outcome == "failed" else "warning",
            "message": {"text": f"{item.name}: {item.reason} (baseline since {item.baseline})"},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": _about(result, item)},
                        "region": {"startLine": 1},
                    }
                }
            ],
        }
        for item in shown
    ]
    driver = {"name": "onnxshrink check", "version": str(SCHEMA), "rules": rules}
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
    return json.dumps(log, indent=2) + "\n"


def _about(result: Result, item: Item) -> str:
    """URI of the file that an item is about: a relative reference as it was named, ``file:`` where it is absolute."""
    path = Path(result.bundle, item.file) if item.file else Path(result.model)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix(), errors="replace")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def run_check(
    folder: Path,
    model: Path | None = None,
    *,
    as_json: bool = False,
    junit: Path | None = None,
    sarif: Path | None = None,
    update: bool = False,
    latency: bool | None = None,
    behaviour_only: bool = False,
    quiet: bool = False,
) -> int:
    """Check, or accept a new baseline, and tell; returns the exit status."""
    try:
        if update:
            changes = update_bundle(folder, model)
            said = json.dumps({"updated": str(folder), "changes": changes}, indent=2) if as_json else ""
            _say(said or "\n".join([f"updated  {folder}", *map("  {}".format, changes)]))
            return 0
        result = check_bundle(folder, model, latency=latency, behaviour_only=behaviour_only)
        for path, text in ((junit, to_junit), (sarif, to_sarif)):
            if path is not None:
                path.write_text(text(result), encoding="utf-8")
    except (BundleError, OSError) as error:
        e = error if isinstance(error, BundleError) else _unwritable(error)
        if as_json:
            told = {name: getattr(e, name) for name in ("what", "where", "got", "want", "fix")}
            _say(json.dumps({"error": {"kind": "BundleError", **told}}, indent=2))
        _say(f"error: {e}", sys.stderr)
        return e.exit_code
    if as_json or not quiet:
        _say(to_json(result) if as_json else to_text(result))
    return result.exit_code


def _say(text: str, stream: Any = None) -> None:
    """Print, with what the terminal has no character for written as its number: a tensor may be called anything."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    stream.write(text.rstrip("\n").encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _unwritable(error: OSError) -> BundleError:
    return BundleError(
        f"a file cannot be read or written: {error.strerror or error}",
        where=str(error.filename or "") or None,
        fix="check the path and its permissions",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this file."""
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog=SCRIPT, description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, help="the bundle; by default the folder of this file")
    parser.add_argument("model", nargs="?", type=Path, help="the model in question; by default the bundle's own")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    parser.add_argument("--junit", type=Path, metavar="OUT.xml", help="write the result as JUnit XML")
    parser.add_argument("--sarif", type=Path, metavar="OUT.sarif", help="write what failed as SARIF 2.1.0")
    parser.add_argument("--update", action="store_true", help="make the model the baseline, and say what changed")
    parser.add_argument("--behaviour-only", action="store_true", help="let the opset, operators and weights differ")
    parser.add_argument("--latency", action="store_true", default=None, help="time the model on any machine")
    parser.add_argument("--no-latency", action="store_false", dest="latency", help="time nothing")
    given = parser.parse_args(arguments)
    folder, model = given.bundle, given.model
    if (
        folder is not None
        and model is None
        and (folder.is_file() or (folder.suffix == ".onnx" and not folder.is_dir()))
    ):
        folder, model = None, folder
    return run_check(
        folder or Path(__file__).parent,
        model,
        as_json=given.json,
        junit=given.junit,
        sarif=given.sarif,
        update=given.update,
        latency=given.latency,
        behaviour_only=given.behaviour_only,
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # noqa: BLE001  anything else is our bug, and the traceback is what a report of it needs
        traceback.print_exc()
        sys.stderr.write("\nthis is a bug in onnxshrink: please report it with the lines above\n")
        sys.exit(3)
