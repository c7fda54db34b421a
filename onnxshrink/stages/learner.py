"""A student: what flows from its outputs and modules, and from its teachers', into the terms of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional

from onnxshrink.config.training import (
    AttentionTransfer,
    DecoupledKd,
    EntryLoss,
    FeatureHint,
    LabelLoss,
    Loss,
    OutputCosine,
    OutputMse,
    SoftenedKl,
    Task,
)
from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import ModelError
from onnxshrink.core.importing import load_entry
from onnxshrink.stages.acceleration import make_accelerator
from onnxshrink.stages.features import Seen, observe
from onnxshrink.stages.loop import Learner
from onnxshrink.stages.losses import (
    aligned,
    attention_distance,
    cosine_distance,
    decoupled_divergences,
    label_entropy,
    softened_divergence,
)
from onnxshrink.stages.named_modules import find_modules
from onnxshrink.stages.samples import Samples, TrainingBatch
from onnxshrink.stages.tasks import figure, form_of, misses, require_answer
from onnxshrink.stages.teachers import Teachers


class Student(Learner):
    """A network that learns from teachers, from labels, or from both.

    Args:
        network: The student.
        losses: The terms. Labels that they need are in every batch.
        task: What the network's first output is.
        example: Two samples, on which everything is tried before the training.
        teachers: Whom to learn from; None without a term that needs one.
        seed: Of the adapters' first weights.

    Raises:
        ConfigError: A user's loss cannot be imported, or a term names a module that is not there.
        ModelError: An output or a module's features do not fit a term.
    """

    def __init__(
        self,
        network: nn.Module,
        losses: Sequence[Loss],
        task: Task,
        example: TrainingBatch,
        *,
        teachers: Teachers | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(network.eval())
        self.terms = _named(losses)
        self.task = task
        self._teachers = teachers
        self._calls = {name: load_entry(loss.entry) for name, loss in self.terms.items() if isinstance(loss, EntryLoss)}
        self._count = None if self._calls else 1
        hints = [loss for loss in losses if isinstance(loss, (FeatureHint, AttentionTransfer))]
        for loss in hints:
            find_modules(network, [loss.student], option=f"{loss.kind}.student", where="losses")
            if teachers is not None:
                find_modules(teachers.networks[0], [loss.teacher], option=f"{loss.kind}.teacher", where="losses")
        self._watched = tuple(dict.fromkeys(loss.student for loss in hints))
        self._teachers_watched = tuple(dict.fromkeys(loss.teacher for loss in hints))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            seen = observe(network, example.inputs, self._watched)
            require_answer(seen.outputs[0], task, where=type(network).__name__)
            taught = self._taught(example)
            fit = {name: _fit(loss, seen, taught) for name, loss in self.terms.items() if taught is not None}
        self.adapters = nn.ModuleDict({name: adapter for name, adapter in fit.items() if adapter is not None})
        if self._calls:
            with torch.enable_grad():
                self(example)

    def keep(self, samples: Samples) -> bool:
        """See `Teachers.keep`; features are not kept."""
        return self._teachers is not None and not self._watched and self._teachers.keep(samples, count=self._count)

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Every term of the loss, weighted, by its kind; the second of a kind is ``kind_2``."""
        seen, taught = observe(self.network, batch.inputs, self._watched), self._taught(batch)
        return {
            name: loss.weight * self._term(name, loss, seen, taught, batch.labels) for name, loss in self.terms.items()
        }

    def judge(self, batch: TrainingBatch) -> Tensor:
        """How far each answer is from its label, or from the teacher's where no label is learned: see `misses`.

        The loss where there is neither.
        """
        answer = observe(self.network, batch.inputs).outputs[0]
        wanted = self._wanted(answer, batch)
        if not wanted:
            return super().judge(batch)
        missed, counted = misses(answer, next(iter(wanted.values())), self.task)
        return missed / counted.clamp(min=1)

    @torch.no_grad()
    def figures(self, samples: Samples) -> Facts:
        """How near the network, in eval mode, is to the labels and to the teachers, over all samples."""
        device = make_accelerator().device
        self.network.to(device).eval()
        sums: dict[str, tuple[float, float]] = {}
        for batch in samples.in_order(device):
            answer = observe(self.network, batch.inputs).outputs[0]
            for name, wanted in self._wanted(answer, batch).items():
                missed, counted = (float(values.double().sum()) for values in misses(answer, wanted, self.task))
                before = sums.get(name, (0.0, 0.0))
                sums[name] = before[0] + missed, before[1] + counted
        self.network.cpu()
        return {name: figure(missed / max(counted, 1), self.task) for name, (missed, counted) in sums.items()}

    def _wanted(self, answer: Tensor, batch: TrainingBatch) -> dict[str, Tensor]:
        """What the answer can be compared with, by the figure's name: labels that are learned, then the teacher's."""
        by_label, by_teacher = _FIGURES[self.task]
        wanted: dict[str, Tensor] = {}
        if batch.labels is not None and any(loss.needs_labels for loss in self.terms.values()):
            wanted[by_label] = batch.labels
        taught = self._taught(batch)
        if taught is not None and taught.outputs[0].shape == answer.shape:
            wanted[by_teacher] = taught.outputs[0]
        return wanted

    def _taught(self, batch: TrainingBatch) -> Seen | None:
        return None if self._teachers is None else self._teachers(batch, self._teachers_watched, count=self._count)

    def _term(self, name: str, loss: Loss, seen: Seen, taught: Seen | None, labels: Tensor | None) -> Tensor:
        answer = seen.outputs[0]
        if isinstance(loss, EntryLoss):
            return self._own(name, loss, seen, taught, labels)
        if isinstance(loss, LabelLoss):
            assert labels is not None  # noqa: S101  # `learn` reads them for this term, or drops it
            if self.task == "regression":
                return functional.mse_loss(answer, labels.reshape(answer.shape).to(answer.dtype))
            return label_entropy(answer, labels, loss.label_smoothing)
        assert taught is not None  # noqa: S101  # the config is refused without a teacher
        wanted = taught.outputs[0]
        match loss:
            case SoftenedKl():
                return softened_divergence(answer, wanted, loss.temperature)
            case DecoupledKd():
                assert labels is not None  # noqa: S101  # data without them is refused
                target, others = decoupled_divergences(answer, wanted, labels, loss.temperature)
                return loss.target_weight * target + loss.other_weight * others
            case FeatureHint():
                ours, theirs = aligned(seen.features[loss.student], taught.features[loss.teacher])
                return functional.mse_loss(self.adapters[name](ours), theirs)
            case AttentionTransfer():
                return attention_distance(seen.features[loss.student], taught.features[loss.teacher])
            case OutputMse():
                return functional.mse_loss(answer, wanted)
            case OutputCosine():
                return cosine_distance(answer, wanted)
            case _:
                assert_never(loss)

    def _own(self, name: str, loss: EntryLoss, seen: Seen, taught: Seen | None, labels: Tensor | None) -> Tensor:
        """The user's loss, or what is wrong with it."""
        outputs = None if taught is None else taught.outputs
        try:
            value: Any = self._calls[name](seen.outputs, outputs, labels, **loss.args)
        except (Exception, SystemExit) as e:  # a user's function may raise anything
            raise ModelError(
                f"the loss failed: {type(e).__name__}: {e}",
                where=loss.entry,
                got=f"outputs {', '.join(map(form_of, seen.outputs))}, "
                f"taught {'None' if outputs is None else ', '.join(map(form_of, outputs))}, "
                f"labels {'None' if labels is None else form_of(labels)}, args {dict(loss.args)}",
                want="fn(student, teacher, labels, **args)",
            ) from e
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            raise ModelError(
                "the loss gives no scalar",
                where=loss.entry,
                got=form_of(value) if isinstance(value, Tensor) else type(value).__name__,
                want="a floating tensor without axes",
                fix="return its mean" if isinstance(value, Tensor) and value.is_floating_point() else None,
            )
        if torch.is_grad_enabled() and not value.requires_grad and seen.outputs[0].requires_grad:
            raise ModelError(
                "the loss does not depend on the student",
                where=loss.entry,
                want="a scalar computed from the student's outputs",
                fix="leave `detach`, `item` and numpy out of it",
            )
        return value


