"""Distillation: a small network learns the outputs of a large one, softened so that near misses count too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from onnxshrink.config.source import FactorySource, InputSettings
from onnxshrink.config.stages import Distill, Finetune
from onnxshrink.config.training import EntryLoss, LabelLoss, Learning, Task, Teacher
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.runtime.torch_model import count_parameters, load_network, read_architecture, save_network
from onnxshrink.stages.context import Context
from onnxshrink.stages.features import observe
from onnxshrink.stages.learner import Student
from onnxshrink.stages.samples import read_samples
from onnxshrink.stages.tasks import require_labels
from onnxshrink.stages.teachers import Teachers
from onnxshrink.stages.training import train


def distill(settings: Distill, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Train the network of ``source`` towards the teacher's outputs, and towards the labels where there are any.

    Raises:
        ModelError: The teacher cannot be built, or something that is compared does not fit the student's.
        DataError: The samples or labels do not fit.
        TrainingError: The loss is not finite.
    """
    return learn(settings, source, out, ctx)


def learn(settings: Distill | Finetune, source: Artifact, out: Path, ctx: Context) -> Facts:
    """What `distill` and `finetune` share: the network is built, taught and saved."""
    network, architecture = load_network(source)
    facts = teach(network, settings, source, ctx)
    save_network(network, architecture, out)
    return facts


def teach(network: nn.Module, settings: Learning, source: Artifact, ctx: Context, *, part: str = "training") -> Facts:
    """Train a network in place from teachers, from labels, or from both.

    Args:
        network: What to train.
        settings: The task, the teachers, the losses and the training.
        source: The artifact that the network was built from; its inputs are those of network and teachers.
        ctx: The run.
        part: See `train`.

    Raises:
        ModelError: A teacher cannot be built, or something that is compared does not fit the network's.
        DataError: The samples or labels do not fit.
        TrainingError: The loss is not finite.
    """
    losses = settings.terms
    wanted = any(loss.needs_labels or isinstance(loss, EntryLoss) for loss in losses)
    samples = read_samples(
        ctx,
        read_architecture(source).inputs,
        labels="needed" if settings.needs_labels else "wanted" if wanted else "unused",
    )
    facts: Facts = {"samples": len(samples), "parameters": count_parameters(network)}
    if samples.labels is None and any(isinstance(loss, LabelLoss) for loss in losses):
        losses = tuple(loss for loss in losses if not isinstance(loss, LabelLoss))
        facts["declined"] = ["labels: data.train has none, so the other losses have all the weight"]
    example = samples.take(torch.arange(2))

    def taught_by(given: Sequence[Artifact]) -> tuple[Student, Teachers | None]:
        teachers = Teachers([load_network(teacher)[0] for teacher in given]) if given else None
        return Student(network, losses, settings.task, example, teachers=teachers, seed=ctx.seed), teachers

    # What does not fit is found before a teacher is trained.
    student, teachers = taught_by([untrained_teacher(teacher, source, ctx) for teacher in settings.teachers])
    if samples.labels is not None and any(loss.needs_labels for loss in losses):
        with torch.no_grad():
            answer = observe(network, example.inputs).outputs[0]
        require_labels(samples.labels, answer, settings.task, where=samples.where)
    if any(teacher.train is not None for teacher in settings.teachers):
        student, teachers = taught_by([teacher_of(t, source, ctx, settings.task) for t in settings.teachers])
    if teachers is not None:
        facts["teacher_runs"] = "once" if student.keep(samples) else "on every batch"
    facts["losses"] = [loss.model_dump(mode="json") for loss in losses]
    facts |= train(student, samples, settings, ctx, part=part)
    return facts | student.figures(samples)


def teacher_of(teacher: Teacher, source: Artifact, ctx: Context, task: Task = "classification") -> Artifact:
    """A teacher of the network of ``source``, trained from labels first if the config says so. Memoized.

    Args:
        teacher: Its settings; the names of its inputs and outputs are the student's.
        source: The student.
        ctx: The run.
        task: What both are for.
    """
    given = untrained_teacher(teacher, source, ctx)
    return given if teacher.train is None else ctx.derive(Finetune(**teacher.train.model_dump(), task=task), given)


def untrained_teacher(teacher: Teacher, source: Artifact, ctx: Context) -> Artifact:
    """A teacher as its factory and its weights give it; the arguments are those of `teacher_of`."""
    student = read_architecture(source)
    inputs = {
        spec.name: InputSettings.model_validate({"shape": spec.shape, "dtype": spec.dtype}) for spec in student.inputs
    }
    named = {"inputs": inputs, "outputs": student.outputs}
    return ctx.open(FactorySource(factory=teacher.factory, args=teacher.args, weights=teacher.weights, **named))
