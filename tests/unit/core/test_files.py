"""Files that are not there: every command says what it got, what it wants and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import onnxshrink
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.files import require_files
from onnxshrink.search.sensitivity import find_sensitivity


def test_what_is_there_passes(tmp_path: Path) -> None:
    """And the first that is not is told, with its place."""
    (tmp_path / "model.onnx").touch()
    require_files(model=tmp_path / "model.onnx")
    with pytest.raises(ConfigError) as caught:
        require_files(model=tmp_path / "model.onnx", data=tmp_path)
    assert (caught.value.where, caught.value.got, caught.value.want) == ("data", "a folder", "data.npz")
    with pytest.raises(ConfigError) as caught:
        require_files(model=tmp_path / "nowhere" / "m.onnx")
    assert "relative paths" in str(caught.value.fix)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, _: onnxshrink.inspect(model),
        lambda _, data: onnxshrink.inspect("model.onnx", data=data),
        lambda model, data: onnxshrink.explain(model, model, data),
        lambda model, data: onnxshrink.compare(model, model, data),
        lambda model, data: onnxshrink.quantize(model, data, "o.onnx"),
        lambda model, data: find_sensitivity(Path(model), Path(data)),
    ],
)
def test_everyone_says_all_five(
    call: Callable[[str, str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest name that is there is the fix."""
    monkeypatch.chdir(tmp_path)
    for name in ("model.onnx", "data.npz"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="there is no file") as caught:
        call("modle.onnx", "dta.npz")
    assert caught.value.where in ("model", "reference", "data")
    assert caught.value.got == "nothing"
    assert caught.value.want in ("model.onnx", "data.npz")
    assert caught.value.fix in ("did you mean 'model.onnx'?", "did you mean 'data.npz'?")
