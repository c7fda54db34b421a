"""What is installed, what loads, and what is known to go wrong together."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import onnxruntime as ort
import pytest

from onnxshrink.runtime import installation as here
from onnxshrink.runtime.installation import Library, find_conflicts, try_libraries, try_providers, wheels_of

GOOD = (Library("numpy", "2", None), Library("onnx", "1", None), Library("onnxruntime", "1", None))


def test_libraries_are_really_loaded() -> None:
    """A module that crashes in its own process is told with how it ended; ours goes on."""
    told = {"onnx": "ImportError: numpy.core.multiarray failed to import", "numpy": None, "onnxruntime": None}
    found = {library.name: library for library in try_libraries(told.get)}
    assert found["onnx"].error == told["onnx"]
    assert found["numpy"].error is None
    assert found["numpy"].version == metadata.version("numpy")


def test_a_module_that_fails_is_told_in_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child process says why; one that was killed says that it died."""
    (tmp_path / "broken.py").write_text("raise ImportError('no such symbol')")
    (tmp_path / "dying.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    (tmp_path / "sound.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert here._import_error("broken") == "ImportError: no such symbol"
    assert here._import_error("dying") == "the process died with status -9"
    assert here._import_error("sound") is None


def test_torch_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it there is no error, only an extra that would allow more."""
    find, version = here.importlib.util.find_spec, here._version
    monkeypatch.setattr(here.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    monkeypatch.setattr(here, "_version", lambda name: None if name == "torch" else version(name))
    torch = try_libraries(lambda _: None)[-1]
    assert (torch.version, torch.error) == (None, None)
    assert "prune" in here.missing_extras()["torch"]


def test_two_wheels_of_onnxruntime_are_bad() -> None:
    """They hold the same files; the message says how to get out."""
    found = [f for f in find_conflicts(GOOD, ["onnxruntime 1.24", "onnxruntime-gpu 1.23"]) if "together" in f.what]
    assert [f.level for f in found] == ["bad"]
    assert found[0].fix.startswith("pip uninstall onnxruntime onnxruntime-gpu")
    assert not any("together" in f.what for f in find_conflicts(GOOD, wheels_of()))


def test_a_library_that_does_not_load_is_bad() -> None:
    """It is named with the reason."""
    broken = (*GOOD[:2], Library("onnxruntime", "1", "ImportError: libfoo"))
    assert any(f.level == "bad" and "libfoo" in f.what for f in find_conflicts(broken, ()))


def test_versions_that_a_package_does_not_take_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requirements are those of the packages' own metadata, extras that are not installed left aside."""
    requires = {"onnxshrink": ["numpy>=99", "onnx>=1.0", "gone>=1; extra == 'hf'"], "onnx": ["protobuf>=99"]}
    monkeypatch.setattr(here, "_requires", lambda name: requires.get(name, []))
    monkeypatch.setattr(here, "missing_extras", lambda: {"hf": ""})
    what = [finding.what for finding in here._unmet()]
    assert what == [
        f"onnxshrink needs numpy>=99, and {metadata.version('numpy')} is installed",
        f"onnx needs protobuf>=99, and {metadata.version('protobuf')} is installed",
    ]


def test_models_that_are_too_new_for_onnxruntime_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is really written and really refused."""
    import onnx

    monkeypatch.setattr(onnx, "IR_VERSION", 99)
    assert any("Unsupported model IR version: 99" in f.what for f in here._too_new())
    monkeypatch.setattr(onnx, "IR_VERSION", 8)
    assert not list(here._too_new())


def test_providers_are_tried() -> None:
    """The CPU loads and comes first; one that is not built in says which package brings it."""
    found = try_providers()
    assert (found[0].provider, found[0].loads, found[0].built_in) == ("cpu", True, True)
    assert {p.provider for p in found if p.built_in} >= {"cpu"}
    assert len([p for p in found if p.built_in]) == len(ort.get_available_providers())
    assert all(p.loads or p.why for p in found)
    for provider in found:
        if provider.provider == "openvino" and not provider.built_in:
            assert "onnxruntime-openvino" in provider.why


def test_extras_are_those_of_the_package() -> None:
    """What doctor says of an extra is what pip would install."""
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    declared = tomllib.loads(text)["project"]["optional-dependencies"]
    assert set(here.EXTRAS) == set(declared) - {"dev"}
    for extra, (names, _) in here.EXTRAS.items():
        assert set(names) == {requirement.partition(">=")[0] for requirement in declared[extra]}
