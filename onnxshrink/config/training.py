"""How networks learn: the loop, the losses, the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from onnxshrink.config.base import Arguments, EntryPoint, FilePath, Model, Ratio

Task: TypeAlias = Literal["classification", "regression", "embedding", "tokens"]
"""What the network's first output is: logits `[batch, classes]`, values, a vector for each sample, or logits for each
token `[batch, tokens, classes]`."""


class EarlyStopping(Model):
    """End the training when it no longer helps, and keep the best weights that were seen."""

    patience: int = Field(default=3, gt=0)
    """Epochs without a better figure after which training ends."""
    held_out_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the samples that is only judged on and never learned from, drawn by the seed."""


class Training(Model):
    """How weights are learned: seeded, with a linear warm-up and a cosine decay of the learning rate."""

    epochs: int = Field(default=8, gt=0)
    """Passes over the training data."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=64, gt=0)
    """Samples per step, over all processes together."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum; the rate for SGD is often ten times that for AdamW, or more."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Of SGD."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Weight decay of matrices and kernels, decoupled in AdamW and part of the gradient in SGD; biases and the
    parameters of norms have none."""
    warm_up_ratio: Ratio = 0.05
    """Share of the steps in which the learning rate rises."""
    max_gradient_norm: float | None = Field(default=1.0, gt=0)
    """Longer gradients are scaled down to this norm; None leaves them."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Keep an exponential moving average of the weights, and give it as the result. It follows faster in the first
    `10 / (1 - decay)` steps. Buffers, such as the statistics of BatchNorm, are those of the last step."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bfloat16 on a GPU that has it, and float32 elsewhere. float16 needs a
    GPU. The weights and their updates are always float32."""
    early_stopping: EarlyStopping | None = None
    """Stop when held-out samples gain no more. None trains all epochs and keeps the last weights."""
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    """A killed run goes on from the last checkpoint; one is written every so many minutes."""


class Teacher(Model):
    """The network a student learns from: given with weights, or trained in place from labels."""

    factory: EntryPoint
    """`package.module:function` that returns a `torch.nn.Module` with the student's inputs."""
    args: Arguments = Field(default_factory=dict)
    """Keyword arguments of the factory."""
    weights: FilePath | None = None
    """State dict of a trained teacher."""
    train: Training | None = None
    """Train the teacher from the labels of `data.train` first. None uses it as it is."""


class LossTerm(Model):
    """One term of what is minimized."""

    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    tasks: ClassVar[tuple[Task, ...]] = ("classification", "regression", "embedding", "tokens")
    """Where it has a meaning."""

    weight: float = Field(default=1.0, gt=0)
    """What the term is multiplied by before all are added."""


class LabelLoss(LossTerm):
    """The labels: cross-entropy for classes and tokens, squared error for values."""

    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    tasks: ClassVar[tuple[Task, ...]] = ("classification", "regression", "tokens")

    kind: Literal["labels"]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of a class label's mass that is spread over all classes."""


class SoftenedKl(LossTerm):
    """The teacher's softened classes (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network")."""

    tasks: ClassVar[tuple[Task, ...]] = ("classification", "tokens")

    kind: Literal["kl"]
    temperature: float = Field(default=4.0, gt=0)
    """Softens both distributions; the loss is scaled by its square."""


class DecoupledKd(LossTerm):
    """Target and other classes apart (Zhao et al. 2022, "Decoupled Knowledge Distillation"); needs labels."""

    needs_labels: ClassVar[bool] = True
    tasks: ClassVar[tuple[Task, ...]] = ("classification", "tokens")

    kind: Literal["dkd"]
    temperature: float = Field(default=4.0, gt=0)
    """Softens both distributions; the loss is scaled by its square."""
    target_weight: float = Field(default=1.0, ge=0)
    """The paper's alpha: weight of target against all other classes."""
    other_weight: float = Field(default=8.0, ge=0)
    """The paper's beta: weight of the distribution among the other classes."""


class FeatureHint(LossTerm):
    """Features inside the networks, through a learned 1x1 adapter (Romero et al. 2015, "FitNets").

    The adapter is a convolution for maps `[batch, channels, height, width]`, averaged down to the smaller height and
    width of both, and a linear layer for tokens `[batch, tokens, channels]` and vectors `[batch, channels]`.
    """

    kind: Literal["hint"]
    student: str = Field(min_length=1)
    """Name of the student's module whose output learns."""
    teacher: str = Field(min_length=1)
    """Name of the teacher's module whose output is learned."""


