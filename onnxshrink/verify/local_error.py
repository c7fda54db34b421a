"""Errors of every piece of a candidate, its inputs taken from the reference, and of the candidate as it runs.

The tensors are looked at in windows: only those of one window are fetched, one batch at a time, so that memory follows
the window's size and neither the number of samples nor the depth of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import Array, Batch
from onnxshrink.data.batching import n_samples
from onnxshrink.data.reader import Reader
from onnxshrink.runtime.session import Session
from onnxshrink.verify.alone import Switches
from onnxshrink.verify.error_sums import GridError, Measured, PieceError, added, as_dtype, energy, signal_of
from onnxshrink.verify.graph_tensors import showing
from onnxshrink.verify.pairing import Pair, Piece
from onnxshrink.verify.pieces import VERSIONS, feed_name, grid_of, pieces_model, result_name
from onnxshrink.verify.products import product_of

_COPIES = 14  # of a piece's result at once: five runs' in float32 and their differences in float64

_INJECTED = 8
"""Samples on which each piece alone is carried on to the outputs: that is one more run of the reference for each."""

Deployed = Callable[[bytes], Session]
"""Opens the pieces as the candidate is deployed: with every optimization of ONNX Runtime."""


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
        outputs[theirs] = added(before, values.reference[theirs], values.candidate[pair.outputs[theirs]])


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
                    error.alone[output] = added(error.alone.get(output, (0.0, 0.0)), value, got[output])


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
