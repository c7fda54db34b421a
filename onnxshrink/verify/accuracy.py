"""The task metric, sample by sample, so that two models can be compared on the samples where they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxshrink.config.metrics import TaskMetric, name_of
from onnxshrink.core.errors import DataError
from onnxshrink.core.intervals import Floats
from onnxshrink.core.tensors import LABELS
from onnxshrink.data.reader import Reader
from onnxshrink.runtime.session import Session
from onnxshrink.verify.class_metrics import n_classes_of
from onnxshrink.verify.scored_output import Place
from onnxshrink.verify.task_metrics import Measure, measure_of

_MOST_NUMBERS = 1 << 20
_FEWEST_ROWS = 100


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What one model scored on each sample, in the reader's order.

    Attributes:
        metric: The task metric.
        values: ``(n_rows, k)`` float64, what the metric needs of each sample: right (1) or wrong (0) for top1 and top5,
            the mean absolute or squared error, answer and label for spearman, the cosine, the user's own score, or for
            f1 and miou the true positives, false positives and false negatives of each class. NaN where the model gave
            NaN. A row is a sample, but for f1 and miou of so many samples and classes that these would be more than
            1,048,576 numbers: there as many neighbours as are needed are added up in each row, and resampled together.
        n_samples: How many samples were scored.
        n_classes: Of top1 and top5, among how many classes the model chose; else None.
    """

    metric: TaskMetric
    values: Floats
    n_samples: int
    n_classes: int | None = None


def score(
    session: Session, reader: Reader, metric: TaskMetric, progress: Callable[[int, int], None] | None = None
) -> Scores:
    """Run the model on every sample and compare its answer with the label.

    The first output whose shape fits the metric is scored: ``(n, n_classes)`` for top1, top5 and f1,
    ``(n, n_classes, height, width)`` for miou, the labels' shape for the others. The user's own metric is given all.

    Args:
        session: The model.
        reader: Samples, opened with ``labels=True``: ``(n,)`` integers for top1, top5 and f1, ``(n, height, width)``
            for miou, else the output's shape; f1 also takes 0 and 1 in the output's shape.
        metric: The task metric.
        progress: Told the samples done and their total after each batch.

    Raises:
        ConfigError: The user's own metric fails, or gives something else than a number for each sample.
        DataError: Labels are missing or do not fit the model, the reader is empty or gives another number of samples
            than it has said, or there are too many classes.
        ModelError: No output can be scored with ``metric``.
    """
    measure, total = measure_of(metric), len(reader)
    rows, done, group, n_classes = np.zeros((0, 1)), 0, 1, None
    for batch in reader:
        if LABELS not in batch:
            raise DataError(
                f"the metric {name_of(metric)!r} needs labels", where=reader.where, fix=f"add an array named {LABELS!r}"
            )
        outputs, labels = session.run(batch), batch[LABELS]
        marks = measure.marks(outputs, labels, Place(session.name, reader.where, done))
        if not done:
            group = _samples_in_a_row(measure, total, marks.shape[1], where=reader.where)
            rows = np.zeros((-(-total // group), marks.shape[1]))
            n_classes = n_classes_of(outputs, measure.rank) if measure.rank else None
        first, done = done, done + len(marks)
        if done > total:
            raise _miscounted(total, f"{done} or more", where=reader.where)
        np.add.at(rows, np.arange(first, done) // group, marks)
        if progress:
            progress(done, total)
    if not done:
        raise DataError("there are no samples to score", where=reader.where, want="at least one sample")
    if done < total:
        raise _miscounted(total, str(done), where=reader.where)
    return Scores(metric, rows, done, n_classes)


def _miscounted(want: int, got: str, *, where: str) -> DataError:
    return DataError(
        "the evaluation data gave another number of samples when they were read again",
        where=where,
        got=f"{got} samples",
        want=f"{want} samples",
        fix="let the reader give the same batches each time it is iterated",
    )


def _samples_in_a_row(measure: Measure, n_samples: int, width: int, *, where: str) -> int:
    """How many neighbours are added up, so that memory does not grow with samples times classes.

    Raises:
        DataError: So few rows would be left that resampling them shows nothing.
    """
    if not measure.counts or n_samples * width <= _MOST_NUMBERS:
        return 1
    group = -(-n_samples * width // _MOST_NUMBERS)
    if n_samples // group < _FEWEST_ROWS:
        raise DataError(
            f"{width // 3} classes are too many to count for each sample",
            where=where,
            want=f"at most {_MOST_NUMBERS // _FEWEST_ROWS // 3} classes",
            fix="use top1, top5 or a metric of your own: {entry: …}",
        )
    return group
