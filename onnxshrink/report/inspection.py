"""What an ONNX file is, and what of it runs in integers: the command ``inspect``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxshrink.config.data import NpzData
from onnxshrink.config.gates import Target
from onnxshrink.core.files import require_files
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.reader import open_reader
from onnxshrink.report.labelled import labelled
from onnxshrink.report.terminal import format_bytes
from onnxshrink.runtime.contents import Contents, Quantization, contents_of, quantization_of
from onnxshrink.runtime.graph import input_specs, load_model, opset_of, output_specs, quantized_op_types
from onnxshrink.runtime.mobile import MobileUsability, mobile_usability
from onnxshrink.runtime.session import Optimization
from onnxshrink.verify.coverage import Coverage, audit
from onnxshrink.verify.footprint import measure_footprint
from onnxshrink.verify.readiness import Hindrance, find_hindrances
from onnxshrink.verify.segments import segment_details

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Inspection:
    """An ONNX model as its file and a session on it show it.

    Attributes:
        model: Path of the file.
        target: Where the session ran.
        optimization: Its level.
        opset: Version of the default operator set.
        size_bytes: The file, external data included.
        parameters: Elements of the initializers.
        inputs: The model's inputs.
        outputs: The model's outputs.
        quantized_op_types: Operators of the file that have to do with quantized numbers; empty for a float model.
        coverage: What runs in integers.
        contents: Operators, and where the bytes lie.
        quantization: What of it is quantized already, and how.
        hindrances: What would keep it from quantizing well.
        mobile: What phones' accelerators would make of it.
    """

    model: str
    target: str
    optimization: Optimization
    opset: int
    size_bytes: int
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantized_op_types: tuple[str, ...]
    coverage: Coverage
    contents: Contents
    quantization: Quantization
    hindrances: tuple[Hindrance, ...]
    mobile: tuple[MobileUsability, ...]

    def to_json(self) -> str:
        """Everything as JSON text, with the coverage's ratio and each island's cause in words."""
        document: dict[str, Any] = asdict(self)
        document["coverage"] |= {"integer_coverage": self.coverage.ratio, "macs": self.coverage.macs}
        document["coverage"]["segments"] = segment_details(self.coverage.segments)
        for island, row in zip(self.coverage.islands, document["coverage"]["islands"], strict=True):
            row |= {"cause": island.cause, "change": island.change}
        return json.dumps(document, indent=2, allow_nan=False) + "\n"


def inspect_model(
    path: str | Path,
    target: Target | None = None,
    *,
    data: str | Path | None = None,
    optimization: Optimization = "all",
) -> Inspection:
    """Look at an ONNX file and at what ONNX Runtime makes of it.

    Args:
        path: The ``.onnx`` file.
        target: Where it runs; the CPU by default.
        data: An ``.npz`` whose first sample gives dynamic axes their lengths; seeded noise by default.
        optimization: Level of the session that is looked at.

    Raises:
        ConfigError: A file is not there.
        DataError: The samples do not fit the model.
        ModelError: The model cannot be read, loaded or run.
        ProviderError: The target's provider is not there.
    """
    path, data = Path(path), None if data is None else Path(data)
    require_files(model=path, **({"data": data} if data else {}))
    target = target or Target()
    model = load_model(path)
    inputs = input_specs(model)
    batch = None
    if data is not None:
        batch = next(iter(open_reader(NpzData.model_validate({"npz": data}), inputs, batch_size=1)))
    sizes = {metric.name: int(metric.value or 0) for metric in measure_footprint(path)}
    return Inspection(
        model=str(path),
        target=target.name,
        optimization=optimization,
        opset=opset_of(model),
        size_bytes=sizes["size_bytes"],
        parameters=sizes["parameters"],
        inputs=inputs,
        outputs=output_specs(model),
        quantized_op_types=quantized_op_types(model),
        coverage=audit(path, target, batch=batch, optimization=optimization),
        contents=contents_of(model),
        quantization=quantization_of(model),
        hindrances=find_hindrances(model, inputs),
        mobile=mobile_usability(path),
    )


def print_inspection(found: Inspection, console: Console) -> None:
    """Print it in 80 columns: the file, the share that runs in integers, and each float island."""
    console.print(labelled(*_facts(found)))
    _print_largest(found, console)
    for hindrance in found.hindrances:
        console.print()
        console.print(labelled((Text("hinders", "yellow"), hindrance.what), ("change", hindrance.fix)))
    coverage = found.coverage
    for place, island in enumerate(coverage.islands[:_SHOWN]):
        share = f"{island.macs / coverage.macs:.1%} of the MACs" if coverage.macs else "no MACs"
        more = f" and {len(island.nodes) - 1} more" if len(island.nodes) > 1 else ""
        console.print()
        console.print(Text.assemble((f"float {place + 1}", "yellow"), f"  {share}: {island.main_node!r}{more}"))
        causes = [row for cause in island.causes for row in (("cause", cause.text), ("change", cause.change))]
        console.print(labelled(*causes, indent=2))
    if len(coverage.islands) > _SHOWN:
        console.print(f"\nand {len(coverage.islands) - _SHOWN} smaller float islands; --json has them all")


def _print_largest(found: Inspection, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("largest initializers", overflow="fold", max_width=max(20, console.width - 48))
    for header in ("dtype", "shape", "of", "size"):
        table.add_column(header, justify="right" if header == "size" else "left", no_wrap=True)
    for stored in found.contents.largest:
        shape = ",".join(map(str, stored.shape)) or "scalar"
        table.add_row(Text(stored.name), stored.dtype, shape, stored.op_type, format_bytes(stored.size_bytes))
    if found.contents.largest:
        console.print()
        console.print(table)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    coverage = found.coverage
    share = "the model has no multiply-accumulates" if coverage.ratio is None else f"{coverage.ratio:.1%}"
    others = {name: version for name, version in found.contents.opsets.items() if name != "ai.onnx"}
    islands = len(coverage.islands)
    n_islands = f"{islands or 'no'} float island{'' if islands == 1 else 's'}"
    return [
        ("model", found.model),
        ("opset", ", ".join([str(found.opset), *(f"{name} {n}" for name, n in others.items())])),
        ("written by", f"{found.contents.producer or 'unknown'}, IR version {found.contents.ir_version}"),
        ("size", f"{format_bytes(found.size_bytes)}, {found.parameters:,} parameters"),
        *(("input", str(spec)) for spec in found.inputs),
        *(("output", str(spec)) for spec in found.outputs),
        ("operators", _first(found.contents.op_types, str)),
        ("bytes", _first(found.contents.bytes_by_op_type, format_bytes)),
        ("", _first(found.contents.bytes_by_dtype, format_bytes)),
        ("quantized", _quantized(found)),
        ("session", f"{found.target}, optimization {found.optimization!r}"),
        ("integer", f"{share} of {coverage.macs:,} multiply-accumulates; {n_islands}"),
        *(("phone", _phone(usability)) for usability in found.mobile),
    ]


def _first(counts: Mapping[str, int], written: Callable[[int], str]) -> str:
    """``Conv 13.4 MB, Gemm 5.1 MB``: the largest of them."""
    shown = [f"{name} {written(count)}" for name, count in list(counts.items())[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else "") or "nothing"


def _quantized(found: Inspection) -> str:
    """How, in words; the operators that show it."""
    quantization = found.quantization
    if not quantization.formats:
        return ", ".join(found.quantized_op_types) or "nothing"
    weights = ", ".join(f"{count} weights {form}" for form, count in quantization.weights.items())
    activations = ", ".join(f"{count} activations {dtype}" for dtype, count in quantization.activations.items())
    parts = ["+".join(quantization.formats), weights, activations, ", ".join(found.quantized_op_types)]
    return "; ".join(filter(None, parts))


def _phone(usability: MobileUsability) -> str:
    """``nnapi: no; yes with inputs of fixed lengths``: with what it lacks."""
    text = f"{usability.provider}: {usability.suits}"
    if usability.suits_if_fixed != usability.suits:
        text += f"; {usability.suits_if_fixed} with inputs of fixed lengths"
    if usability.unsupported_op_types:
        text += f"; it has no {', '.join(usability.unsupported_op_types[:_SHOWN])}"
    return text
