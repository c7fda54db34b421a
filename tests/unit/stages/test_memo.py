from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from onnxshrink.core.errors import DependencyError
from onnxshrink.stages.memo import require_torch


@pytest.mark.parametrize("missing", ["torch", "torch_pruning", "safetensors"])
def test_a_missing_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """The torch extra is optional; the message names what is missing and how to get it, before any import fails."""
    real = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == missing else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    require_torch({"onnx"}, "optimize")
    with pytest.raises(DependencyError, match="distill") as caught:
        require_torch({"torch"}, "distill")
    assert "pip install" in str(caught.value.fix)
