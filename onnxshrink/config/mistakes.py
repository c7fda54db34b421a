"""What pydantic finds wrong with a config, in the config's words and with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from onnxshrink.config.run import RunConfig
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.tensors import did_you_mean

Location: TypeAlias = tuple[int | str, ...]

# What pydantic's error types ask for, in a config's words; numbers come from the error's context.
_WANTED = {
    "tuple_type": "a list: [ … ]",
    "list_type": "a list: [ … ]",
    "dict_type": "options: {{name: value}}",
    "model_type": "options: {{name: value}}",
    "model_attributes_type": "options: {{name: value}}",
    "string_type": "text, in quotes where it looks like a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "byte_size": "a size: bytes, or text such as 60 kB or 1.5 MiB",
    "byte_size_unit": "a size: bytes, or text such as 60 kB or 1.5 MiB",
    "too_short": "at least {min_length}",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}


def explain(found: ValidationError, document: Mapping[str, Any], origin: str) -> list[ConfigError]:
    """All mistakes, each told once.

    Args:
        found: Of validating the document as a `RunConfig`.
        document: The config; where ruamel.yaml read it, messages name the line.
        origin: What to call the document in messages.
    """
    return [_explain(error, document, origin) for error in _causes(_plain(found.errors(include_url=False)))]


def _plain(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Without what only follows from another error: a list is too short when its only item is wrong."""
    wrong = [error["loc"] for error in errors]
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(len(loc) > len(error["loc"]) and loc[: len(error["loc"])] == error["loc"] for loc in wrong)
    ]


