"""Errors of every piece of a candidate, its inputs taken from the reference, and of the candidate as it runs.

The tensors are looked at in windows: only those of one window are fetched, one batch at a time, so that memory follows
the window's size and neither the number of samples nor the depth of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import Array, Batch
from onnxshrink.data.batching import n_samples
from onnxshrink.data.reader import Reader
from onnxshrink.runtime.session import Session
from onnxshrink.verify.alone import Switches
from onnxshrink.verify.pairing import Pair, Piece, showing
from onnxshrink.verify.pieces import VERSIONS, Grid, feed_name, grid_of, pieces_model, result_name
from onnxshrink.verify.products import Product, product_of

_COPIES = 14  # of a piece's result at once: five runs' in float32 and their differences in float64

_INJECTED = 8
"""Samples on which each piece alone is carried on to the outputs: that is one more run of the reference for each."""

_MASK = 1e30
"""Values beyond stand for infinity, as in attention masks of ``finfo.min``: they are compared, and not summed up."""

_HALF_MASK = 1e4

Deployed = Callable[[bytes], Session]
"""Opens the pieces as the candidate is deployed: with every optimization of ONNX Runtime."""


@dataclass(slots=True)
class GridError:
    """What storing one tensor on its grid does, with the reference's values.

    Attributes:
        grid: The grid.
        size: Values.
        signal: Sum of their squares.
        rounding: Sum of the squared errors of values within the grid's range.
        clipping: The same of values beyond it, by more than half a step.
        clipped: How many those are.
        lo: Least value.
        hi: Greatest.
    """

    grid: Grid
    size: int = 0
    signal: float = 0.0
    rounding: float = 0.0
    clipping: float = 0.0
    clipped: int = 0
    lo: float = math.inf
    hi: float = -math.inf

    @property
    def noise(self) -> float:
        """Error energy over signal energy."""
        return ratio(self.rounding + self.clipping, self.signal)

    @property
    def used_ratio(self) -> float:
        """Share of the grid's width that the values use, 0 to 1."""
        width = self.grid.hi - self.grid.lo
        return max(0.0, min(self.hi, self.grid.hi) - max(self.lo, self.grid.lo)) / width if width else 0.0

    def update(self, values: Array) -> None:
        """Count these values, which the tensor has in the reference."""
        exact = values.astype(np.float64)
        exact = exact[np.abs(exact) < _MASK]
        if not exact.size:
            return
        squares = np.square(self.grid.restored(self.grid.stored(exact)) - exact)
        margin = self.grid.scale / 2
        outside = (exact > self.grid.hi + margin) | (exact < self.grid.lo - margin)
        self.size += exact.size
        self.signal += float(np.square(exact).sum())
        self.clipping += float(squares[outside].sum())
        self.rounding += float(squares[~outside].sum())
        self.clipped += int(outside.sum())
        self.lo, self.hi = min(self.lo, float(exact.min())), max(self.hi, float(exact.max()))


