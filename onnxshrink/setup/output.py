"""Where ``onnxshrink init`` writes: never over what is no config, and over a config only when told to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from onnxshrink.core.errors import ConfigError

DEFAULT = Path("shrink.yaml")
"""The config that is written where none is named."""

_SUFFIXES = {".yaml", ".yml"}
_OTHER = "name another: onnxshrink init other.yaml"


def model_and_output(named: Path | None, model: str | None) -> tuple[str | None, Path]:
    """Tell a model from a config where only a path is given: every other command takes the model first.

    Args:
        named: The path that stands alone on the command line, if any.
        model: Of ``--model``, if given.

    Returns:
        The model, or None where nobody named one, and the config to write.

    Raises:
        ConfigError: Two models are named.
    """
    if named is None or named.suffix.lower() != ".onnx":
        return model, named or DEFAULT
    if model is not None and Path(model) != named:
        raise ConfigError(
            "two models are named",
            where="init",
            got=f"{named} and --model {model}",
            want="one model, and a config to write that ends in .yaml",
            fix=f"onnxshrink init {DEFAULT} --model {model}",
        )
    return str(named), DEFAULT


def refuse_existing(out: Path, *, force: bool, inputs: Iterable[str] = ()) -> None:
    """Refuse to write over what is there; ``force`` gives up nothing but a config.

    Args:
        out: The config to write.
        force: Write over a config that is there.
        inputs: What the config is made from; what names no file is passed over.

    Raises:
        ConfigError: There is something that must stay, or no folder to write to.
    """
    if not out.parent.is_dir():
        raise ConfigError(
            f"there is no folder {out.parent}",
            where="init",
            got="nothing",
            want="a folder",
            fix=f"mkdir -p {out.parent}",
        )
    if not out.exists():
        return
    if out.is_dir():
        raise ConfigError(f"{out} is a folder", where="init", got="a folder", want="a new file", fix=_OTHER)
    if any(file.exists() and file.samefile(out) for file in (Path(text).expanduser() for text in inputs)):
        raise ConfigError(
            f"the config would overwrite an input: {out}",
            where="init",
            got="the same file for both",
            want="a file of its own",
            fix=_OTHER,
        )
    if out.suffix.lower() not in _SUFFIXES:
        raise ConfigError(
            f"{out} is there already and is no config: it is not written over, --force or not",
            where="init",
            got=f"a file that ends in {out.suffix!r}" if out.suffix else "a file without an ending",
            want="a file that ends in .yaml or .yml",
            fix=_OTHER,
        )
    if not force:
        raise ConfigError(
            f"there is a file {out} already",
            where="init",
            got="a file",
            want="a new file",
            fix=f"{_OTHER}; or write over it: --force",
        )
