"""Half-done trainings: written whole or not at all, and gone on from only by the training that wrote them.

```
<folder>/<part>-<step>-<sha256>.pt    tensors and plain values: no pickle is run to read them
```
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onnxshrink.core.artifact import digest_file
from onnxshrink.core.events import Events


class Checkpoints:
    """The checkpoints of one training. What cannot be used is warned of and ignored: it costs time, never the result.

    Args:
        folder: Where they lie, made when the first is written; None keeps none.
        part: The training's name in the folder.
        identity: Plain JSON; only a checkpoint with the same is gone on from.
        events: Listener for warnings.
    """

    def __init__(self, folder: Path | None, part: str, identity: Mapping[str, Any], events: Events) -> None:
        self._folder = folder
        self._part = part
        self._identity = json.dumps(identity, sort_keys=True)
        self._events = events

    def load(self) -> dict[str, Any] | None:
        """The newest that can be used, its tensors on the CPU; what was left half-written is removed."""
        if self._folder is None:
            return None
        for path in self._folder.glob("*.part"):
            path.unlink(missing_ok=True)
        for path in reversed(self._files()):
            state = self._read(path)
            if state is not None:
                return state
        return None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write ``state``, then remove what is older.

        Args:
            step: How far the training is.
            state: Tensors, numbers, strings and None, in lists, tuples and dicts.
        """
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._write(self._folder, step, {**state, "identity": self._identity})
            for older in self._files():
                if older != path:
                    older.unlink(missing_ok=True)
        except (OSError, RuntimeError) as e:  # torch tells a full disk as a RuntimeError
            reason = str(e).partition("\n")[0]
            self._events.warned(f"no checkpoint was written, and a killed run would start again: {reason}")

    def _write(self, folder: Path, step: int, state: dict[str, Any]) -> Path:
        handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
        unfinished = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            # torch does not look at the checksums in its files: the name holds one.
            path = folder / f"{self._part}-{step:09d}-{digest_file(unfinished)}.pt"
            return unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """This part's, the newest last."""
        assert self._folder is not None  # noqa: S101  # asked by `load` and `save` only
        return sorted(path for path in self._folder.glob("*.pt") if path.stem.rsplit("-", 2)[0] == self._part)

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            intact = digest_file(path) == path.stem.rpartition("-")[2]
            state = torch.load(path, map_location="cpu", weights_only=True) if intact else None
        except Exception:  # noqa: BLE001  # torch raises UnpicklingError, RuntimeError, EOFError, KeyError and more
            state = None
        if not isinstance(state, dict):
            self._events.warned(f"{path.name} is damaged: the training does not go on from it")
            return None
        if state.get("identity") != self._identity:
            self._events.warned(f"{path.name} is of another training: this one does not go on from it")
            return None
        return state


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its name, those that no state dict holds as well; not copied."""
    return {
        **{name: parameter.detach() for name, parameter in network.named_parameters()},
        **{name: buffer.detach() for name, buffer in network.named_buffers()},
    }


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    """`tensors_of`, copied to the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors_of(network).items()}


@torch.no_grad()
def restore(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `tensors_of` gave."""
    own = tensors_of(network)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
