"""State dicts: read without running code from the file, and fitted to a network or refused with the reason."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import did_you_mean

_WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training scripts put the state dict
_PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile
_RESAVE = (
    "re-save it as safetensors where it was trained:\n"
    'safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, "weights.safetensors")'
)


def load_weights(network: nn.Module, path: Path) -> str | None:
    """Load a state dict into ``network``; every key and shape must fit.

    Of weights that the network ties, one name is enough: ``safetensors.torch.save_model`` drops the others.

    Returns:
        The prefix that all keys had and the network's do not, such as ``module.``; None if the keys fitted as they are.

    Raises:
        ModelError: The file cannot be read, would run code, or does not fit; keys and shapes are named.
    """
    state = read_state_dict(path)
    own = network.state_dict()
    prefix = next(
        (p for p in _PREFIXES if state and all(k.startswith(p) for k in state) and not set(state) & set(own)), ""
    )
    state = {name.removeprefix(prefix): value for name, value in state.items()}
    loaded = {_place(value) for name, value in own.items() if name in state}
    # BatchNorm's counter is no weight, and checkpoints from before torch 0.4.1 do not have it.
    missing = [
        name
        for name, value in own.items()
        if name not in state and _place(value) not in loaded and not name.endswith(".num_batches_tracked")
    ]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        near = did_you_mean(unexpected[0], missing) if unexpected and missing else None
        raise ModelError(
            "the weights do not fit the network: their names differ",
            where=str(path),
            got=f"unexpected {_some(unexpected)}" if unexpected else f"{len(state)} tensors",
            want=f"also {_some(missing)}" if missing else f"only the network's {len(own)} tensors",
            fix=f"{unexpected[0]!r}: {near}"
            if near
            else "check that `factory` and `args` build the network they were trained with",
        )
    for name, value in own.items():
        if name in state and state[name].shape != value.shape:
            raise ModelError(
                f"the weight {name!r} has a shape that does not fit the network",
                where=str(path),
                got=str(list(state[name].shape)),
                want=str(list(value.shape)),
                fix="check `args`: a size or a number of classes differs from training",
            )
    network.load_state_dict(state, strict=False)
    return prefix or None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, or of a ``.pth`` file that holds nothing but tensors.

    Raises:
        ModelError: The file cannot be read, holds something else, or would have to run code to be read.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as e:
            raise ModelError(
                f"the file cannot be read as safetensors: {e}",
                where=str(path),
                got=f"{path.stat().st_size} bytes" if path.exists() else "nothing",
                want="a state dict of safetensors.torch.save_file",
                fix="see that it was copied whole; what torch.save wrote ends in .pth or .pt",
            ) from e
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old formats and of TorchScript; what matters raises
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ModelError(
            "the file holds more than tensors, and reading it would run code from it; it was not read",
            where=str(path),
            got="a pickle with other objects",
            want="a state dict: names and tensors",
            fix=_RESAVE,
        ) from e
    except Exception as e:  # torch raises RuntimeError, EOFError, KeyError and more on damaged files
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        raise ModelError(f"the file cannot be read as torch weights: {reason}", where=str(path), fix=_RESAVE) from e
    return _state_dict(value, path)


def _state_dict(value: object, path: Path) -> dict[str, Tensor]:
    if isinstance(value, dict):
        inner = next((value[name] for name in _WRAPPERS if isinstance(value.get(name), dict)), value)
        if inner and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in inner.items()):
            return dict(inner)
        value = inner
    entry = (
        next((f"{k!r}: {type(v).__name__}" for k, v in value.items() if not isinstance(v, Tensor)), "an empty dict")
        if isinstance(value, dict)
        else type(value).__name__
    )
    raise ModelError(
        "the file holds no state dict",
        where=str(path),
        got=entry,
        want=f"names and tensors, alone or under {' or '.join(map(repr, _WRAPPERS))}",
        fix=_RESAVE,
    )


def _place(value: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are one and the same memory; different for empty tensors, which have none."""
    return (value.data_ptr(), value.shape, value.stride()) if value.numel() else (id(value),)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
