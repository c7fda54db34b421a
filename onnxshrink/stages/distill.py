"""Distillation: a small network learns the outputs of a large one, softened so that near misses count too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from onnxshrink.config.source import FactorySource, InputSettings
from onnxshrink.config.stages import Distill, Finetune
from onnxshrink.config.training import LabelLoss, Loss, SoftenedKl, Teacher
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import ModelError
from onnxshrink.data.labels import check_labels
from onnxshrink.runtime.torch_model import count_parameters, load_network, read_architecture, save_network
from onnxshrink.stages.context import Context
from onnxshrink.stages.losses import softened_divergence
from onnxshrink.stages.samples import TrainingBatch, read_samples
from onnxshrink.stages.training import Learner, logits_of, predict, train


def distill(settings: Distill, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Train the network of ``source`` towards the teacher's outputs, and towards the labels where there are any.

    Raises:
        ModelError: The teacher cannot be built, or its logits do not fit the student's.
        DataError: The samples or labels do not fit.
        TrainingError: The loss is not finite.
    """
    return learn(settings, source, out, ctx)


class Student(Learner):
    """A network that learns from a teacher's outputs, from labels, or from both.

    Args:
        network: The student.
        losses: The terms.
        taught: The teacher's outputs on every sample, samples on axis 0; None without a teacher.
    """

    def __init__(self, network: nn.Module, losses: Sequence[Loss], taught: Tensor | None) -> None:
        super().__init__(network)
        self._losses = tuple(losses)
        self._taught = taught

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Every term of the loss, weighted."""
        logits = logits_of(self.network, batch.inputs)
        return {loss.kind: loss.weight * self._term(loss, logits, batch) for loss in self._losses}

    def _term(self, loss: Loss, logits: Tensor, batch: TrainingBatch) -> Tensor:
        if isinstance(loss, LabelLoss) and batch.labels is not None:
            return functional.cross_entropy(logits, batch.labels, label_smoothing=loss.label_smoothing)
        if isinstance(loss, SoftenedKl) and self._taught is not None:
            return softened_divergence(logits, self._taught[batch.rows], loss.temperature)
        raise NotImplementedError(loss.kind)


def learn(settings: Distill | Finetune, source: Artifact, out: Path, ctx: Context) -> Facts:
    """What `distill` and `finetune` share: training on a teacher's logits, on labels, or on both.

    The teacher sees every sample once, before the training: nothing changes the samples from epoch to epoch.
    """
    losses = settings.losses or _default_losses(taught=settings.teacher is not None)
    wants_labels = any(isinstance(loss, LabelLoss) for loss in losses)
    network, architecture = load_network(source)
    samples = read_samples(
        ctx,
        architecture.inputs,
        labels="needed" if settings.teacher is None else "wanted" if wants_labels else "unused",
    )
    before = predict(network, samples)
    labels = samples.labels
    if labels is not None:
        check_labels(labels.numpy(), n_samples=len(labels), n_classes=before.shape[1], where=samples.where)
    facts: Facts = {"samples": len(samples), "parameters": count_parameters(network)}
    taught: Tensor | None = None
    if settings.teacher is not None:
        taught = predict(load_network(teacher_of(settings.teacher, source, ctx))[0], samples)
        if taught.shape != before.shape:
            raise ModelError(
                "the teacher's logits do not fit the student's",
                where=settings.teacher.factory,
                got=f"{taught.shape[1]} logits",
                want=f"{before.shape[1]}, as the student has",
                fix="give both the same number of classes in `args`",
            )
        if labels is None and wants_labels:
            losses = tuple(loss for loss in losses if not isinstance(loss, LabelLoss))
            facts["declined"] = ["labels: data.train has none, so the teacher has all the weight"]
    facts["losses"] = [loss.model_dump(mode="json") for loss in losses]
    facts |= train(Student(network, losses, taught), samples, settings, ctx)
    after = predict(network, samples)
    if labels is not None:
        facts["train_accuracy"] = _agreement(after, labels)
    if taught is not None:
        facts["teacher_agreement"] = _agreement(after, taught.argmax(1))
    save_network(network, architecture, out)
    return facts


def teacher_of(teacher: Teacher, source: Artifact, ctx: Context) -> Artifact:
    """The teacher of the network of ``source``, trained from labels first if the config says so. Memoized.

    Args:
        teacher: Its settings; the names of its inputs and outputs are the student's.
        source: The student.
        ctx: The run.
    """
    student = read_architecture(source)
    inputs = {
        spec.name: InputSettings.model_validate({"shape": spec.shape, "dtype": spec.dtype}) for spec in student.inputs
    }
    named = {"inputs": inputs, "outputs": student.outputs}
    given = ctx.open(FactorySource(factory=teacher.factory, args=teacher.args, weights=teacher.weights, **named))
    return given if teacher.train is None else ctx.derive(Finetune(**teacher.train.model_dump()), given)


def _default_losses(*, taught: bool) -> tuple[Loss, ...]:
    """Hinton's, or the labels alone."""
    if not taught:
        return (LabelLoss(kind="labels"),)
    return SoftenedKl(kind="kl", weight=0.9), LabelLoss(kind="labels", weight=0.1)


def _agreement(logits: Tensor, classes: Tensor) -> float:
    return round(float((logits.argmax(1) == classes).double().mean()), 6)
