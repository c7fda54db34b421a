"""The JSON schema of the config, kept beside this file so that editors can complete a config while it is written."""

from __future__ import annotations

import json
from pathlib import Path

from onnxshrink.config.run import RunConfig

SCHEMA_FILE = Path(__file__).with_name("run.schema.json")


def schema_text() -> str:
    """The schema as it stands in `SCHEMA_FILE`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    return json.dumps(schema, indent=1) + "\n"
