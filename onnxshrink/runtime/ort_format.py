"""ONNX Runtime's own file format, for builds of it that cannot read ONNX: phones, browsers, small devices.

Source: ONNX Runtime, "ORT model format" and onnxruntime.tools.convert_onnx_models_to_ort, which is no function to call:
it takes its level from the environment and prints. The session options here are those that it sets, and the list of
operators is written by its own code. ONNX Runtime leaves the order of some tables in a file to chance: equal models
give files of equal content and size, not of equal bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnxruntime.tools.ort_format_model import create_config_from_models

from onnxshrink.config.stages import OrtLevel, OrtPlatform, OrtStyle
from onnxshrink.runtime.quiet import quiet
from onnxshrink.runtime.session import Session

ORT_FILES: Mapping[OrtStyle, str] = {"fixed": "model.ort", "runtime": "model.with_runtime_opt.ort"}
"""File name of each style, beside ``model.onnx``."""

REPLAY = {"session.enable_saved_runtime_optimizations": "1"}
"""What a session needs in order to apply the optimizations that a file of style ``runtime`` brings; without it, it runs
the basic graph. ONNX Runtime asks for it since they act on the graph unchecked: only files that one trusts."""

_MODE = "optimization.minimal_build_optimizations"


@dataclass(frozen=True, slots=True)
class OrtConversion:
    """How a model is written.

    Attributes:
        level: Highest level of the optimizations that are applied, or noted for later.
        platform: ``arm`` keeps signed activations, which other processors multiply slowly.
    """

    level: OrtLevel = "extended"
    platform: OrtPlatform = "any"

    def write(self, model: Path, out: Path, style: OrtStyle) -> None:
        """Optimize an ``.onnx`` file and write it as an ``.ort`` file, weights included.

        Raises:
            ModelError: ONNX Runtime cannot load the model, or cannot write it in this format.
        """
        self._optimized(
            model, out, {"session.save_model_format": "ORT"} | ({_MODE: "save"} if style == "runtime" else {})
        )

    def session(self, model: Path, style: OrtStyle) -> Session:
        """A session on the ``.onnx`` file with the optimizations that the ``.ort`` file of that style holds."""
        return self._optimized(model, None, {_MODE: "apply"} if style == "runtime" else {})

    def graph(self, model: Path, style: OrtStyle) -> onnx.ModelProto:
        """The nodes that the ``.ort`` file of that style runs, and the weights that are in the ONNX file itself."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            aside = {"session.optimized_model_external_initializers_file_name": "weights"}
            self._optimized(model, path, aside | ({_MODE: "apply"} if style == "runtime" else {}))
            return onnx.load(str(path))

    def write_required(self, model: Path, styles: Mapping[OrtStyle, Path], out: Path, *, types: bool) -> None:
        """List the operators that a reduced build needs in order to run every file of ``styles``.

        Optimizations that are noted for later bring operators of their own, which are listed as well.

        Args:
            model: The ``.onnx`` file that they were made of.
            styles: The ``.ort`` files.
            out: The list, as ONNX Runtime's ``--include_ops_by_config`` takes it.
            types: Also list the element types that each operator needs.
        """
        with tempfile.TemporaryDirectory() as folder, quiet():
            files = list(styles.values())
            if "runtime" in styles:
                files.append(Path(folder) / "applied.ort")
                self._optimized(model, files[-1], {"session.save_model_format": "ORT", _MODE: "apply"})
            create_config_from_models(files, out, types)
        # Its first lines name the files by paths of this machine.
        lines = [line for line in out.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        heads = [f"# {file.name}" for file in styles.values()]
        out.write_text("\n".join([*heads, *lines]) + "\n", encoding="utf-8")

    def _optimized(self, model: Path, out: Path | None, config: Mapping[str, str]) -> Session:
        signed = {"session.qdqisint8allowed": str(int(self.platform == "arm"))}
        return Session(model, optimization=self.level, config={**signed, **config}, save_optimized=out)


def open_ort(path: Path, *, replay: bool = False) -> Session:
    """A session on an ``.ort`` file, on the CPU.

    Args:
        path: The file.
        replay: Apply the optimizations that it brings, see `REPLAY`.

    Raises:
        ModelError: ONNX Runtime cannot load it.
    """
    return Session(path, config=REPLAY if replay else {})


def required_operators(text: str) -> dict[tuple[str, str], int]:
    """What a list of required operators names, types left out.

    Args:
        text: Its lines: ``domain;opset;Op,Op{"inputs": …}``.

    Returns:
        Domain (the standard one as ``ai.onnx``) and operator to its opset version, sorted.
    """
    found: dict[tuple[str, str], int] = {}
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        domain, opset, operators = line.split(";", 2)
        found |= {(domain, name): int(opset) for name in _names(operators)}
    return dict(sorted(found.items()))


def _names(operators: str) -> list[str]:
    """The names of ``Add,Conv{"inputs": {"0": ["float"]}},Relu``: what stands outside of all braces."""
    depth, outside = 0, []
    for character in operators:
        depth += (character == "{") - (character == "}")
        if depth == 0 and character != "}":
            outside.append(character)
    return [name for name in "".join(outside).split(",") if name]