def _causes(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """The errors, less missing options that are there under a misspelt name."""
    misspelt = {
        (error["loc"][:-1], did_you_mean(str(error["loc"][-1]), _keys_at(error["loc"][:-1])))
        for error in errors
        if error["type"] == "extra_forbidden"
    }
    return [
        error
        for error in errors
        if error["type"] != "missing" or (error["loc"][:-1], f"did you mean {error['loc'][-1]!r}?") not in misspelt
    ]


def _explain(error: ErrorDetails, document: Any, origin: str) -> ConfigError:
    """One of pydantic's findings in our words."""
    context = error.get("ctx", {})
    loc: Location = context.get("loc", error["loc"])
    path, line = _find(document, loc)
    where = f"{origin}:{line}  {dotted(path)}" if line else f"{origin}  {dotted(path)}"
    got = _shorten(error["input"])
    hint: str | None
    match error["type"]:
        case "misfit":
            got = _shorten(_value(document, path))
            return ConfigError(context["what"], where=where, got=got, want=context["want"], fix=context["fix"])
        case "extra_forbidden":
            key = str(loc[-1])
            known = _keys_at(loc[:-1])
            hint = did_you_mean(key, known) or "remove it"
            return ConfigError(f"unknown option {key!r}", where=where, got=key, want=", ".join(known), fix=hint)
        case "missing":
            return ConfigError(
                f"the option {loc[-1]!r} is missing",
                where=where,
                got=got,
                want=f"{loc[-1]}: …",
                fix=f"add `{loc[-1]}: …` here",
            )
        case "union_tag_invalid":
            tag, known = str(context["tag"]), re.findall(r"'([^']+)'", str(context["expected_tags"]))
            noun = {"losses": "loss", "steps": "step"}.get(
                next(s for s in reversed(path) if isinstance(s, str)), "stage"
            )
            return ConfigError(
                f"unknown {noun} {tag!r}",
                where=where,
                got=tag,
                want=", ".join(known),
                fix=did_you_mean(tag, known) or "choose one of these",
            )
        case "union_tag_not_found":
            fix = "say which stage it is: add `kind: …`"
            return ConfigError(
                "a stage has no `kind`", where=where, got=got, want="{kind: export}, and the like", fix=fix
            )
        case "literal_error":
            known = re.findall(r"'([^']+)'", str(context["expected"]))
            hint = did_you_mean(str(error["input"]), known) or "choose one of these"
            return ConfigError(f"{got} is no choice here", where=where, got=got, want=", ".join(known), fix=hint)
        case "path_missing":
            hint = _near_file(str(error["input"]), error["msg"]) + "relative paths start at the config file's folder"
            return ConfigError(error["msg"], where=where, got=got, want="an existing file", fix=hint)
        case kind if kind in _WANTED:
            wanted = _WANTED[kind].format_map(context)
            what = "there is no value" if error["input"] is None else f"the value is wrong: {got}"
            return ConfigError(what, where=where, got=got, want=wanted, fix=f"give {wanted}, or leave the option out")
        case _ if " is wanted" in error["msg"]:
            wanted = re.sub(",? is wanted", "", error["msg"])
            fix = f"give {wanted.partition(',')[0]}, or leave the option out"
            return ConfigError(f"the value is wrong: {got}", where=where, got=got, want=wanted, fix=fix)
        case _:
            message = error["msg"][0].lower() + error["msg"][1:]
            return ConfigError(f"the value is wrong: {message}", where=where, got=got, want=message)


def _near_file(given: str, message: str) -> str:
    """A file beside the one that is not there, whose name is nearly the same."""
    folder = Path(message.removeprefix("there is nothing at ")).parent
    near = did_you_mean(Path(given).name, sorted(path.name for path in folder.iterdir())) if folder.is_dir() else None
    return f"{near} " if near else ""


def _find(document: Any, loc: Location) -> tuple[Location, int | None]:
    """The part of ``loc`` that exists in the document (pydantic adds union tags to it), and its line from 1."""
    here, path, line = document, [], None
    for step in loc:
        if isinstance(here, Mapping) and step in here:
            line = _line(here, step) or line
        elif not (isinstance(here, Sequence) and not isinstance(here, str) and isinstance(step, int)):
            if step == loc[-1] and isinstance(here, Mapping) and not _is_tag(step, here):
                path.append(step)  # a missing key: its parent's line is the place to add it
            continue
        else:
            line = _line(here, step) or line
        here = here[step]
        path.append(step)
    return tuple(path), line


def _value(document: Any, path: Location) -> Any:
    for step in path:
        document = document.get(step) if isinstance(document, Mapping) else document[step]
    return document


def _is_tag(step: int | str, here: Mapping[Any, Any]) -> bool:
    return here.get("kind") == step


def _line(here: Any, step: int | str) -> int | None:
    marks = getattr(getattr(here, "lc", None), "data", None) or {}
    return marks[step][0] + 1 if step in marks else None


def dotted(loc: Location) -> str:
    """A place in the config as it is written: ``stages[0].epochs``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return text.removeprefix(".")


def _shorten(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    text = str(value) if isinstance(value, Path) else repr(dict(value) if isinstance(value, Mapping) else value)
    return text if len(text) <= 80 else text[:77] + "…"


def _keys_at(loc: Location) -> list[str]:
    """The options that the model at ``loc`` has."""
    annotation: Any = RunConfig
    for step in loc:
        annotation = _step_into(annotation, step)
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return list(member.model_fields)
    return []


def _step_into(annotation: Any, step: int | str) -> Any:
    """The type one step further: a field, an item, or the union member with that tag."""
    for member in _members(annotation):
        if get_origin(member) is tuple:
            return get_args(member)[0]
        if get_origin(member) is dict:
            return get_args(member)[1]
        if isinstance(member, type) and issubclass(member, BaseModel):
            if step in member.model_fields:
                field = member.model_fields[str(step)]
                return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            if step in _tags(annotation, member):
                return member
    return annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, without their annotations; the type itself where it is none."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, type(int | str)):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return (annotation,)


def _tags(annotation: Any, member: type[BaseModel]) -> set[str]:
    """What discriminates ``member`` in a union: its `kind`, or its `Tag`."""
    tags = {str(member.model_fields["kind"].default)} if "kind" in member.model_fields else set()
    parts = [annotation]
    while parts:
        part = parts.pop()
        if get_origin(part) is Annotated:
            base, *marks = get_args(part)
            if base is member:
                tags |= {mark.tag for mark in marks if isinstance(mark, Tag)}
            parts.append(base)
        elif get_origin(part) in (Union, type(int | str)):
            parts.extend(get_args(part))
    return tags
