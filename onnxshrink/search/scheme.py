"""Which int8 scheme suits a network: ranges fixed from samples (static), or computed for every input (dynamic).

Convolutions want static ranges: their dynamic kernels are slower than float. Behind a LayerNormalization a few channels
are far larger than the others and differ from input to input, so one range for all inputs drowns the rest; and the
float operators between the products are many, so Q/DQ pairs cost more than ranges do. MiniLM at sequence 64, 1 thread,
against fp32: static 4.5 dB at 2.2 times the speed, dynamic 18.3 dB at 2.5, with SmoothQuant before it 23.9 dB at 2.5.

Source: ONNX Runtime, "Quantize ONNX models": dynamic quantization for RNNs and transformers, static for CNNs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from onnxshrink.calibration.prepare import LAYER_NORMS
from onnxshrink.config.data import NpzData
from onnxshrink.core.errors import ModelError
from onnxshrink.data.reader import open_reader
from onnxshrink.runtime.graph import input_specs, load_model, require_float
from onnxshrink.verify.coverage import Coverage, audit

Scheme: TypeAlias = Literal["static", "dynamic"]

# As ONNX Runtime names them when it runs a float model.
_PRODUCTS = {"Attention", "FusedGemm", "FusedMatMul", "Gemm", "GemmFastGelu", "MatMul", "MultiHeadAttention"}
_RECURRENT = {"LSTM"}  # the only one that ONNX Runtime quantizes, and only dynamically


@dataclass(frozen=True, slots=True)
class Choice:
    """A scheme, and why it was chosen in one line."""

    scheme: Scheme
    reason: str


def choose_scheme(model: Path, data: Path) -> Choice:
    """Look at the graph that ONNX Runtime runs, and choose by where its multiply-accumulates lie.

    Args:
        model: A float ``.onnx`` file.
        data: Samples, ``.npz``, whose first one gives dynamic axes their lengths.

    Raises:
        DataError: The samples do not fit the model.
        ModelError: The file is no ONNX model, or quantized already.
    """
    loaded = load_model(model)
    require_float(loaded, where=str(model))
    reader = open_reader(NpzData.model_validate({"npz": data}), input_specs(loaded), batch_size=1)
    try:
        return choice_of(audit(model, batch=next(iter(reader))))
    except ModelError as e:  # what ONNX Runtime can run and the audit cannot read back
        return Choice("static", f"the graph could not be audited: {e.what}")


def choice_of(coverage: Coverage) -> Choice:
    """The choice for a float model of which it is known what a session runs."""
    if not coverage.macs:
        return Choice("static", "the model has no multiply-accumulates")
    op_types = {op_type for island in coverage.islands for op_type in island.op_types}
    products, recurrent = (
        sum(row.macs for row in coverage.rows if row.op_type in kinds) / coverage.macs
        for kinds in (_PRODUCTS, _RECURRENT)
    )
    if recurrent > 0.5:
        return Choice("dynamic", f"{recurrent:.0%} of the multiply-accumulates lie in LSTM, which has no static form")
    if products <= 0.5:
        return Choice("static", f"{1 - products:.0%} of the multiply-accumulates lie outside of matrix products")
    if not op_types & LAYER_NORMS:
        return Choice("static", "its matrix products read no LayerNormalization")
    return Choice("dynamic", f"{products:.0%} of the multiply-accumulates lie in matrix products of a transformer")
