"""Which int8 scheme suits a processor: a golden table of every decision, and what is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from onnxshrink.config.stages import Isa
from onnxshrink.core.errors import ConfigError
from onnxshrink.runtime.isa import Types, detect_isa, isa_of, resolve_scheme

GOLDEN = Path(__file__).parents[2] / "golden" / "schemes.txt"


def table() -> str:
    """Every decision, one block each."""
    blocks = []
    asked_for = [*product(("cpu",), get_args(Isa), ("auto", *get_args(Types))), ("cuda", "x86_vnni", "auto")]
    for provider, isa, types in asked_for:
        asked = f"{provider} {isa} {types}"
        try:
            scheme = resolve_scheme(isa, provider, types=types)
        except ConfigError as e:
            blocks.append(f"{asked}\n  refused: {e.what}\n  because: {e.want}\n  fix: {e.fix}\n")
            continue
        sign = "symmetric weights" if scheme.symmetric else "asymmetric weights"
        ops = "all op types" if scheme.op_types is None else ", ".join(scheme.op_types)
        line = f"{scheme.types}, {scheme.format}, 7 bits {scheme.reduce_range}, {sign}, {ops}"
        blocks.append("\n".join([asked, f"  {line}", *(f"  - {reason}" for reason in scheme.reasons)]) + "\n")
    return "\n".join(blocks)


def test_decisions_are_those_of_the_golden_table() -> None:
    """A changed decision or reason shows in tests/golden/schemes.txt."""
    assert table() == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("architecture", "features", "isa"),
    [
        ("x86_64", ["avx2", "avx512f", "avx512_vnni"], "x86_vnni"),
        ("AMD64", ["avx2", "avx_vnni"], "x86_vnni"),
        ("x86_64", ["avx2", "avx512f"], "x86_avx2"),
        ("AMD64", [], "x86_avx2"),
        ("aarch64", ["asimd"], "arm64"),
        ("arm64", [], "arm64"),
    ],
)
def test_a_processor_is_known_by_its_features(architecture: str, features: list[str], isa: Isa) -> None:
    """VNNI makes the difference on x86; where features are unknown the safe side is taken; arm64 is arm64."""
    assert isa_of(architecture, features) == isa


def test_this_machine_has_an_instruction_set() -> None:
    """What runs the tests runs int8."""
    assert detect_isa() in get_args(Isa)


def test_an_unknown_processor_is_named() -> None:
    """Nothing is guessed for it, and `isa` is offered."""
    with pytest.raises(ConfigError, match="riscv64") as caught:
        isa_of("riscv64", [])
    assert "isa" in str(caught.value.fix)


def test_what_was_asked_for_is_kept() -> None:
    """Types, format and operator types that are given are not second-guessed."""
    scheme = resolve_scheme("x86_vnni", types="s8s8", format="qoperator", op_types=("Conv",))
    assert (scheme.types, scheme.format, scheme.op_types) == ("s8s8", "qoperator", ("Conv",))


@pytest.mark.parametrize("isa", get_args(Isa))
def test_cuda_is_refused_with_a_way_out(isa: Isa) -> None:
    """int8 QDQ has no kernels there; fp16 is offered, and the place that asked is named."""
    with pytest.raises(ConfigError) as caught:
        resolve_scheme(isa, "cuda", where="variants.int8")
    assert caught.value.where == "variants.int8"
    assert "fp16" in str(caught.value.fix)
    assert "DequantizeLinear" in str(caught.value.want)
