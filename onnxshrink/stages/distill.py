"""Distillation: a small network learns the outputs of a large one, softened so that near misses count too."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.nn import functional

from onnxshrink.config.source import FactorySource, InputSettings
from onnxshrink.config.stages import Distill, Finetune, Teacher
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import ModelError
from onnxshrink.data.labels import check_labels
from onnxshrink.runtime.torch_model import count_parameters, load_network, read_architecture, save_network
from onnxshrink.stages.context import Context
from onnxshrink.stages.training import predict, read_samples, train


def distill(settings: Distill, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Train the network of ``source`` towards the teacher's outputs, and towards the labels where there are any.

    Raises:
        ModelError: The teacher cannot be built, or its logits do not fit the student's.
        DataError: The samples or labels do not fit.
        TrainingError: The loss is not finite.
    """
    return learn(settings, source, out, ctx)


def learn(settings: Distill | Finetune, source: Artifact, out: Path, ctx: Context) -> Facts:
    """What `distill` and `finetune` share: training on a teacher's logits, on labels, or on both.

    The teacher sees every sample once, before the training: nothing changes the samples from epoch to epoch.
    """
    teacher, alpha = (settings.teacher, settings.alpha) if settings.teacher is not None else (None, 0.0)
    network, architecture = load_network(source)
    samples = read_samples(
        ctx, architecture.inputs, labels="needed" if teacher is None else "wanted" if alpha < 1.0 else "unused"
    )
    before = predict(network, samples)
    labels = samples.labels
    if labels is not None:
        check_labels(labels.numpy(), n_samples=len(labels), n_classes=before.shape[1], where=samples.where)
    facts: Facts = {"samples": len(samples), "parameters": count_parameters(network)}
    taught: Tensor | None = None
    if teacher is not None:
        taught = predict(load_network(teacher_of(teacher, source, ctx))[0], samples)
        if taught.shape != before.shape:
            raise ModelError(
                "the teacher's logits do not fit the student's",
                where=teacher.factory,
                got=f"{taught.shape[1]} logits",
                want=f"{before.shape[1]}, as the student has",
                fix="give both the same number of classes in `args`",
            )
        if labels is None and alpha < 1.0:
            alpha = 1.0
            facts["declined"] = ["labels: data.train has none, so the teacher has all the weight"]
        facts |= {"alpha": alpha, "temperature": settings.temperature}

    def loss(logits: Tensor, chosen: Tensor) -> Tensor:
        value = logits.new_zeros(())
        if taught is not None and alpha > 0.0:
            value = value + alpha * softened_divergence(logits, taught[chosen], settings.temperature)
        if labels is not None and alpha < 1.0:
            value = value + (1.0 - alpha) * functional.cross_entropy(
                logits, labels[chosen], label_smoothing=settings.label_smoothing
            )
        return value

    facts["epochs"] = train(network, samples, loss, settings, ctx)
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


def softened_divergence(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """``T² · KL(softmax(taught / T) || softmax(logits / T))``, the mean over the batch.

    Args:
        logits: The student's, ``(batch, classes)``.
        taught: The teacher's, of the same shape.
        temperature: ``T``, above 0; its square keeps the gradient's size as ``T`` grows.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    student = functional.log_softmax(logits / temperature, dim=1)
    teacher = functional.log_softmax(taught / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _agreement(logits: Tensor, classes: Tensor) -> float:
    return round(float((logits.argmax(1) == classes).double().mean()), 6)
