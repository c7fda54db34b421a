"""What the model card says that nothing can be measured of."""

from __future__ import annotations

from pydantic import Field

from onnxshrink.config.base import Model


class Card(Model):
    """For ``MODEL_CARD.md``; what is not given is left out of it."""

    title: str | None = None
    """The card's heading; the run's name by default."""
    description: str | None = None
    """What the model is for, in Markdown."""
    license: str | None = Field(default=None, pattern=r"^[a-z0-9.\-]+$")
    """Identifier of the model's licence as Hugging Face has it, such as ``apache-2.0``."""
    base_model: str | None = None
    """The model it was made of, as Hugging Face names it: ``owner/name``."""
    task: str | None = Field(default=None, pattern=r"^[a-z0-9\-]+$")
    """Hugging Face's name of the task, such as ``image-classification``."""
    dataset: str | None = None
    """Name of the evaluation data."""
    tags: tuple[str, ...] = ()
    """Tags besides those of how it was made."""
