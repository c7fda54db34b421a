"""From a YAML file to a `RunConfig`: overrides applied, every mistake told with its file and line."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from onnxshrink.config.mistakes import dotted, explain
from onnxshrink.config.run import RunConfig
from onnxshrink.core.errors import ConfigError, ConfigErrors
from onnxshrink.core.importing import search_path

_STEP = re.compile(r"(?:^|\.)([^.\[\]=]+)|\[(\d+)\]")


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file.

    Args:
        path: The YAML file; relative paths in it start at its folder.
        overrides: Values that take precedence, such as ``stages[0].epochs=2``; the value is YAML.

    Raises:
        ConfigError: The file cannot be read, or anything in it is wrong; all mistakes are told at once.
    """
    document = overridden(_read_yaml(path), overrides)
    document.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "run")
    return validate(document, base=path.parent, origin=path.name)


def overridden(document: MutableMapping[str, Any], overrides: Sequence[str]) -> MutableMapping[str, Any]:
    """The document itself, changed.

    Args:
        document: A config as plain values.
        overrides: Values that take precedence, such as ``stages[0].epochs=2``; the value is YAML.

    Raises:
        ConfigError: An override cannot be read, or leads nowhere.
    """
    for override in overrides:
        _apply(document, override)
    return document


def validate(document: Mapping[str, Any], *, base: Path, origin: str = "config") -> RunConfig:
    """Turn plain values into a `RunConfig`.

    Args:
        document: The config; where ruamel.yaml read it, messages name the line.
        base: The folder at which relative paths start.
        origin: What to call the document in messages.

    Raises:
        ConfigError: Anything in it is wrong; all mistakes are told at once.
    """
    try:
        with search_path(base):
            return RunConfig.model_validate(document, context={"base": base})
    except ValidationError as e:
        errors = explain(e, document, origin)
        raise (errors[0] if len(errors) == 1 else ConfigErrors(errors)) from e


def _read_yaml(path: Path) -> MutableMapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"the config file cannot be read: {e.strerror if isinstance(e, OSError) else 'it is not UTF-8 text'}",
            where=str(path),
            got=f"a folder that holds {_files_beside(path)}",
            want="a YAML file",
            fix="check the spelling, or make a config: onnxshrink init",
        ) from e
    try:
        document = YAML(typ="rt").load(text)
    except MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        problem = (e.problem or str(e)).strip()
        raise ConfigError(
            f"the config file is not valid YAML: {problem}",
            where=f"{path.name}:{line}",
            got=text.splitlines()[line - 1].strip() if line <= len(text.splitlines()) else "the end of the file",
            want="YAML 1.2, each key once",
            fix=_yaml_fix(problem),
        ) from e
    except YAMLError as e:
        raise ConfigError(f"the config file is not valid YAML: {e}", where=path.name, want="YAML 1.2") from e
    if not isinstance(document, MutableMapping):
        raise ConfigError(
            "the config file holds no options",
            where=path.name,
            got=type(document).__name__ if document is not None else "an empty file",
            want="options such as `model: {onnx: model.onnx}`",
            fix="write some, or let it be written: onnxshrink init",
        )
    return document


def _files_beside(path: Path) -> str:
    """The configs in the folder where one was looked for."""
    names = sorted(file.name for file in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return ", ".join(names[:5]) or "no config"


def _yaml_fix(problem: str) -> str:
    if "duplicate" in problem:
        return "remove one of the two, or merge them"
    if r"\t" in problem:
        return "indent with spaces: YAML takes no tabs"
    return "look at this line and the one before it: a bracket, a quote, a colon or the indentation"


def _apply(document: Any, override: str) -> None:
    """Set one value of the document, as ``--set`` asks."""
    path, equals, text = override.partition("=")
    steps: list[int | str] = [key or int(index) for key, index in _STEP.findall(path)]
    spelled = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
    if not equals or not steps or spelled != path.strip():
        raise ConfigError(
            f"the override {override!r} cannot be read",
            where="--set",
            got=override,
            want="path=value, such as stages[0].epochs=2",
            fix="write the path as messages do, then = and the value, all in quotes",
        )
    try:
        value = YAML(typ="safe").load(text)  # plain values: they have no line in the file
    except YAMLError as e:
        raise ConfigError(f"the value of {override!r} is not valid YAML", where="--set", got=text, want="YAML") from e
    here: Any = document
    for done, step in enumerate(steps[:-1]):
        if isinstance(here, MutableMapping) and isinstance(step, str):
            here = here.setdefault(step, {}) if step not in here else here[step]
        else:
            here = _item(here, step, override, steps[:done])
    last = steps[-1]
    if isinstance(last, int) or not isinstance(here, MutableMapping):
        _item(here, last, override, steps[:-1])
    here[last] = value


def _item(here: Any, step: int | str, override: str, done: Sequence[int | str]) -> Any:
    if isinstance(here, list) and isinstance(step, int) and step < len(here):
        return here[step]
    if isinstance(here, Mapping) and not here:
        whole = dotted(tuple(done))
        raise ConfigError(
            f"the override {override!r} changes an option that the config does not give",
            where="--set",
            got=f"no {whole} in the file",
            fix=f"give all of it: --set '{whole}=…'",
        )
    what = f"a list of {len(here)}" if isinstance(here, list) else f"the value {here!r}"
    raise ConfigError(
        f"the override {override!r} leads nowhere",
        where="--set",
        got=f"{dotted(tuple(done)) or 'the config'} is {what}",
        want=f"something that has {dotted((step,))}",
    )
