"""``onnxshrink explain``: say which nodes make a candidate differ, and why."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxshrink.commands.flags import in_flags
from onnxshrink.commands.options import AsJson, Quiet, listening

if TYPE_CHECKING:
    from onnxshrink.config.stages import Isa


class IsaChoice(StrEnum):
    """Choices of ``--isa``."""

    auto = "auto"
    x86_vnni = "x86_vnni"
    x86_avx2 = "x86_avx2"
    arm64 = "arm64"


def explain(
    reference: Annotated[Path, typer.Argument(help="The float model.")],
    candidate: Annotated[Path, typer.Argument(help="The same network quantized, in float16, or rewritten.")],
    data: Annotated[Path, typer.Option(help="Samples: an .npz of the models' inputs.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the stage that would mend it, if any, to this YAML file.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Show at most this many nodes.")] = 12,
    max_samples: Annotated[int, typer.Option(min=1, help="Use at most this many samples, the first ones.")] = 32,
    max_memory: Annotated[
        int, typer.Option(min=1, help="Megabytes that the tensors looked at together may take.")
    ] = 256,
    isa: Annotated[IsaChoice, typer.Option(help="Processor the candidate is for; auto is this one.")] = IsaChoice.auto,
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say which nodes make a candidate differ from its reference, why, and which settings would mend it."""
    from onnxshrink.core.store import require_output, write_atomically
    from onnxshrink.report.explanation import print_explanation
    from onnxshrink.verify.explain import explain as explain_files

    isas: dict[str, Isa | None] = {"auto": None, "x86_vnni": "x86_vnni", "x86_avx2": "x86_avx2", "arm64": "arm64"}
    if out is not None:
        require_output(out, reference, candidate, data)
    with in_flags(explain), listening(quiet=quiet, as_json=as_json) as (events, console):
        found = explain_files(
            reference,
            candidate,
            data,
            max_samples=max_samples,
            max_bytes=max_memory * 1_000_000,
            isa=isas[isa.value],
            events=events,
        )
    if out is not None and found.patch:
        write_atomically(out, found.to_yaml().encode())
    elif out is not None:  # for --json as well, whose reader would look for the file
        typer.echo(f"no settings would mend it: {out} is not written", err=True)
    if as_json:
        sys.stdout.write(found.to_json())
        return
    print_explanation(found, console, top=top)
    if out is not None and found.patch:
        console.print(f"  stage  {out}", highlight=False, soft_wrap=True, markup=False)
