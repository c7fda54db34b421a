"""Static quantization: ONNX Runtime's bytes with our ranges, and clear words where something stays in float."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from encoder_models import encoder, sentences
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
from onnxruntime.quantization import quantize_static as ort_quantize_static
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from onnxshrink.calibration.calibrate import observe_all, ranges_of
from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.core.tensors import Batch
from onnxshrink.runtime.session import Session
from onnxshrink.stages.quantize_static import _TYPES, quantize_static, quantized_model


class OrtReader(CalibrationDataReader):  # type: ignore[misc]
    """The same batches, as ONNX Runtime's calibrators want them."""

    def __init__(self, reader: nets.ArrayReader) -> None:
        self.batches = iter(reader)

    def get_next(self) -> Batch | None:
        """The next batch, or None at the end."""
        return next(self.batches, None)


def run_stage(
    tmp_path: Path, model: onnx.ModelProto, samples: Batch | None = None, **settings: Any
) -> tuple[dict[str, Any], onnx.ModelProto]:
    """The stage's facts and model on these samples, or on 32 seeded ones."""
    source = nets.artifact_of(model, tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    reader = nets.ArrayReader(samples or nets.samples_of(model, 32))
    facts = quantize_static(QuantizeStatic(**settings), source, out, nets.context_of(reader, tmp_path))
    json.dumps(facts, allow_nan=False)
    return facts, onnx.load(out / "model.onnx")


@pytest.mark.parametrize("types", ["u8s8", "s8s8", "u8u8"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("network", ["cnn", "attention"])
def test_equals_onnxruntime_byte_for_byte(
    tmp_path: Path, network: str, form: str, granularity: str, types: str
) -> None:
    """With equal ranges the model is the one that ONNX Runtime's quantize_static writes, byte for byte."""
    model = nets.cnn() if network == "cnn" else nets.attention(mark=-100.0)
    reader = nets.ArrayReader(nets.samples_of(model, 40))
    onnx.save(model, tmp_path / "float.onnx")
    activation_type, weight_type = _TYPES[types]  # type: ignore[index]
    ort_quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "theirs.onnx",
        OrtReader(reader),
        quant_format=QuantFormat.QDQ if form == "qdq" else QuantFormat.QOperator,
        per_channel=granularity == "per_channel",
        activation_type=activation_type,
        weight_type=weight_type,
    )
    prepared = prepare(model, where="test")
    ranges = ranges_of(observe_all(prepared, lambda _: reader), "minmax", leave_out={})
    settings = QuantizeStatic(granularity=granularity, types=types, format=form)  # type: ignore[arg-type]
    ours = quantized_model(prepared, ranges, settings)
    assert ours.SerializeToString() == (tmp_path / "theirs.onnx").read_bytes()


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_the_written_file_is_onnxruntimes_less_its_notes(tmp_path: Path, form: Any) -> None:
    """The stage's file is ONNX Runtime's without inferred types and marks; to leave those out changes no output."""
    model = nets.cnn()
    model.metadata_props.add(key="classes", value="ten")
    onnx.save(model, tmp_path / "float.onnx")
    theirs = tmp_path / "theirs.onnx"
    ort_quantize_static(
        tmp_path / "float.onnx",
        theirs,
        OrtReader(nets.ArrayReader(nets.samples_of(model, 32))),
        quant_format=QuantFormat.QDQ if form == "qdq" else QuantFormat.QOperator,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    raw = QuantizeStatic(types="u8s8", format=form, reduce_range=False, compact=False, bias_correction=False)
    _, ours = run_stage(tmp_path, model, **dict(raw))  # with 8 bits on processors without VNNI too
    expected = onnx.load(theirs)
    assert expected.graph.value_info
    assert {entry.key for entry in expected.metadata_props} > {"classes"}
    del expected.graph.value_info[:]
    del expected.metadata_props[:]
    expected.metadata_props.extend(model.metadata_props)
    assert ours == expected
    test = nets.samples_of(model, 16, seed=5)
    for level in ("disabled", "all"):
        want = Session(theirs, optimization=level).run(test)["y"]  # type: ignore[arg-type]
        np.testing.assert_array_equal(Session(tmp_path / "out" / "model.onnx", optimization=level).run(test)["y"], want)  # type: ignore[arg-type]


def test_constructors_are_those_we_call() -> None:
    """ONNX Runtime's quantizers still take the positional arguments that we give them."""
    shared = ["weight_qType", "activation_qType", "tensors_range", "nodes_to_quantize", "nodes_to_exclude"]
    shared += ["op_types_to_quantize", "extra_options"]
    qdq = list(inspect.signature(QDQQuantizer.__init__).parameters)
    qoperator = list(inspect.signature(ONNXQuantizer.__init__).parameters)
    assert qdq == ["self", "model", "per_channel", "reduce_range", *shared]
    assert qoperator == ["self", "model", "per_channel", "reduce_range", "mode", "static", *shared]
    assert TensorData(lowest=np.float32(0), highest=np.float32(1)).range_value == (0, 1)
    assert list(inspect.signature(TensorsData.__init__).parameters) == ["self", "calibration_method", "data"]


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_quantized_model_is_close(tmp_path: Path, form: str, method: str) -> None:
    """Each method and format gives a model that loads, passes the checker and is within 30 dB of the float one."""
    facts, quantized = run_stage(tmp_path, nets.cnn(), format=form, method=method)
    test = nets.samples_of(nets.cnn(), 64, seed=9)
    want = Session(nets.cnn().SerializeToString()).run(test)["y"]
    got = Session(quantized.SerializeToString()).run(test)["y"]
    assert 10 * np.log10(np.sum(want**2) / np.sum((want - got) ** 2)) > 30
    assert facts["quantized_nodes"]["Conv"] == 3
    assert facts["float_nodes"] == {}
    assert facts["bytes_after"] == (tmp_path / "out" / "model.onnx").stat().st_size


@pytest.mark.parametrize("mark", [float(np.finfo(np.float32).min), -1e9, -1e4])
def test_masks_stay_in_float(tmp_path: Path, mark: float) -> None:
    """What a mask reaches is left in float and named, and no masked position leaks into the output."""
    model = nets.attention(mark=mark)
    facts, quantized = run_stage(tmp_path, model)
    assert set(facts["float_nodes"]) == {"mask", "masked", "softmax"}
    assert set(facts["absurd_tensors"]) == {"m", "sm"}
    assert facts["quantized_nodes"]["MatMul"] == 5
    session = Session(quantized.SerializeToString())
    test = nets.samples_of(model, 8, seed=3)
    test["keep"][:, :, 3:] = 0
    test["keep"][:, :, 0] = 1
    before = session.run(test)["y"][:, :3]
    test["x"][:, 3:] += 1.0
    np.testing.assert_array_equal(session.run(test)["y"][:, :3], before)


def test_mask_that_samples_do_not_show(tmp_path: Path) -> None:
    """A mask is found in the graph where no calibration sample is padded: the data alone would not show it."""
    model = nets.attention()
    source = nets.artifact_of(model, tmp_path / "source")
    (tmp_path / "out").mkdir()
    samples = nets.samples_of(model, 16) | {"keep": np.ones((16, 1, 6), np.float32)}
    context = nets.context_of(nets.ArrayReader(samples), tmp_path)
    facts = quantize_static(QuantizeStatic(), source, tmp_path / "out", context)
    assert set(facts["float_nodes"]) == {"mask", "masked", "softmax"}


def test_excluded_node_stays_float(tmp_path: Path) -> None:
    """A node named in exclude_nodes keeps its float weights, and the facts give the reason."""
    facts, quantized = run_stage(tmp_path, nets.cnn(), exclude_nodes=["conv2"])
    assert facts["float_nodes"]["conv2"] == "excluded in the config"
    assert facts["quantized_nodes"]["Conv"] == 2
    assert "w2" in {tensor.name for tensor in quantized.graph.initializer}


def test_unknown_names_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    """A node or operator type that is not there is an error that names the nearest one."""
    with pytest.raises(ConfigError, match="conv_1") as node:
        run_stage(tmp_path / "a", nets.cnn(), exclude_nodes=["conv_1"])
    assert node.value.fix == "did you mean 'conv1'?"
    with pytest.raises(ConfigError, match="Convo") as op_type:
        run_stage(tmp_path / "b", nets.cnn(), op_types=["Convo"])
    assert op_type.value.fix == "did you mean 'Conv'?"


def test_op_types_limit_what_is_quantized(tmp_path: Path) -> None:
    """Only the operator types asked for are quantized; the others are listed as left in float."""
    facts, _ = run_stage(tmp_path, nets.cnn(), op_types=["Conv"])
    assert facts["quantized_nodes"] == {"Conv": 3}
    assert facts["float_nodes"]["head"] == "Gemm is not among op_types"


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_quantized_model_is_refused(tmp_path: Path, form: str) -> None:
    """A model that is quantized already is refused, whatever its format."""
    _, quantized = run_stage(tmp_path / "first", nets.cnn(), format=form)
    with pytest.raises(ModelError, match="quantized already"):
        run_stage(tmp_path / "second", quantized)


def test_nothing_to_quantize_is_declined(tmp_path: Path) -> None:
    """A model without quantizable nodes comes out as it went in, and the facts say so."""
    node = onnx.helper.make_node("Erf", ["x"], ["y"])
    model = nets.model_of([node], {"x": ["N", 4]}, {"y": ["N", 4]}, {})
    facts, result = run_stage(tmp_path, model)
    assert "no node" in facts["declined"]
    assert result == model


def test_old_opset_is_raised(tmp_path: Path) -> None:
    """A model below opset 13 is raised to it, and the facts say so."""
    facts, quantized = run_stage(tmp_path, nets.cnn(opset=11))
    assert (facts["opset_before"], facts["opset_after"]) == (11, 13)
    assert quantized.opset_import[0].version == 13


def test_root_logger_is_left_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime's advice reaches neither the terminal nor the user's logging set-up."""
    before = list(logging.getLogger().handlers)
    run_stage(tmp_path, nets.cnn())
    assert logging.getLogger().handlers == before
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_the_quantizer_cannot_take_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX Runtime's quantizer raises becomes an error that names the way out."""

    def refuse(_: QDQQuantizer) -> None:
        message = "Unable to find data type for weight_name='g'\nand more"
        raise ValueError(message)

    monkeypatch.setattr(QDQQuantizer, "quantize_model", refuse)
    with pytest.raises(ModelError, match="cannot quantize the model: Unable to find data type") as error:
        run_stage(tmp_path, nets.cnn())
    assert "exclude_nodes" in str(error.value.fix)


def test_a_network_with_layer_norm_quantizes_its_products(tmp_path: Path) -> None:
    """Sums, norms and activations stay in float unless `op_types` asks for them, and the facts say why."""
    model = encoder()
    facts, _ = run_stage(tmp_path / "default", model, sentences(8))
    assert set(facts["quantized_nodes"]) <= {"Gather", "Gemm", "MatMul"}
    assert facts["quantized_nodes"]["MatMul"] > 0
    assert "LayerNormalization" in facts["scheme"][-1]
    everything, _ = run_stage(tmp_path / "all", model, sentences(8), op_types=["Add", "LayerNormalization", "MatMul"])
    assert everything["quantized_nodes"]["Add"] > 0