_FIGURES: Mapping[Task, tuple[str, str]] = {
    "classification": ("train_accuracy", "teacher_agreement"),
    "tokens": ("train_accuracy", "teacher_agreement"),
    "regression": ("train_rmse", "teacher_rmse"),
    "embedding": ("train_cosine", "teacher_cosine"),
}


def _fit(loss: Loss, seen: Seen, taught: Seen) -> nn.Module | None:
    """The adapter that a hint learns; None for other terms. Refuses two sides that do not fit."""
    if isinstance(loss, (FeatureHint, AttentionTransfer)):
        return _fit_features(loss, seen.features[loss.student], taught.features[loss.teacher])
    ours, theirs = seen.outputs[0], taught.outputs[0]
    if not loss.needs_teacher:
        return None
    if ours.shape != theirs.shape:
        raise ModelError(
            "the teacher's first output does not fit the student's",
            where=f"losses, {loss.kind}",
            got=form_of(theirs),
            want=f"{form_of(ours)}, as the student's",
            fix="give both the same in `args`, or learn from its modules: {kind: hint, student: …, teacher: …}",
        )
    if isinstance(loss, OutputCosine) and (ours.ndim < 2 or ours.shape[-1] < 2):
        raise ModelError("one value for each sample has no direction", where="losses, cosine", got=form_of(ours))
    return None


def _fit_features(loss: FeatureHint | AttentionTransfer, ours: Tensor, theirs: Tensor) -> nn.Module | None:
    ranks = (2, 3, 4) if isinstance(loss, FeatureHint) else (3, 4)
    axes = 2 if ours.ndim == 3 else 1  # samples, and tokens
    if ours.ndim not in ranks or ours.ndim != theirs.ndim or ours.shape[:axes] != theirs.shape[:axes]:
        raise ModelError(
            f"the features of {loss.student!r} and {loss.teacher!r} do not fit",
            where=f"losses, {loss.kind}",
            got=f"student {form_of(ours)}, teacher {form_of(theirs)}",
            want="maps [batch, channels, height, width], or as many tokens [batch, tokens, channels]"
            + (", or vectors [batch, channels]" if 2 in ranks else ""),
            fix="name modules whose outputs stand for the same thing",
        )
    if isinstance(loss, AttentionTransfer):
        return None
    if ours.ndim == 4:
        return nn.Conv2d(ours.shape[1], theirs.shape[1], 1)
    return nn.Linear(ours.shape[-1], theirs.shape[-1])


def _named(losses: Sequence[Loss]) -> dict[str, Loss]:
    """Each by its kind; of several of a kind the later ones are numbered."""
    kinds = [loss.kind for loss in losses]
    counts = [kinds[:at].count(kind) for at, kind in enumerate(kinds)]
    return {
        f"{loss.kind}_{count + 1}" if count else loss.kind: loss for loss, count in zip(losses, counts, strict=True)
    }
