"""Laws of the losses, against torch's own functions and plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from onnxshrink.stages.losses import (
    IGNORED,
    aligned,
    attention_distance,
    cosine_distance,
    decoupled_divergences,
    label_entropy,
    softened_divergence,
)

SMALL = settings(derandomize=True, deadline=None, max_examples=60)
TEMPERATURES = st.floats(0.5, 10)
SEEDS = st.integers(0, 10_000)


def normal(seed: int, *shape: int) -> Tensor:
    """Seeded, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: list[float], temperature: float) -> list[float]:
    """By the definition."""
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    """By the definition."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@SMALL
@given(SEEDS, st.integers(1, 4), st.integers(2, 5), TEMPERATURES)
def test_the_softened_divergence_is_hintons(seed: int, batch: int, classes: int, temperature: float) -> None:
    """Against plain Python: T² times the mean over the batch of sum p · log(p / q); nothing between equals."""
    ours, theirs = normal(seed, batch, classes) * 4, normal(seed + 1, batch, classes) * 4
    expected = [
        divergence(softmax(p, temperature), softmax(q, temperature))
        for p, q in zip(theirs.tolist(), ours.tolist(), strict=True)
    ]
    found = float(softened_divergence(ours, theirs, temperature))
    assert found == pytest.approx(temperature**2 * sum(expected) / batch, rel=1e-6, abs=1e-9)
    assert float(softened_divergence(ours, ours, temperature)) == pytest.approx(0, abs=1e-9)


def test_the_divergence_is_that_of_torch() -> None:
    """The same number as `kl_div` on probabilities, and tokens count like samples."""
    ours, theirs = normal(2, 6, 7), normal(3, 6, 7)
    expected = 9 * functional.kl_div((ours / 3).log_softmax(1), (theirs / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(softened_divergence(ours, theirs, 3.0), expected)
    torch.testing.assert_close(softened_divergence(ours.view(2, 3, 7), theirs.view(2, 3, 7), 3.0), expected)


@SMALL
@given(SEEDS, st.integers(1, 4), st.integers(2, 5), TEMPERATURES)
def test_the_decoupled_divergences_are_zhaos(seed: int, batch: int, classes: int, temperature: float) -> None:
    """Against plain Python: of [p_t, 1 - p_t], and of the others' probabilities among themselves."""
    ours, theirs = normal(seed, batch, classes) * 3, normal(seed + 1, batch, classes) * 3
    labels = torch.arange(batch) % classes
    target = others = 0.0
    for q_row, p_row, label in zip(ours.tolist(), theirs.tolist(), labels.tolist(), strict=True):
        q, p = softmax(q_row, temperature), softmax(p_row, temperature)
        target += divergence([p[label], 1 - p[label]], [q[label], 1 - q[label]]) / batch
        rest_p = [value / (1 - p[label]) for at, value in enumerate(p) if at != label]
        rest_q = [value / (1 - q[label]) for at, value in enumerate(q) if at != label]
        others += divergence(rest_p, rest_q) / batch
    found = decoupled_divergences(ours, theirs, labels, temperature)
    scale = temperature**2
    assert [float(value) for value in found] == pytest.approx([scale * target, scale * others], rel=1e-5, abs=1e-8)


@SMALL
@given(SEEDS, st.integers(2, 6), TEMPERATURES)
def test_the_two_parts_make_the_whole(seed: int, classes: int, temperature: float) -> None:
    """For one sample, KD = TCKD + (1 - p_t) · NCKD: equation 5 of the paper."""
    ours, theirs = normal(seed, 1, classes) * 3, normal(seed + 1, 1, classes) * 3
    label = seed % classes
    target, others = decoupled_divergences(ours, theirs, torch.tensor([label]), temperature)
    rest = 1 - float((theirs / temperature).softmax(1)[0, label])
    whole = float(softened_divergence(ours, theirs, temperature))
    assert float(target) + rest * float(others) == pytest.approx(whole, rel=1e-6, abs=1e-9)


