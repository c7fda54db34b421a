"""How networks learn: the loop, the losses, the teacher."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from onnxshrink.config.base import Arguments, EntryPoint, FilePath, Model, Ratio

Task: TypeAlias = Literal["classification", "regression", "embedding", "tokens"]
"""What the network's first output is: logits `[batch, classes]`, values, a vector for each sample, or logits for each
token `[batch, tokens, classes]`."""


class EarlyStopping(Model):
    """End the training when it no longer helps, and keep the best weights that were seen."""

    patience: int = Field(default=3, gt=0)
    """Epochs without a better figure after which training ends."""
    held_out_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the samples that is only judged on and never learned from."""


class Training(Model):
    """How weights are learned: seeded, with a linear warm-up and a cosine decay of the learning rate."""

    epochs: int = Field(default=8, gt=0)
    """Passes over the training data."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=64, gt=0)
    """Samples per step, over all processes together."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Of SGD."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay of matrices and kernels; biases and the parameters of norms have none."""
    warm_up_ratio: Ratio = 0.05
    """Share of the steps in which the learning rate rises."""
    max_gradient_norm: float | None = Field(default=1.0, gt=0)
    """Longer gradients are scaled down to this norm; None leaves them."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Keep an exponential moving average of the weights with this decay, and give it as the result."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bfloat16 on a GPU that has it, and float32 elsewhere."""
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

    weight: float = Field(default=1.0, gt=0)
    """What the term is multiplied by before all are added."""


class LabelLoss(LossTerm):
    """The labels: cross-entropy for classes and tokens, squared error for values."""

    kind: Literal["labels"]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of a class label's mass that is spread over all classes."""


class SoftenedKl(LossTerm):
    """The teacher's softened classes (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network")."""

    kind: Literal["kl"]
    temperature: float = Field(default=4.0, gt=0)
    """Softens both distributions; the loss is scaled by its square."""


class DecoupledKd(LossTerm):
    """Target and other classes apart (Zhao et al. 2022, "Decoupled Knowledge Distillation"); needs labels."""

    kind: Literal["dkd"]
    temperature: float = Field(default=4.0, gt=0)
    """Softens both distributions; the loss is scaled by its square."""
    target_weight: float = Field(default=1.0, ge=0)
    """The paper's alpha: weight of target against all other classes."""
    other_weight: float = Field(default=8.0, ge=0)
    """The paper's beta: weight of the distribution among the other classes."""


class FeatureHint(LossTerm):
    """Features inside the networks, through a learned 1x1 adapter (Romero et al. 2015, "FitNets")."""

    kind: Literal["hint"]
    student: str = Field(min_length=1)
    """Name of the student's module whose output learns."""
    teacher: str = Field(min_length=1)
    """Name of the teacher's module whose output is learned."""


class AttentionTransfer(LossTerm):
    """Where features are large (Zagoruyko and Komodakis 2017, "Paying More Attention to Attention")."""

    kind: Literal["attention"]
    student: str = Field(min_length=1)
    """Name of the student's module whose output learns."""
    teacher: str = Field(min_length=1)
    """Name of the teacher's module whose output is learned; both need the same height and width."""


class OutputMse(LossTerm):
    """The mean squared difference of the outputs."""

    kind: Literal["mse"]


class OutputCosine(LossTerm):
    """One minus the cosine between the outputs, along the last axis."""

    kind: Literal["cosine"]


class EntryLoss(LossTerm):
    """The user's own: called with the student's outputs, the teacher's, and the labels; returns a scalar tensor."""

    kind: Literal["entry"]
    entry: EntryPoint
    """`package.module:function`, called as `fn(student, teacher, labels, **args)`: two tuples of tensors (the second
    None without a teacher) and a tensor or None."""
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
    losses: tuple[Loss, ...] = ()
    """What is minimized. None named: 0.9 `kl` and 0.1 `labels` for classes and tokens, 0.9 `mse` and 0.1 `labels` for
    values, `cosine` for embeddings; only `labels` without a teacher, only the teacher without labels."""
