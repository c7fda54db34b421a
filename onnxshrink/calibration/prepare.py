"""A float model made ready for calibration and quantization: both stages see the same graph with the same names."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, version_converter
from onnxruntime.quantization.quant_utils import add_infer_metadata
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.graph import PROTOBUF_LIMIT_BYTES, name_nodes, opset_of, require_float
from onnxshrink.runtime.session import Session

QUANTIZABLE_OP_TYPES = tuple(sorted({*QLinearOpsRegistry, *QDQRegistry}))
"""Every operator type that ONNX Runtime's static quantization knows, of either format."""

LAYER_NORMS = frozenset({
    "EmbedLayerNormalization", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
})  # fmt: skip
"""What normalizes over channels, as ONNX and ONNX Runtime name it: the mark of a transformer."""

SUITED_TO_TRANSFORMERS = ("Clip", "Conv", "ConvTranspose", "Gather", "Gemm", "MatMul", "Relu")
"""What static quantization takes behind a LayerNormalization unless it is told otherwise. There a few channels are a
hundred times as large as the others, and every sum, norm or activation in 8 bits loses the rest: MiniLM keeps 4.5 dB
with all operator types, and 9.0 dB with these at the same speed."""

MIN_OPSET = 13
"""The first opset whose DequantizeLinear has an axis, which one scale per channel needs."""

_ONNX_DOMAINS = {"", "ai.onnx", "ai.onnx.ml"}


def prepare(model: onnx.ModelProto, *, where: str) -> onnx.ModelProto:
    """A copy of ``model`` with types inferred, opset 13 or later, and a name for every node.

    A node without a name is called after its type and its place, such as ``Conv_12``. The result depends on nothing but
    the model, so calibrated names fit the graph that is quantized.

    Args:
        model: A float32 model.
        where: What to call the model in messages.

    Raises:
        ModelError: The model is quantized already, computes in float16, is too large for one protobuf message, or its
            opset cannot be raised.
    """
    require_float(model, where=where)
    if model.ByteSize() >= PROTOBUF_LIMIT_BYTES:
        raise ModelError(
            "the model is too large for static quantization",
            where=where,
            got=f"{model.ByteSize() / 1e9:.1f} GB",
            want="less than 2 GB, the limit of ONNX shape inference in memory",
            fix="prune or split the model first",
        )
    opset = opset_of(model)
    if opset < MIN_OPSET:
        metadata = {node.name: node.metadata_props for node in model.graph.node if node.name}
        try:
            model = version_converter.convert_version(model, MIN_OPSET)
        except Exception as e:  # the converter raises RuntimeError and its own ConvertError, which share no base
            raise ModelError(
                f"the opset cannot be raised from {opset} to {MIN_OPSET}: {str(e).strip().partition(chr(10))[0]}",
                where=where,
                want=f"opset {MIN_OPSET} or later",
                fix="export the model again with a later opset",
            ) from e
        for node in model.graph.node:  # the converter forgets what is noted at the nodes
            node.metadata_props.extend(metadata.get(node.name, ()))
    try:
        model = onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError as e:
        raise ModelError(f"the types of the model cannot be inferred: {e}", where=where) from e
    _ask_for_types(model, where)
    add_infer_metadata(model)  # tells ONNX Runtime's quantizers not to infer again
    name_nodes(model)
    _refuse_float16(model, where)
    return model


def _ask_for_types(model: onnx.ModelProto, where: str) -> None:
    """Note the types that ONNX cannot infer: what lies behind an operator of ONNX Runtime's own, which knows them.

    Without them a fused transformer would seem to hold no float tensors, and stay in float unseen.
    """
    if all(node.domain in _ONNX_DOMAINS for node in model.graph.node):
        return
    values = (*model.graph.value_info, *model.graph.output)
    known = {value.name for value in values if value.type.tensor_type.elem_type}
    unknown = {name for node in model.graph.node for name in node.output if name and name not in known}
    if not unknown:
        return
    kept = [value for value in model.graph.value_info if value.name in known]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    del asked.graph.output[:]
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(unknown))
    outputs = {value.name: value for value in model.graph.output}
    for spec in Session(asked.SerializeToString(), optimization="disabled", name=where).outputs:
        if "(" in spec.dtype:  # a sequence or an optional
            continue
        element = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        if spec.name in outputs:
            outputs[spec.name].type.tensor_type.elem_type = element
        else:
            model.graph.value_info.append(helper.make_tensor_value_info(spec.name, element, None))


def _refuse_float16(model: onnx.ModelProto, where: str) -> None:
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    types = [(value.name, value.type.tensor_type.elem_type) for value in values]
    types += [(tensor.name, tensor.data_type) for tensor in model.graph.initializer]
    for name, element in types:
        if element in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            raise ModelError(
                "the model computes in 16-bit floats",
                where=where,
                got=f"{name!r} {TensorProto.DataType.Name(element).lower()}",
                want="a float32 model",
                fix="quantize the float32 model: int8 ranges come from float32 activations",
            )