def test_decoupled_parts_of_tokens_leave_out_those_without_label() -> None:
    """Only labelled tokens count; where none has a label both parts are 0 and have gradients all the same."""
    ours, theirs = normal(4, 2, 3, 5).requires_grad_(), normal(5, 2, 3, 5)
    labels = torch.tensor([[1, IGNORED, 4], [IGNORED, 0, IGNORED]])
    counted = labels != IGNORED
    expected = decoupled_divergences(ours[counted], theirs[counted], labels[counted], 2.0)
    torch.testing.assert_close(decoupled_divergences(ours, theirs, labels, 2.0), expected)
    nothing = decoupled_divergences(ours, theirs, torch.full((2, 3), IGNORED), 2.0)
    assert [value.item() for value in nothing] == [0.0, 0.0]
    sum(nothing).backward()  # type: ignore[union-attr]
    assert ours.grad is not None
    assert not ours.grad.any()


def test_sure_logits_stay_finite() -> None:
    """A target of probability 1 in float32 has finite parts and gradients."""
    ours = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    parts = decoupled_divergences(ours, torch.tensor([[-200.0, 0.0, 200.0]]), torch.tensor([0]), 1.0)
    sum(parts).backward()  # type: ignore[union-attr]
    assert all(math.isfinite(part.item()) for part in parts)
    assert ours.grad is not None
    assert ours.grad.isfinite().all()


@SMALL
@given(SEEDS, st.sampled_from([0.0, 0.1, 0.5]))
def test_label_entropy_is_torchs(seed: int, smoothing: float) -> None:
    """As `cross_entropy`, for samples and for tokens with and without labels; 0 where no token has one."""
    logits, labels = normal(seed, 6, 4), torch.arange(6) % 4
    expected = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(label_entropy(logits, labels, smoothing), expected)
    labels[seed % 6] = IGNORED
    expected = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(label_entropy(logits.view(2, 3, 4), labels.view(2, 3), smoothing), expected)
    assert float(label_entropy(logits, torch.full((6,), IGNORED), smoothing)) == 0.0


@SMALL
@given(SEEDS, st.floats(0.1, 10))
def test_attention_sees_where_and_not_how_much(seed: int, factor: float) -> None:
    """Against plain Python; scale, sign and order of the channels do not matter, and equal maps have no distance."""
    ours, theirs = normal(seed, 2, 3, 2, 2), normal(seed + 1, 2, 5, 2, 2)
    expected = 0.0
    for sample in range(2):
        units = []
        for features in (ours[sample], theirs[sample]):
            sums = [sum(float(c[y, x]) ** 2 for c in features) for y in range(2) for x in range(2)]
            norm = math.sqrt(sum(value**2 for value in sums))
            units.append([value / norm for value in sums])
        expected += sum((a - b) ** 2 for a, b in zip(*units, strict=True)) / 8
    assert float(attention_distance(ours, theirs)) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(attention_distance(ours.flip(1) * -factor, theirs), attention_distance(ours, theirs))
    assert float(attention_distance(ours, ours * factor)) == pytest.approx(0, abs=1e-12)
    tokens = [features.flatten(2).transpose(1, 2) for features in (ours, theirs)]
    torch.testing.assert_close(attention_distance(*tokens), attention_distance(ours, theirs))


@SMALL
@given(SEEDS, st.tuples(st.integers(1, 5), st.integers(1, 5)), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_maps_meet_at_the_smaller_size(seed: int, ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    """Each axis takes the smaller length, channels stay, and what has that size already is not touched."""
    student, teacher = normal(seed, 2, 3, *ours), normal(seed, 2, 4, *theirs)
    size = (min(ours[0], theirs[0]), min(ours[1], theirs[1]))
    a, b = aligned(student, teacher)
    assert (a.shape, b.shape) == ((2, 3, *size), (2, 4, *size))
    if ours == size:
        torch.testing.assert_close(a, student)
    torch.testing.assert_close(aligned(a, b)[1], b)


@SMALL
@given(SEEDS, st.floats(0.1, 10))
def test_the_cosine_sees_directions_alone(seed: int, factor: float) -> None:
    """Against plain Python, along the last axis; lengths do not matter."""
    ours, theirs = normal(seed, 2, 3, 4), normal(seed + 1, 2, 3, 4)
    cosines = []
    for a, b in zip(ours.reshape(-1, 4).tolist(), theirs.reshape(-1, 4).tolist(), strict=True):
        cosines.append(sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b)))
    assert float(cosine_distance(ours * factor, theirs)) == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-6)
    assert float(cosine_distance(ours, ours)) == pytest.approx(0, abs=1e-9)
