"""Files that a person names: there before any work, or refused with the nearest name."""

from __future__ import annotations

from pathlib import Path

from onnxshrink.core.errors import ConfigError
from onnxshrink.core.tensors import did_you_mean


def require_files(**files: Path) -> None:
    """Refuse files that are not there.

    Args:
        files: What each is to the user, such as ``model`` or ``eval_data``, and its path.

    Raises:
        ConfigError: The first that is no file, with the name in its folder that is nearest.
    """
    for name, path in files.items():
        if not path.is_file():
            beside = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
            raise ConfigError(
                f"there is no file {path}",
                where=name,
                got="a folder" if path.is_dir() else "nothing",
                want="data.npz" if "data" in name else "model.onnx",
                fix=did_you_mean(path.name, beside) or "check the spelling; relative paths start at the working folder",
            )
