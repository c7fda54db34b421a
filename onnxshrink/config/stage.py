"""What every stage's settings have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict

from onnxshrink.config.base import Model
from onnxshrink.config.data import Role
from onnxshrink.core.artifact import Kind


def _require_kind(schema: dict[str, Any]) -> None:
    """Say in the JSON schema what the union says in Python: a stage is told by its kind."""
    schema["required"] = list(dict.fromkeys(["kind", *schema.get("required", [])]))
    schema["properties"]["kind"]["description"] = "Which stage this is."


class StageSettings(Model):
    """What the pipeline needs to know of a stage: what flows in and out, and which data it reads."""

    model_config = ConfigDict(json_schema_extra=_require_kind)

    takes: ClassVar[Kind]
    gives: ClassVar[Kind]
    needs: ClassVar[tuple[Role, ...]] = ()
    uses: ClassVar[tuple[Role, ...]] = ()
    """Data that is read where it is given, and done without where it is not."""
    times: ClassVar[bool] = False
    """The result depends on times that are measured, so another processor measures anew."""
    trains: ClassVar[bool] = False
    """A network learns in it: where there are several processes, they share the work."""