@dataclass(slots=True)
class PieceError:
    """Sums of squares over all samples of one piece.

    Attributes:
        piece: The piece.
        product: Its product with constant weights, if it has one.
        output: What storing its result does; None where it stays in float.
        signal: Of the reference's values.
        local: Of the deployed piece's error on the reference's inputs.
        weights: Of the part that stored weights and biases make.
        inputs: Of the part that storing the inputs makes.
        kernel: Of what the deployed kernels compute otherwise than the same operators one by one.
        saturation: Of what the products would lose on x86 without VNNI, emulated; 0 where that was not asked for.
        accumulated: Largest sum of a product as a share of what int32 holds.
        propagated: Of the error in the candidate as it runs.
        alone: For each output of the model its signal, and the error if this piece alone were the candidate's.
    """

    piece: Piece
    product: Product | None = None
    output: GridError | None = None
    signal: float = 0.0
    local: float = 0.0
    weights: float = 0.0
    inputs: float = 0.0
    kernel: float = 0.0
    saturation: float = 0.0
    accumulated: float = 0.0
    propagated: float = 0.0
    alone: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def local_noise(self) -> float:
        """Local error energy over signal energy, emulated saturation included."""
        return ratio(self.local + self.saturation, self.signal)

    @property
    def contribution(self) -> float:
        """Noise of the worst output if this piece alone were the candidate's, its emulated saturation scaled in."""
        noise = max((ratio(error, signal) for signal, error in self.alone.values()), default=0.0)
        return noise * (1 + self.saturation / self.local) if self.local and math.isfinite(noise) else noise


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was summed up.

    Attributes:
        pieces: In the candidate's order.
        grids: Candidate's tensor, before it is quantized, to what storing it does.
        samples: Samples that were run.
        windows: Windows that they were looked at in.
        output: Of each output of the reference: signal, error of the candidate.
    """

    pieces: tuple[PieceError, ...]
    grids: Mapping[str, GridError]
    samples: int
    windows: int
    output: Mapping[str, tuple[float, float]]


def ratio(error: float, signal: float) -> float:
    """Error over signal; infinite where only the signal is zero."""
    if error == 0:
        return 0.0
    return error / signal if signal else math.inf


def energy(reference: Array, other: Array) -> float:
    """Sum of the squared differences; marks of a mask agree with each other, what is no number is infinitely wrong."""
    left, right = (np.clip(values.astype(np.float64), -_MASK, _MASK) for values in (reference, other))
    marks = (np.abs(left) >= _MASK) & (right * np.sign(left) >= _HALF_MASK)  # float16 cannot hold the larger ones
    total = float(np.square(np.where(marks, 0.0, left - right)).sum())
    return total if math.isfinite(total) else math.inf


def as_dtype(values: Array, dtype: str) -> Array:
    """Values in another type; floats beyond its range become its largest ones, as they mark a mask."""
    if np.dtype(dtype).kind == values.dtype.kind == "f" and np.dtype(dtype).itemsize < values.dtype.itemsize:
        values = np.clip(values, np.finfo(dtype).min, np.finfo(dtype).max)
    return values.astype(dtype, copy=False)


def signal_of(values: Array) -> float:
    """Sum of the squares of what is no mark of a mask."""
    exact = values.astype(np.float64)
    return float(np.square(exact[np.abs(exact) < _MASK]).sum())


def _added(before: tuple[float, float], reference: Array, other: Array) -> tuple[float, float]:
    return before[0] + signal_of(reference), before[1] + energy(reference, other)


def windows_of(pair: Pair, max_bytes: int) -> Iterator[dict[int, Piece]]:
    """The pieces in order, each with its number, in windows whose tensors fit in memory; one piece at least.

    A tensor whose size nobody can infer counts as the largest that is known.
    """
    sizes = {
        name: math.prod(dim for dim in spec.shape if isinstance(dim, int)) * 4
        for name, spec in pair.candidate.specs.items()
        if all(isinstance(dim, int) for dim in spec.shape)
    }
    largest = max(sizes.values(), default=0)
    window: dict[int, Piece] = {}
    used = 0
    for place, piece in enumerate(pair.pieces):
        read = sum(sizes.get(name, largest) for name in piece.inputs)
        cost = 2 * read + _COPIES * sizes.get(piece.tensor, largest)
        if window and used + cost > max_bytes:
            yield window
            window, used = {}, 0
        window[place] = piece
        used += cost
    if window:
        yield window


def measure_pieces(
    pair: Pair,
    reader: Reader,
    *,
    max_bytes: int,
    emulate_saturation: bool,
    deployed: Deployed,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Run every piece on the reference's tensors, and the candidate beside it.

    Args:
        pair: Both models.
        reader: Samples for the reference; iterated once for each window.
        max_bytes: What the tensors of a window may take.
        emulate_saturation: Emulate x86 processors without VNNI.
        deployed: Opens a model as the candidate is deployed.
        progress: Told the windows done and their total.

    Raises:
        DataError: There are no samples.
    """
    found = [_start(piece, pair) for piece in pair.pieces]
    grids = _grids(found, pair)
    windows = list(windows_of(pair, max_bytes))
    outputs = dict.fromkeys(pair.outputs, (0.0, 0.0))
    samples = 0
    for number, window in enumerate(windows):
        runs = _Window(pair, window, deployed, first=number == 0)
        injected = 0
        for batch in reader:
            values = runs.values(batch)
            for place in window:
                _count(found[place], place, values, emulate_saturation=emulate_saturation)
            if injected < _INJECTED:
                runs.inject({place: found[place] for place in window}, values)
                injected += n_samples(batch, pair.reference.inputs)
            if number == 0:
                samples += n_samples(batch, pair.reference.inputs)
                _count_ends(pair, grids, outputs, values)
        if progress is not None:
            progress(number + 1, len(windows))
    if not samples:
        raise DataError("there are no samples to compare the models on", where=reader.where, want="at least one sample")
    return Measured(tuple(found), grids, samples, len(windows), outputs)


def _grids(found: Sequence[PieceError], pair: Pair) -> dict[str, GridError]:
    grids = {error.piece.tensor: error.output for error in found if error.output is not None}
    for name in (spec.name for spec in pair.candidate.inputs):
        quantizer = pair.candidate.quantizer(name)
        grid = grid_of(quantizer, pair.candidate) if quantizer is not None else None
        if grid is not None:
            grids[name] = GridError(grid)
    return grids


def _count_ends(
    pair: Pair, grids: Mapping[str, GridError], outputs: dict[str, tuple[float, float]], values: _Values
) -> None:
    """Count the model's inputs, where they are quantized, and its outputs."""
    for name, grid_error in grids.items():
        if name not in pair.candidate.maker:
            grid_error.update(values.reference[pair.stands_for[name]])
    for theirs, before in outputs.items():
        outputs[theirs] = _added(before, values.reference[theirs], values.candidate[pair.outputs[theirs]])


