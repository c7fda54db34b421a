"""Which int8 scheme suits a processor: decided from its instruction set, with the reasons.

x86 multiplies unsigned by signed bytes, so activations are unsigned there; a processor without VNNI adds pairs of
those products in 16 bits, which may saturate. arm64 multiplies signed by signed bytes. An arm64 processor without the
dot-product instructions (`asimddp`; before ARMv8.2) takes the same scheme and is only slower: its widening multiplies
are signed as well, and add in 32 bits.

Source: ONNX Runtime, "Quantize ONNX models", section "Data type selection"; Intel SDM, VPMADDUBSW and VPDPBUSD;
Arm ARM, SDOT and SMMLA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from onnxshrink.config.stages import Isa
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.machine import machine

Types: TypeAlias = Literal["u8s8", "s8s8", "u8u8"]
Format: TypeAlias = Literal["qdq", "qoperator"]

NO_INTEGERS_ON_CUDA = (
    "the CUDA provider has no integer kernels for DequantizeLinear and QuantizeLinear: every node between them would "
    "run in float, with conversions around it"
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How to quantize statically.

    Attributes:
        types: Activation and weight types.
        reduce_range: Whether weights get 7 bits: never, or where a forecast of saturation asks for it.
        symmetric: True where weights have the zero point 0; activations never must.
        format: QDQ or integer operators.
        op_types: Operator types to quantize; None takes all that ONNX Runtime can.
        reasons: Why, one sentence each.
    """

    types: Types
    reduce_range: Literal["never", "forecast"]
    symmetric: bool
    format: Format
    op_types: tuple[str, ...] | None
    reasons: tuple[str, ...]


def detect_isa() -> Isa:
    """The instruction set of this machine, as far as int8 is concerned.

    An x86 processor whose features the system does not tell counts as one without VNNI, which is always safe.

    Raises:
        ConfigError: The processor is neither x86 nor arm64.
    """
    found = machine()
    return isa_of(found["architecture"], found["features"])


def isa_of(architecture: str, features: Sequence[str]) -> Isa:
    """As `detect_isa`, for a processor that is described.

    Args:
        architecture: As ``platform.machine()`` has it.
        features: Feature flags as Linux names them, such as ``avx512_vnni``.

    Raises:
        ConfigError: The processor is neither x86 nor arm64.
    """
    name = architecture.lower()
    if name in {"x86_64", "amd64", "x64", "i386", "i686"}:
        return "x86_vnni" if {"avx512_vnni", "avx_vnni"} & set(features) else "x86_avx2"
    if name in {"aarch64", "arm64"}:
        return "arm64"
    raise ConfigError(
        f"there is no int8 scheme for the processor {architecture!r}",
        where="quantize_static.isa",
        got=architecture,
        want="x86 or arm64",
        fix="say which processor the model is for: isa: x86_vnni, x86_avx2 or arm64",
    )


def resolve_scheme(
    isa: Isa,
    provider: str = "cpu",
    *,
    types: Types | Literal["auto"] = "auto",
    format: Format = "qdq",  # noqa: A002  the config's word
    op_types: tuple[str, ...] | None = None,
    where: str | None = None,
) -> Scheme:
    """Fill in what was left to us, keep what was asked for, and say why.

    Args:
        isa: The processor's instruction set.
        provider: Where the model will run, by its short name.
        types: Activation and weight types asked for.
        format: The format asked for.
        op_types: Operator types asked for; None takes all that ONNX Runtime can.
        where: What to call the place that asks, in messages.

    Raises:
        ConfigError: The provider cannot run int8.
    """
    if provider == "cuda":
        raise ConfigError(
            "int8 is no use on CUDA",
            where=where,
            got="quantize_static for a cuda target",
            want=NO_INTEGERS_ON_CUDA,
            fix="use fp16 on CUDA (a to_fp16 stage in place of quantize_static), and measure int8 on cpu targets",
        )
    signed = isa == "arm64"
    chosen: Types = ("s8s8" if signed else "u8s8") if types == "auto" else types
    reasons = [_OWN_TYPES[isa] if types == "auto" else f"{chosen} was asked for"]
    if chosen == "s8s8" and not signed and format == "qdq":
        reasons.append(
            "on x86 ONNX Runtime makes signed activations unsigned only where one node reads them: nodes at a tensor "
            "with two readers run in float"
        )
    if chosen != "s8s8" and signed:
        reasons.append("arm64 multiplies bytes of one sign: ONNX Runtime makes the weights unsigned when it loads them")
    if chosen == "u8u8" and not signed:
        reasons.append(
            "unsigned weights are slow on x86: EfficientNet-Lite0 ran at 0.2 of fp32's speed with scales per channel, "
            "1.0 per tensor, where u8s8 ran at 2.1 to 2.3 (AVX-512 VNNI, 1 thread)"
        )
    saturates = isa == "x86_avx2" and chosen != "u8u8"
    if isa == "x86_avx2":
        reasons.append(
            "without VNNI two products are added in 16 bits (vpmaddubsw), which may saturate: a forecast decides on 7 "
            "bits"
            if saturates
            else "unsigned weights are widened to 16 bits before the product (vpmaddwd): exact, and slower than u8s8"
        )
    return Scheme(chosen, "forecast" if saturates else "never", chosen != "u8u8", format, op_types, tuple(reasons))


_OWN_TYPES: dict[Isa, str] = {
    "x86_vnni": "VNNI multiplies unsigned activations by signed weights and adds in 32 bits (vpdpbusd)",
    "x86_avx2": "AVX2 multiplies unsigned activations by signed weights (vpmaddubsw)",
    "arm64": "arm64 multiplies signed by signed and adds in 32 bits (sdot, smmla)",
}
