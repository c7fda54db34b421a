"""The short names of ONNX Runtime's execution providers."""

from __future__ import annotations

SHORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "cann": "CANNExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "acl": "ACLExecutionProvider",
    "vitisai": "VitisAIExecutionProvider",
    "azure": "AzureExecutionProvider",
}
"""The name in a config to ONNX Runtime's name."""


def full_name(provider: str) -> str:
    """ONNX Runtime's name of a provider; a name that is not known here is ONNX Runtime's already."""
    return SHORT_NAMES.get(provider, provider)


def short_name(provider: str) -> str:
    """The name for a config and for tables, of either name; one that is not known here stays as it is."""
    folded = provider.casefold()
    return next((short for short, full in SHORT_NAMES.items() if folded in (short, full.casefold())), provider)
