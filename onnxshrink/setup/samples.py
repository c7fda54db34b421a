"""What a user's samples are: inputs, labels, splits, and which of them can serve which purpose."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxshrink.config.data import Role
from onnxshrink.core.errors import ConfigError, DataError
from onnxshrink.core.tensors import LABELS, LIKE_LABELS, TensorSpec
from onnxshrink.data.arrays import SPLIT
from onnxshrink.data.stored import StoredArray, zipped_arrays

CALIBRATION_SAMPLES = 128
"""Samples that ranges follow from, where the data have no split of their own for that."""

# What others call the part of their samples that may serve each purpose, the likeliest first.
_NAMES: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training"),
    "calibration": ("calibration", "calib", "cal", "validation", "valid", "val", "dev", "train", "training"),
    "evaluation": ("test", "testing", "evaluation", "eval", "validation", "valid", "val", "dev"),
}
_ROWS = 1 << 14
_LOOKED_AT = 16


@dataclass(frozen=True, slots=True)
class Samples:
    """What was found.

    Attributes:
        roles: Purpose to the settings that the config has for it, paths as they were given.
        arrays: Arrays that are neither labels nor split, with a batch axis of any length; empty where only the model
            tells what its inputs are.
        metric: Task metric that suits the labels; None without any.
        notes: What a person should know of them, one fact each.
    """

    roles: Mapping[Role, Mapping[str, Any]]
    arrays: tuple[TensorSpec, ...]
    metric: str | None
    notes: tuple[str, ...]

    @property
    def is_shared(self) -> bool:
        """What is calibrated on is measured on as well."""
        return _SAME in self.notes


def look_at_samples(given: str, held_out: str | None = None) -> Samples:
    """Find out what samples are, and divide them among the purposes.

    Args:
        given: An ``.npz`` file, a folder of images, or ``package.module:callable``.
        held_out: The same, for evaluation alone.

    Raises:
        ConfigError: It is none of these.
        DataError: It cannot be read.
    """
    found = _look(given)
    if held_out is None or Path(held_out).expanduser() == Path(given).expanduser():
        return found
    other = _look(held_out)
    evaluation = {name: value for name, value in other.roles["evaluation"].items() if name != "max_samples"}
    notes = [*found.notes, *(f"to measure on: {note}" for note in other.notes)]
    told = tuple(note for note in notes if not note.endswith(_SAME))
    return Samples({**found.roles, "evaluation": evaluation}, found.arrays, other.metric, told)


_SAME = "calibration and evaluation share samples: give others with --eval-data, or an array `split`"


def _look(given: str) -> Samples:
    path = Path(given).expanduser()
    if path.is_file() and path.suffix == ".npz":
        return _archive(path, given)
    if path.is_dir():
        return _images(path, given)
    if ":" in given and not path.exists():
        roles: dict[Role, dict[str, Any]] = {"calibration": {"entry": given}, "evaluation": {"entry": given}}
        return Samples(roles, (), None, (_SAME,))
    raise ConfigError(
        f"the samples {given!r} cannot be used" if path.exists() else f"there are no samples at {given!r}",
        where="--data",
        got=path.suffix or given,
        want="an .npz file, a folder of images, or package.module:callable",
        fix="np.savez('data.npz', image=images, labels=labels) makes one",
    )


def _archive(path: Path, given: str) -> Samples:
    arrays = zipped_arrays(path)
    labels = next((name for name in arrays if name == LABELS), None) or next(
        (name for name in arrays if name.lower() in LIKE_LABELS and len(arrays) > 1), None
    )
    inputs = {name: array for name, array in arrays.items() if name not in (labels, SPLIT)}
    if not inputs:
        raise DataError(
            "the archive holds no inputs",
            where=given,
            got=", ".join(arrays) or "no arrays",
            want="an array for each input of the model",
            fix="np.savez('data.npz', image=images, labels=labels) makes one",
        )
    rename = {labels: LABELS} if labels not in (None, LABELS) else {}
    common: dict[str, Any] = {"npz": given} | ({"rename": rename} if rename else {})
    roles, notes = _divided(common, _splits(arrays[SPLIT]) if SPLIT in arrays else {})
    specs = tuple(
        TensorSpec(name, str(array.header.dtype), ("batch", *array.header.shape[1:])) for name, array in inputs.items()
    )
    forms = [_form(name, array) for name, array in inputs.items()]
    metric, told = _labels(arrays[labels]) if labels else (None, "no labels: drift is measured, accuracy is not")
    return Samples(roles, specs, metric, (*forms, told, *notes))


def _divided(common: Mapping[str, Any], splits: Mapping[str, int]) -> tuple[dict[Role, dict[str, Any]], list[str]]:
    """Which split serves which purpose, and what to say of it."""
    folded = {name.lower(): name for name in splits}
    chosen = {role: next((folded[name] for name in names if name in folded), None) for role, names in _NAMES.items()}
    limit = {"max_samples": CALIBRATION_SAMPLES}
    if chosen["evaluation"] is None:
        return {"calibration": {**common, **limit}, "evaluation": dict(common)}, [_SAME]
    roles: dict[Role, dict[str, Any]] = {}
    for role, split in chosen.items():
        if split is not None:
            own = role == "calibration" and split in (chosen["train"], chosen["evaluation"])
            roles[role] = {**common, "split": split, **(limit if own else {})}
    if "calibration" not in roles:
        roles["calibration"] = {**roles["evaluation"], **limit}
    notes = ["splits: " + ", ".join(f"{name} ({count} samples)" for name, count in splits.items())]
    shared = roles["calibration"].get("split") == roles["evaluation"]["split"]
    return roles, [*notes, _SAME] if shared else notes


def _splits(array: StoredArray) -> dict[str, int]:
    """Names of the splits and the number of samples in each; memory does not grow with their number."""
    total = array.header.shape[0] if array.header.shape else 0
    counts: Counter[str] = Counter()
    for piece in array.rows(range(start, min(start + _ROWS, total)) for start in range(0, total, _ROWS)):
        counts.update(value.decode() if isinstance(value, bytes) else str(value) for value in piece.tolist())
    return dict(sorted(counts.items()))


def _form(name: str, array: StoredArray) -> str:
    """``image float32[1797,1,8,8], from 0 to 1 in the first 16``: and what that means for a network."""
    header = array.header
    text = f"{name} {header.dtype}[{','.join(map(str, header.shape))}]"
    if not header.shape or header.dtype.kind not in "iuf" or not header.shape[0]:
        return text
    first = next(iter(array.rows([range(min(_LOOKED_AT, header.shape[0]))])))
    low, high = first.min(), first.max()
    text += f", values from {low:.4g} to {high:.4g} in the first {len(first)}"
    if header.dtype.kind == "f" and low >= 0 and high > 32:
        text += ": not scaled; see that the network was trained so"
    return text


def _labels(array: StoredArray) -> tuple[str | None, str]:
    header = array.header
    if header.dtype.kind in "iu" and len(header.shape) == 1:
        first = next(iter(array.rows([range(min(_ROWS, header.shape[0]))])))
        return "top1", f"labels {header.dtype}, classes {first.min()} to {first.max()}: accuracy is measured as top1"
    if header.dtype.kind == "f":
        return "mae", f"labels {header.dtype}: the error is measured as mae"
    shape = ",".join(map(str, header.shape))
    return None, f"labels {header.dtype}[{shape}]: name a metric for them in data.evaluation"


def _images(path: Path, given: str) -> Samples:
    """A folder: with a CSV file, with one sub-folder for each class, with those in sub-folders of splits, or plain."""
    index = next((file for file in sorted(path.glob("*.csv"))), None)
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    splits = {name: _count(path / name) for name in folders if any(name.lower() in names for names in _NAMES.values())}
    if index is not None:
        return _indexed(given, index)
    if splits:
        roles, notes = _divided({}, splits)
        labelled = _has_classes(path / next(iter(splits)))
        for settings in roles.values():
            settings["images"] = os.path.join(given, settings.pop("split", ""))  # noqa: PTH118  the path as given
            settings.update({"labels": "folders"} if labelled else {})
    else:
        labelled = _has_classes(path)
        common = {"images": given} | ({"labels": "folders"} if labelled else {})
        roles, notes = _divided(common, {})
        notes.insert(0, f"{_count(path)} images")
    told = "classes from the sub-folders, in sorted order" if labelled else "no labels: accuracy is not measured"
    return Samples(roles, (), "top1" if labelled else None, (*notes, told))


def _indexed(given: str, index: Path) -> Samples:
    import csv

    with index.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    labelled = "label" in columns
    labels = os.path.join(given, index.name)  # noqa: PTH118  the path as given
    splits = dict(sorted(Counter(row["split"] for row in rows).items())) if "split" in columns else {}
    roles, notes = _divided({"images": given, "labels": labels}, splits)
    told = f"{len(rows)} images in {index.name}, with the columns {', '.join(columns)}"
    return Samples(roles, (), "top1" if labelled else None, (told, *notes))


def _has_classes(folder: Path) -> bool:
    """True if every file lies in a sub-folder, of which there are several."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return len(entries) > 1 and all(entry.is_dir() for entry in entries)


def _count(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file())


def renamed(samples: Samples, specs: Sequence[TensorSpec]) -> dict[str, str]:
    """Array name to input name, for inputs whose array has another name and the only fitting form.

    Where there are as many arrays as inputs and no name fits, nothing need be said: they feed them in order.
    """
    names = {array.name for array in samples.arrays}
    missing = [spec for spec in specs if spec.name not in names]
    if not missing or (len(missing) == len(specs) == len(samples.arrays)):
        return {}
    free = [array for array in samples.arrays if array.name not in {spec.name for spec in specs}]
    fitting: dict[str, str] = {}
    for spec in missing:
        forms = [a.name for a in free if a.dtype == spec.dtype and spec.admits_shape((1, *_lengths(a)), any_batch=True)]
        if len(forms) == 1 and forms[0] not in fitting:
            fitting[forms[0]] = spec.name
    return fitting


def _lengths(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(dim for dim in spec.shape[1:] if isinstance(dim, int))
