"""``onnxshrink schema``: print the config's JSON schema."""

from __future__ import annotations

import typer


def schema() -> None:
    """Print the JSON schema of the config, for editors."""
    from onnxshrink.config.schema import schema_text

    typer.echo(schema_text(), nl=False)
