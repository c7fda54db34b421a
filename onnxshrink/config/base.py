"""The base of every config model, and the field types whose meaning lies outside the config: files and callables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, JsonValue, TypeAdapter, WithJsonSchema
from pydantic_core import PydanticCustomError, PydanticKnownError
from pydantic_core.core_schema import ValidationInfo

from onnxshrink.core.artifact import digest_path
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.importing import find_file, source_digest, split_entry


class Model(BaseModel):
    """Frozen, and closed: an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ContentFile:
    """Marks a path whose meaning is the content of what lies there."""


class SourceCode:
    """Marks an entry point whose meaning is the source code behind it."""


class CallArguments:
    """Marks arguments of a user's callable: a text among them that names a file means the file's content."""


def existing_path(value: object, info: ValidationInfo) -> Path:
    """Resolve against the config file's folder, and require that it is there."""
    if not isinstance(value, (str, Path)):
        raise PydanticCustomError("path_type", "a path is wanted", {})
    base = Path((info.context or {}).get("base", "."))
    # Not resolved: a model in a cache of links has its external data beside the link, not beside what it links to.
    path = Path(os.path.abspath(base / Path(value).expanduser()))  # noqa: PTH100
    if not path.exists():
        raise PydanticCustomError("path_missing", "there is nothing at {path}", {"path": str(path)})
    return path


def _entry(value: object) -> str:
    if not isinstance(value, str):
        raise PydanticCustomError("entry_type", "an entry point is wanted: package.module:callable", {})
    try:
        split_entry(value)
    except ConfigError as e:
        raise PydanticCustomError("entry_form", "an entry point is wanted: package.module:callable", {}) from e
    return value


def _no_switch(value: object) -> object:
    """Refuse true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _bytes(value: object) -> int:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return int(TypeAdapter(ByteSize).validate_python(value))


FilePath = Annotated[
    Path, BeforeValidator(existing_path), ContentFile(), WithJsonSchema({"type": "string", "format": "path"})
]
"""An existing file or folder; relative paths start at the config file's folder."""

Arguments = Annotated[dict[str, JsonValue], CallArguments()]
"""Keyword arguments of a callable: plain values. Those that name an existing file count with its content."""

EntryPoint = Annotated[
    str, BeforeValidator(_entry), SourceCode(), WithJsonSchema({"type": "string", "pattern": "^[^:]+:[^:]+$"})
]
"""``package.module:callable``, looked for beside the config file, in the working folder, among packages."""

SizeBytes = Annotated[
    int,
    BeforeValidator(_bytes),
    Field(ge=0),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[0-9.]+ ?([kKMGT]i?)?B$"}]}),
]
"""Bytes, or text such as ``60 kB`` (1,000) or ``60 KiB`` (1,024)."""

NO_SWITCH = BeforeValidator(_no_switch)
"""Of a number for which true and false are mistakes; the last in its annotation."""

Ratio = Annotated[float, Field(ge=0.0, le=1.0), NO_SWITCH]
"""A fraction from 0 to 1."""


def fingerprint(model: Model) -> dict[str, Any]:
    """The settings as JSON for a memo key: content digests in place of paths, source digests beside entry points."""
    return {
        name: _fingerprint(getattr(model, name), field.metadata) for name, field in type(model).model_fields.items()
    }


def _fingerprint(value: Any, metadata: list[Any]) -> Any:
    if isinstance(value, Model):
        return {"kind": type(value).__name__, **fingerprint(value)}
    if isinstance(value, Path):
        return digest_path(value)
    if any(isinstance(mark, SourceCode) for mark in metadata) and isinstance(value, str):
        return {"entry": value, "source": source_digest(value)}
    if any(isinstance(mark, CallArguments) for mark in metadata):
        return _with_contents(value)
    if isinstance(value, dict):
        return {str(key): _fingerprint(item, []) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fingerprint(item, []) for item in value]
    return value


def _with_contents(value: Any) -> Any:
    """``value`` with the digest of every file or folder that a text in it names, as the callable would find it."""
    if isinstance(value, dict):
        return {key: _with_contents(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_contents(item) for item in value]
    if isinstance(value, str) and value.strip() and (path := find_file(value)):
        return {"text": value, "content": digest_path(path)}
    return value