def _start(piece: Piece, pair: Pair) -> PieceError:
    grid = grid_of(piece.quantizer, pair.candidate) if piece.quantizer is not None else None
    return PieceError(piece, product_of(piece, pair), GridError(grid) if grid is not None else None)


@dataclass(frozen=True, slots=True)
class _Values:
    """Tensors of one window on one batch.

    Attributes:
        reference: By the reference's names.
        candidate: By the candidate's names, integers where ``QuantizeLinear`` makes them.
        results: Of the pieces one by one, by `result_name`.
        deployed: Of the deployed pieces, likewise.
    """

    reference: Mapping[str, Array]
    candidate: Mapping[str, Array]
    results: Mapping[str, Array]
    deployed: Mapping[str, Array]


class _Window:
    """The sessions of one window."""

    def __init__(self, pair: Pair, window: Mapping[int, Piece], deployed: Deployed, *, first: bool) -> None:
        self._pair = pair
        self._window = window
        wanted = [name for piece in window.values() for name in (*piece.inputs.values(), piece.reference)]
        shown = [shown_name(piece) for piece in window.values()]
        if first:
            wanted += [*pair.outputs, *(spec.name for spec in pair.reference.inputs)]
            shown += pair.outputs.values()
        inputs = {spec.name for spec in pair.reference.inputs}
        self._wanted = [name for name in dict.fromkeys(wanted) if name not in inputs]
        self._reference = _open(pair.reference.model, self._wanted, "the reference", optimized=False)
        self._shown = list(dict.fromkeys(shown))
        self._candidate = _open(
            pair.candidate.model, self._shown, "the candidate", optimized=True, like=self._reference
        )
        self._pieces = Session(
            pieces_model(pair, window, VERSIONS), optimization="disabled", name="the candidate's pieces"
        )
        self._deployed = deployed(pieces_model(pair, window, ("whole",)))
        self._switches = Switches(pair.reference, [piece.reference for piece in window.values()])

    def values(self, batch: Batch) -> _Values:
        """Run everything on one batch."""
        reference = {**self._reference.interface.feed(batch, where="the samples"), **self._reference.run(batch)}
        feed = {
            feed_name(place, mine): as_dtype(reference[theirs], self._pair.candidate.specs[mine].dtype)
            for place, piece in self._window.items()
            for mine, theirs in piece.inputs.items()
        }
        return _Values(reference, self._candidate.run(batch), self._pieces.run(feed), self._deployed.run(feed))

    def inject(self, found: Mapping[int, PieceError], values: _Values) -> None:
        """Give the reference each piece's deployed result in turn, and see what its outputs make of it."""
        inputs = {spec.name: values.reference[spec.name] for spec in self._pair.reference.inputs}
        exact = self._switches.outputs_without(inputs)
        for place, error in found.items():
            name = error.piece.reference
            if name in self._switches.names:
                got = self._switches.outputs_with(inputs, name, values.deployed[result_name(place, "whole")])
                for output, value in exact.items():
                    error.alone[output] = _added(error.alone.get(output, (0.0, 0.0)), value, got[output])


def _open(model: object, names: Sequence[str], called: str, *, optimized: bool, like: Session | None = None) -> Session:
    shown = showing(model, names)  # type: ignore[arg-type]
    return Session(
        shown.SerializeToString(),
        optimization="all" if optimized else "disabled",
        name=called,
        like=None if like is None else like.inputs,
    )


def shown_name(piece: Piece) -> str:
    """The tensor to look at in the running candidate: the integers where there are any, which leaves kernels fused."""
    return piece.tensor if piece.quantizer is None else str(piece.quantizer.output[0])


def _count(error: PieceError, place: int, values: _Values, *, emulate_saturation: bool) -> None:
    piece, exact = error.piece, values.reference[error.piece.reference]
    weights, inputs, whole = (values.results[result_name(place, version)] for version in VERSIONS)
    deployed = values.deployed[result_name(place, "whole")]
    error.signal += signal_of(exact)
    error.local += energy(exact, deployed)
    error.weights += energy(exact, weights)
    error.inputs += energy(weights, inputs)
    error.kernel += energy(whole, deployed)
    if error.output is not None:
        error.output.update(exact)
    running = values.candidate[shown_name(piece)]
    if error.output is not None:
        running = error.output.grid.restored(running)
    if piece.quantizer is None or error.output is not None:
        error.propagated += energy(exact, running)
    product = error.product
    if product is None:
        return
    error.accumulated = max(error.accumulated, product.most_accumulated(inputs))
    if emulate_saturation and product.activation is not None and product.activation in piece.inputs:
        error.saturation += product.saturation(values.reference[piece.inputs[product.activation]])
