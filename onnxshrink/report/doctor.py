"""What is here and what it means: the command ``doctor``."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from onnxshrink.core.errors import ConfigError
from onnxshrink.core.machine import machine, versions
from onnxshrink.report.labelled import labelled
from onnxshrink.report.terminal import format_bytes
from onnxshrink.runtime.installation import (
    Finding,
    Library,
    Loaded,
    find_conflicts,
    missing_extras,
    try_libraries,
    try_providers,
    wheels_of,
)
from onnxshrink.runtime.isa import detect_isa, resolve_scheme
from onnxshrink.runtime.limits import Limits, find_limits

_LITTLE_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        python: Its version.
        machine: Processor, features and system; see `onnxshrink.core.machine.machine`.
        versions: Package to version, of those that a result depends on.
        wheels: Packages that hold the module onnxruntime.
        libraries: Modules that were tried.
        providers: Execution providers that were tried; empty where onnx or onnxruntime does not load.
        isa: Instruction set as far as int8 is concerned, or None where it is not known.
        int8: What that means for int8, one sentence each.
        limits: Cores, memory and disk.
        missing_extras: Extra to what it would allow.
        findings: What is known to go wrong, and what may.
    """

    python: str
    machine: dict[str, Any]
    versions: dict[str, str]
    wheels: tuple[str, ...]
    libraries: tuple[Library, ...]
    providers: tuple[Loaded, ...]
    isa: str | None
    int8: tuple[str, ...]
    limits: Limits
    missing_extras: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def is_fine(self) -> bool:
        """Nothing that was found is known to go wrong."""
        return not any(finding.level == "bad" for finding in self.findings)

    @property
    def exit_status(self) -> int:
        """0, or 1 with something that is known to go wrong."""
        return 0 if self.is_fine else 1

    def to_json(self) -> str:
        """Everything as JSON text."""
        document = asdict(self) | {"is_fine": self.is_fine}
        document["limits"]["threads"] = self.limits.threads
        return json.dumps(document, indent=2, allow_nan=False) + "\n"


def diagnose(store: Path = Path("runs")) -> Diagnosis:
    """Look at this installation and this machine; takes some seconds, because every library is really loaded.

    Args:
        store: Where runs and the store would lie.
    """
    libraries, wheels = try_libraries(), wheels_of()
    works = all(library.error is None for library in libraries if library.name in {"onnx", "onnxruntime", "numpy"})
    limits = find_limits(store)
    isa, int8 = _int8()
    return Diagnosis(
        python=platform.python_version(),
        machine=machine(),
        versions=versions(),
        wheels=wheels,
        libraries=libraries,
        providers=try_providers() if works else (),
        isa=isa,
        int8=int8,
        limits=limits,
        missing_extras=missing_extras(),
        findings=(*find_conflicts(libraries, wheels), *scarce(limits)),
    )


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """Print it in 80 columns; what is wrong comes last, where it is read."""
    console.print(labelled(*_rows(found)))
    console.print()
    for finding in found.findings:
        level = Text(finding.level, "red" if finding.level == "bad" else "yellow")
        console.print(labelled((level, finding.what), ("fix", finding.fix), ("source", Text(finding.source, "dim"))))
        console.print()
    n_bad = sum(finding.level == "bad" for finding in found.findings)
    n_notes = len(found.findings) - n_bad
    if n_bad:
        console.print(Text(f"{_counted(n_bad, 'known problem')}", style="bold red"))
    elif n_notes:
        console.print(Text(f"no known problem; {_counted(n_notes, 'note')} above: what may go wrong", style="yellow"))
    else:
        console.print(Text("nothing here is known to go wrong", style="bold green"))


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _rows(found: Diagnosis) -> Iterator[tuple[str, Text]]:
    yield "python", Text(f"{found.python}, {found.machine['system']}")
    for library in found.libraries:
        version = library.version or "not installed"
        told = Text(version if library.error is None else f"{version}: {library.error}")
        told.stylize("red" if library.error else "")
        yield library.name, told
    others = {
        name: version for name, version in found.versions.items() if name not in {x.name for x in found.libraries}
    }
    yield "others", Text(", ".join(f"{name} {version}" for name, version in others.items()))
    for provider in found.providers:
        if provider.built_in:
            yield "provider", Text(f"{provider.provider}: {'loads' if provider.loads else provider.why}")
    absent = [provider for provider in found.providers if not provider.built_in]
    for provider in absent:
        if not provider.why.startswith("no package"):
            yield "absent", Text(f"{provider.provider}: {provider.why}", style="dim")
    built = [provider.provider for provider in absent if provider.why.startswith("no package")]
    if built:
        yield "absent", Text(f"{', '.join(built)}: no package on PyPI has them", style="dim")
    features = ", ".join(found.machine["features"]) or "features unknown"
    yield "processor", Text(f"{found.machine['processor']} ({found.machine['architecture']}; {features})")
    for sentence in found.int8:
        yield "int8", Text(sentence)
    yield from _room(found.limits)
    for extra, allows in found.missing_extras.items():
        yield "extra", Text(f"{extra} is not installed; it would {allows}", style="dim")


def _room(limits: Limits) -> Iterator[tuple[str, Text]]:
    quota = f", a container grants {limits.quota_cores:g}" if limits.quota_cores is not None else ""
    load = f"; load {limits.load:g}" if limits.load is not None else ""
    yield "cores", Text(f"{limits.usable_cores} of {limits.cores} usable{quota}: up to {limits.threads} threads{load}")
    free = "" if limits.free_memory_bytes is None else f"{format_bytes(limits.free_memory_bytes)} free of "
    limit = (
        "" if limits.memory_limit_bytes is None else f", a container grants {format_bytes(limits.memory_limit_bytes)}"
    )
    yield "memory", Text(f"{free}{format_bytes(limits.memory_bytes)}{limit}")
    yield "disk", Text(f"{format_bytes(limits.disk_free_bytes)} free at {limits.disk}")


def _int8() -> tuple[str | None, tuple[str, ...]]:
    try:
        isa = detect_isa()
    except ConfigError as e:
        return None, (e.what,)
    scheme = resolve_scheme(isa)
    return isa, (f"{isa}: `types: auto` is {scheme.types}", *scheme.reasons)


def scarce(limits: Limits) -> Iterator[Finding]:
    """What there is little of: notes, since other work can end and disks can be emptied."""
    if limits.disk_free_bytes < _LITTLE_BYTES:
        yield Finding(
            "note",
            f"{format_bytes(limits.disk_free_bytes)} are free at {limits.disk}; the store keeps every stage's model",
            "free some, or keep it elsewhere: --runs FOLDER",
            "df",
        )
    if limits.free_memory_bytes is not None and limits.free_memory_bytes < _LITTLE_BYTES:
        yield Finding(
            "note", f"{format_bytes(limits.free_memory_bytes)} of memory are free", "end other programs", "free -h"
        )
    if limits.load is not None and limits.load > limits.threads / 2:
        yield Finding(
            "note",
            f"other processes keep the cores busy (load {limits.load:g} on {limits.threads})",
            "measure latency on a quiet machine",
            "uptime",
        )
