from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from onnxshrink.config.load import load_config
from onnxshrink.config.stages import Distill, Finetune
from onnxshrink.config.training import Teacher
from onnxshrink.core.errors import ConfigError

TEACHER = Teacher(factory="nets:build")
CONFIG = """\
model: {factory: "nets:build", inputs: {image: {shape: [batch, 4]}}}
data: {train: {npz: d.npz}}
stages:
  - {kind: export}
variants:
  small: []
"""


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        (Distill(teacher=TEACHER), [("kl", 0.9), ("labels", 0.1)]),
        (Distill(teacher=TEACHER, task="tokens"), [("kl", 0.9), ("labels", 0.1)]),
        (Distill(teacher=TEACHER, task="regression"), [("mse", 0.9), ("labels", 0.1)]),
        (Distill(teacher=TEACHER, task="embedding"), [("cosine", 1.0)]),
        (Finetune(), [("labels", 1.0)]),
        (Finetune(task="regression"), [("labels", 1.0)]),
        (Finetune(teacher=TEACHER, task="embedding"), [("cosine", 1.0)]),
    ],
)
def test_each_task_has_losses_of_its_own(settings: Distill | Finetune, kinds: list[tuple[str, float]]) -> None:
    """Where none is named."""
    assert [(loss.kind, loss.weight) for loss in settings.terms] == kinds


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, False),
        ({"losses": [{"kind": "kl"}]}, False),
        ({"losses": [{"kind": "labels"}]}, True),
        ({"losses": [{"kind": "dkd"}, {"kind": "mse"}]}, True),
        ({"teacher": {"factory": "nets:build", "train": {}}, "losses": [{"kind": "kl"}]}, True),
    ],
)
def test_what_cannot_do_without_labels_says_so(settings: dict[str, Any], *, needed: bool) -> None:
    """`dkd`, labels alone, and a teacher that is trained from them."""
    assert Distill.model_validate({"teacher": TEACHER, **settings}).needs_labels is needed


@pytest.mark.parametrize(
    ("stage", "what"),
    [
        ("{kind: finetune, losses: [{kind: kl}]}", "the loss 'kl' needs a teacher, and there is none"),
        ("{kind: finetune, losses: [{kind: hint, student: a, teacher: b}]}", "the loss 'hint' needs a teacher"),
        ("{kind: finetune, task: embedding}", "the loss 'labels' has no meaning for task: embedding"),
        (
            '{kind: distill, teacher: {factory: "nets:build"}, task: regression, losses: [{kind: dkd}]}',
            "the loss 'dkd' has no meaning for task: regression",
        ),
        (
            '{kind: distill, teacher: {factory: "nets:build", train: {}}, task: embedding}',
            "labels cannot train a teacher of embeddings",
        ),
        ('{kind: finetune, averaged_with: [{factory: "nets:build"}]}', "`averaged_with` names teachers"),
    ],
)
def test_losses_without_meaning_stop_before_any_work(tmp_path: Path, stage: str, what: str) -> None:
    """As a mistake of the config, at the stage's line."""
    (tmp_path / "d.npz").touch()
    (tmp_path / "cfg.yaml").write_text(CONFIG.replace("stages:\n", f"stages:\n  - {stage}\n"))
    with pytest.raises(ConfigError, match=what) as caught:
        load_config(tmp_path / "cfg.yaml")
    assert str(caught.value.where).startswith("cfg.yaml:4  stages[0]") or ":4  stages[0]" in str(caught.value.where)


def test_teachers_come_in_order() -> None:
    """The first one's modules may be named; without one there is none."""
    other = Teacher(factory="nets:other")
    assert Distill(teacher=TEACHER, averaged_with=(other,)).teachers == (TEACHER, other)
    assert Finetune().teachers == ()
    with pytest.raises(ValidationError):
        Finetune(averaged_with=(other,))


@pytest.mark.parametrize(
    ("stages", "variant", "what"),
    [
        ("{kind: finetune, simulate: INT8}", "{kind: finetune}, {kind: export}", "trains in float"),
        ("{kind: finetune, simulate: INT8}, {kind: finetune}", "{kind: export}", "trains in float"),
        (
            "{kind: finetune, simulate: INT8}",
            "{kind: distill, teacher: {factory: nets:build}}, {kind: export}",
            "trains in float",
        ),
        (
            "{kind: finetune, simulate: INT8}",
            "{kind: prune_channels, pruning_ratio: 0.5, steps: 2, finetune: {}}, {kind: export}",
            "trains in float",
        ),
        ("{kind: finetune, simulate: {kind: quantize_weights}}", "{kind: export, opset: 20}", "stored in 8"),
    ],
)
def test_what_undoes_training_for_quantization_is_refused(tmp_path: Path, stages: str, variant: str, what: str) -> None:
    """Training in float after it, wherever the two are; 4 bits that the opset does not have."""
    with pytest.raises(ConfigError, match=what):
        load_simulating(tmp_path, stages, variant)


@pytest.mark.parametrize(
    ("stages", "variant"),
    [
        ("{kind: finetune}, {kind: finetune, simulate: INT8}", "{kind: export}"),
        ("{kind: finetune, simulate: INT8}, {kind: finetune, simulate: INT8}", "{kind: export}"),
        ("{kind: finetune, simulate: {kind: quantize_weights}}", "{kind: export, opset: 21}"),
        ("{kind: finetune, simulate: {kind: quantize_weights, bits: 8}}", "{kind: export}"),
        ("{kind: finetune, simulate: INT8}, {kind: prune_channels, pruning_ratio: 0.5}", "{kind: export}"),
    ],
)
def test_training_for_quantization_may_be_last(tmp_path: Path, stages: str, variant: str) -> None:
    """What comes before it may train, and what comes behind it may do anything else."""
    load_simulating(tmp_path, stages, variant)


def load_simulating(folder: Path, stages: str, variant: str) -> None:
    """Load a config with those stages, INT8 written out."""
    (folder / "d.npz").touch()
    (folder / "cfg.yaml").write_text(
        f"""\
model: {{factory: "nets:build", inputs: {{image: {{shape: [batch, 4]}}}}}}
data: {{train: {{npz: d.npz}}, calibration: {{npz: d.npz}}}}
stages: [{stages}]
variants: {{small: [{variant}]}}
""".replace("INT8", "{kind: quantize_static}")
    )
    load_config(folder / "cfg.yaml")
