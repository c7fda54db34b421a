"""What an ONNX file is, and what of it runs in integers: the command ``inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxshrink.config.data import NpzData
from onnxshrink.config.gates import Target
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.reader import open_reader
from onnxshrink.report.terminal import format_bytes
from onnxshrink.runtime.graph import input_specs, load_model, opset_of, output_specs, quantized_op_types
from onnxshrink.runtime.session import Optimization
from onnxshrink.verify.coverage import Coverage, audit
from onnxshrink.verify.footprint import measure_footprint
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

    def to_json(self) -> str:
        """Everything as JSON text, with the coverage's ratio and each island's cause in words."""
        document: dict[str, Any] = asdict(self)
        document["coverage"] |= {"integer_coverage": self.coverage.ratio, "macs": self.coverage.macs}
        document["coverage"]["segments"] = segment_details(self.coverage.segments)
        for island, row in zip(self.coverage.islands, document["coverage"]["islands"], strict=True):
            row |= {"cause": island.cause, "change": island.change}
        return json.dumps(document, indent=2, allow_nan=False) + "\n"


def inspect_model(
    path: Path, target: Target | None = None, *, data: Path | None = None, optimization: Optimization = "all"
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
    for name, file in (("model", path), ("data", data)):
        if file is not None and not file.is_file():
            raise ConfigError(f"there is no file {file}", where=name)
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
    )


def print_inspection(found: Inspection, console: Console) -> None:
    """Print it in 80 columns: the file, the share that runs in integers, and each float island."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _facts(found):
        table.add_row(label, Text(text))
    console.print(table)
    coverage = found.coverage
    for place, island in enumerate(coverage.islands[:_SHOWN]):
        share = f"{island.macs / coverage.macs:.1%} of the MACs" if coverage.macs else "no MACs"
        more = f" and {len(island.nodes) - 1} more" if len(island.nodes) > 1 else ""
        console.print()
        console.print(Text.assemble((f"float {place + 1}", "yellow"), f"  {share}: {island.main_node!r}{more}"))
        details = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
        details.add_column(style="dim", no_wrap=True)
        details.add_column(overflow="fold")
        for cause in island.causes:
            details.add_row("cause", Text(cause.text))
            details.add_row("change", Text(cause.change))
        console.print(details)
    if len(coverage.islands) > _SHOWN:
        console.print(f"\nand {len(coverage.islands) - _SHOWN} smaller float islands; --json has them all")


def _facts(found: Inspection) -> list[tuple[str, str]]:
    coverage = found.coverage
    share = "the model has no multiply-accumulates" if coverage.ratio is None else f"{coverage.ratio:.1%}"
    islands = len(coverage.islands)
    n_islands = f"{islands or 'no'} float island{'' if islands == 1 else 's'}"
    return [
        ("model", found.model),
        ("opset", str(found.opset)),
        ("size", f"{format_bytes(found.size_bytes)}, {found.parameters:,} parameters"),
        *(("input", str(spec)) for spec in found.inputs),
        *(("output", str(spec)) for spec in found.outputs),
        ("quantized", ", ".join(found.quantized_op_types) or "nothing"),
        ("session", f"{found.target}, optimization {found.optimization!r}"),
        ("integer", f"{share} of {coverage.macs:,} multiply-accumulates; {n_islands}"),
    ]
