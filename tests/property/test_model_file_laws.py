from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import cnn

from onnxshrink.regress.check import BundleError, describe_model

WHOLE = cnn().SerializeToString()


@given(
    flips=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), max_size=4),
    length=st.integers(0, len(WHOLE)),
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_a_damaged_model_file_is_read_or_refused(flips: list[tuple[int, int]], length: int) -> None:
    """Whatever bytes are in it, the only error is the one that says so."""
    data = bytearray(WHOLE)
    for place, bits in flips:
        data[place] ^= bits
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(bytes(data[:length]) if length % 2 else bytes(data))
        try:
            describe_model(path)
        except BundleError as e:
            assert e.where == str(path)


@given(place=st.integers(0, len(WHOLE) - 1), bits=st.integers(1, 255))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_every_flip_inside_a_weight_changes_its_digest(place: int, bits: int) -> None:
    """What onnx reads as other values is never described as the same weights."""
    data = bytearray(WHOLE)
    data[place] ^= bits
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(WHOLE)
        before = describe_model(path)["weights"]
        path.write_bytes(bytes(data))
        try:
            other = onnx.load_from_string(bytes(data))
            after = describe_model(path)["weights"]
        except Exception:  # noqa: BLE001  protobuf and we refuse it each in their own way
            return
        values = {t.name: t.raw_data for t in onnx.load_from_string(WHOLE).graph.initializer}
        if values != {t.name: t.raw_data for t in other.graph.initializer}:
            assert after != before
