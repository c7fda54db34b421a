"""Errors of commands without a config, in the command's own words: ``--max-size`` in place of ``budget.max_size``.

The pipeline knows configs alone, and so do its messages. What a field of the config is called on the command line
follows from the command's options, which are called as the fields are, but for the few that `_ALIASES` names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_type_hints

from typer.models import OptionInfo

from onnxshrink.core.errors import ConfigErrors, ShrinkError

_ALIASES = {
    "exclude_nodes": ("exclude",),
    "max_accuracy_drop": ("max_drop",),
    "parallel": ("workers",),
    "data.calibration": ("data",),
    "data.evaluation": ("evaluation", "data"),
}
"""Fields whose option has another name: the first of these that the command has."""

_NO_FIELDS = {"data", "evaluation", "out", "runs", "quiet", "as_json"}
"""Options that are called as no field, or as a whole part of the config."""

_ROOTS = r"model|data|stages|variants|targets|gates|budget|quantize_\w+"
_PATH = rf"(?:arguments  )?(?<![\w'/.-])(?P<path>(?:{_ROOTS})\b(?:\.\w+|\[\d+\])+)"
_METRIC = r"data: \{evaluation: \{npz: …, metric: \w+\}\}"
_LABELS = r"(?P<labels>with a metric(?: and labels)?)"
_RENAME = r"`rename: \{(?P<array>[^:}]+): (?P<name>[^}]+)\}`"
_SETTING = r"\b(?P<setting>[a-z]\w*): (?=[^\s{\[])"
_WORD = r"(?<![\w'/.-])(?P<word>[a-z]+(?:_[a-z0-9]+)+)\b(?!/|\.\w)"  # no part of a file's or a tensor's name
_WORDS = re.compile(f"{_METRIC}|{_LABELS}|{_RENAME}|{_PATH}|{_SETTING}|{_WORD}")
_YAML = re.compile(r"\b\w+: [{\[]")


@contextmanager
def in_flags(command: Callable[..., Any]) -> Iterator[None]:
    """Tell errors from within in flags of a command; where only a config can do what is advised, say so.

    Args:
        command: The function that typer makes the command of.

    Raises:
        ShrinkError: The one from within, its ``where``, ``want`` and ``fix`` reworded.
    """
    try:
        yield
    except ShrinkError as e:
        flags = flags_of(command)
        for error in (e, *(e.errors if isinstance(e, ConfigErrors) else ())):
            error.where = _where(error.where, flags)
            error.want = in_words_of(error.want, flags)
            error.fix = in_words_of(error.fix, flags)
            if error.fix and _YAML.search(error.fix):
                error.fix = f"in a config, as onnxshrink init writes it: {error.fix}"
        raise


def flags_of(command: Callable[..., Any]) -> dict[str, str]:
    """What a command calls the fields of a config: field, or path of a field, to flag."""
    options = {
        name.rstrip("_"): _spelled(name, option)
        for name, hint in get_type_hints(command, include_extras=True).items()
        for option in getattr(hint, "__metadata__", ())
        if isinstance(option, OptionInfo)
    }
    aliased = {
        field: options[next(name for name in names if name in options)]
        for field, names in _ALIASES.items()
        if any(name in options for name in names)
    }
    return aliased | {name: flag for name, flag in options.items() if name not in _NO_FIELDS}


def _spelled(name: str, option: OptionInfo) -> str:
    """An option as it is written: its first spelling lies where other options have their default."""
    given = map(str, (option.default, *(option.param_decls or ())))
    return next((one for one in given if one.startswith("--")), f"--{name.replace('_', '-')}")


def in_words_of(text: str | None, flags: Mapping[str, str]) -> str | None:
    """A text with flags in place of the config's paths, settings and names that have one; the others stay.

    Args:
        text: Such as ``give real samples: data.calibration`` or ``max_samples: 64``.
        flags: As of `flags_of`.
    """

    def reworded(found: re.Match[str]) -> str:
        if found["labels"]:
            return "with an array 'labels'"
        if array := found["array"]:
            return f"save {array!r} as {found['name']!r} in the file"
        if path := found["path"]:
            return _flag_of(path, flags) or found[0]
        if setting := found["setting"]:
            return f"{flags[setting]} " if setting in flags else found[0]
        if word := found["word"]:
            return flags.get(word, word)
        return f"add an array 'labels' to the file of {flags.get('data.evaluation', 'samples')}"

    return text and _WORDS.sub(reworded, text)


def _where(text: str | None, flags: Mapping[str, str]) -> str | None:
    """A place: it may be the bare name of a field."""
    return flags.get(text, in_words_of(text, flags)) if text else text


def _flag_of(path: str, flags: Mapping[str, str]) -> str | None:
    """The flag of a path such as ``budget.max_size`` or ``data.evaluation.npz``: of its end, or of its beginning."""
    steps = re.findall(r"\w+", path)
    return next((flags[name] for name in (steps[-1], ".".join(steps[:2]), steps[1]) if name in flags), None)