class AttentionTransfer(LossTerm):
    """Where features are large (Zagoruyko and Komodakis 2017, "Paying More Attention to Attention").

    For maps, averaged down to the smaller height and width of both, and for tokens. The mean over positions of norm 1
    is small: the paper's weight is 1000.
    """

    kind: Literal["attention"]
    student: str = Field(min_length=1)
    """Name of the student's module whose output learns."""
    teacher: str = Field(min_length=1)
    """Name of the teacher's module whose output is learned."""


class OutputMse(LossTerm):
    """The mean squared difference of the outputs."""

    kind: Literal["mse"]


class OutputCosine(LossTerm):
    """One minus the cosine between the outputs, along the last axis."""

    kind: Literal["cosine"]


class EntryLoss(LossTerm):
    """The user's own: called with the student's outputs, the teacher's, and the labels; returns a scalar tensor."""

    needs_teacher: ClassVar[bool] = False

    kind: Literal["entry"]
    entry: EntryPoint
    """`package.module:function`, called as `fn(student, teacher, labels, **args)`: two tuples of outputs (the second
    None without a teacher), and the labels as the data has them or None."""
    args: Arguments = Field(default_factory=dict)
    """Keyword arguments of the function."""


Loss: TypeAlias = Annotated[
    LabelLoss | SoftenedKl | DecoupledKd | FeatureHint | AttentionTransfer | OutputMse | OutputCosine | EntryLoss,
    Field(discriminator="kind"),
]


class Learning(Training):
    """Training towards a sum of losses."""

    task: Task = "classification"
    """What the network's first output is."""
    teacher: Teacher | None = None
    """The network to learn from; None learns from labels alone."""
    averaged_with: tuple[Teacher, ...] = ()
    """Further teachers; the outputs of all are averaged (logits: the geometric mean of their classes), and named
    modules are the first one's."""
    losses: tuple[Loss, ...] = ()
    """What is minimized. None named: 0.9 `kl` and 0.1 `labels` for classes and tokens, 0.9 `mse` and 0.1 `labels` for
    values, `cosine` for embeddings; only `labels` without a teacher, only the teacher without labels."""

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """All whose outputs are averaged."""
        return (*(() if self.teacher is None else (self.teacher,)), *self.averaged_with)

    @property
    def terms(self) -> tuple[Loss, ...]:
        """The losses, or those of the task."""
        return self.losses or default_losses(self.task, taught=self.is_taught)

    @property
    def needs_labels(self) -> bool:
        """True if nothing can be learned as asked from data without labels."""
        terms = self.terms
        return (
            any(isinstance(loss, DecoupledKd) for loss in terms)
            or all(isinstance(loss, LabelLoss) for loss in terms)
            or any(teacher.train is not None for teacher in self.teachers)
        )

    @property
    def is_taught(self) -> bool:
        """True if there is something to learn from besides labels."""
        return bool(self.teachers)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for misfit in self._misfits():
            raise misfit
        return self

    def _misfits(self) -> Iterator[PydanticCustomError]:
        """Teachers and losses that are right by themselves and have no meaning here."""
        if self.teacher is None and self.averaged_with:
            yield _misfit("`averaged_with` names teachers, and `teacher` none", "the first of them as `teacher`")
        for loss in self.terms:
            if loss.needs_teacher and not self.is_taught:
                yield _misfit(
                    f"the loss {loss.kind!r} needs a teacher, and there is none",
                    "teacher: {factory: …, weights: …}",
                    "name a teacher, or leave `losses` out to learn from labels alone",
                )
            if self.task not in loss.tasks:
                yield _misfit(
                    f"the loss {loss.kind!r} has no meaning for task: {self.task}",
                    f"task: {' or '.join(loss.tasks)}; or another loss, such as mse, cosine, hint or entry",
                    None if self.losses else "name a teacher, or a loss of your own",
                )
        if self.task == "embedding" and any(teacher.train is not None for teacher in self.teachers):
            yield _misfit("labels cannot train a teacher of embeddings", "a trained teacher", "give it `weights`")


def default_losses(task: Task, *, taught: bool) -> tuple[Loss, ...]:
    """What is minimized where no loss is named.

    Args:
        task: What the network's first output is.
        taught: There is a teacher.
    """
    if not taught:
        return (LabelLoss(kind="labels"),)
    if task == "embedding":
        return (OutputCosine(kind="cosine"),)
    labels = LabelLoss(kind="labels", weight=0.1)
    return (OutputMse(kind="mse", weight=0.9) if task == "regression" else SoftenedKl(kind="kl", weight=0.9), labels)


def _misfit(what: str, want: str, fix: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("misfit", "{what}", {"what": what, "want": want, "fix": fix})
