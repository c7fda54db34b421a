from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_models import cnn, samples_of

from onnxshrink.regress.check import write_baseline

SESSION = {"provider": "CPUExecutionProvider", "options": {}, "threads": 1}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a float CNN."""
    folder = tmp_path_factory.mktemp("made") / "cnn.bundle"
    folder.mkdir()
    onnx.save(cnn(), str(folder / "model.onnx"))
    samples = [{"x": sample[None]} for sample in samples_of(cnn(), 4)["x"]]
    write_baseline(folder, {"session": SESSION, "versions": {}, "metrics": [], "config": None}, samples)
    return folder


@pytest.fixture
def project(bundle: Path, tmp_path: Path) -> Path:
    """A project whose tests have the bundle."""
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n", encoding="utf-8")
    shutil.copytree(bundle, tmp_path / "tests" / "cnn.bundle")
    return tmp_path


def build(path: Path) -> Path:
    """A build of the same network whose first bias is another."""
    model = cnn()
    bias = next(item for item in model.graph.initializer if item.name == "b1")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.5), "b1"))
    onnx.save(model, str(path))
    return path


def ran(project: Path, *arguments: str, status: int, workers: bool = False) -> str:
    """What pytest says, with our plugin and no other."""
    plugins = ["-p", "onnxshrink.regress.pytest_plugin", *(["-p", "xdist"] if workers else [])]
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *plugins, *arguments]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_a_bundle_is_collected_as_one_test_per_item(project: Path) -> None:
    """Integrity per file, structure, distance per output; a run of them all passes, and says why latency is skipped."""
    said = ran(project, "-v", "-rs", status=0)
    for name in (
        "integrity[golden_inputs.npz]",
        "integrity[check.py]",
        "weights",
        "max_abs_error[y]",
        "relative_l2[y]",
    ):
        assert f"tests/cnn.bundle/manifest.json::{name} PASSED" in said
    assert "latency_ratio SKIPPED" in said
    assert "the baseline itself" in said


def test_an_item_can_be_asked_for_by_name(project: Path) -> None:
    """The identifier that pytest prints is one that it takes."""
    said = ran(project, "-v", "tests/cnn.bundle/manifest.json::max_abs_error[y]", status=0)
    assert "1 passed" in said


def test_folders_of_other_names_are_bundles_where_the_ini_file_says_so(project: Path) -> None:
    """An unmarked folder with a manifest is somebody else's."""
    (project / "tests" / "cnn.bundle").rename(project / "tests" / "release")
    ran(project, status=5)
    ini = "[pytest]\ntestpaths = tests\nonnxshrink_bundles = tests/release\n"
    (project / "pytest.ini").write_text(ini, encoding="utf-8")
    assert "max_abs_error[y] PASSED" in ran(project, "-v", status=0)


def test_a_damaged_file_fails_as_such(project: Path) -> None:
    """The item of the file fails and names it; what needs it is skipped, with the reason; the rest passes."""
    path = project / "tests" / "cnn.bundle" / "golden_outputs.npz"
    path.write_bytes(path.read_bytes()[:-100])
    said = ran(project, "-v", "-rs", status=1)
    assert "integrity[golden_outputs.npz] FAILED" in said
    assert "golden_outputs.npz is truncated" in said
    assert "golden_outputs.npz is damaged" in said
    assert "weights PASSED" in said


def test_a_damaged_manifest_is_one_test_that_tells_how_to_mend_it(project: Path) -> None:
    """In the words of the error, without a traceback."""
    path = project / "tests" / "cnn.bundle" / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8")[:500], encoding="utf-8")
    said = ran(project, status=1)
    assert "1 failed" in said
    assert "truncated or damaged" in said
    assert "fix    restore it from version control" in said
    assert "Traceback" not in said


def emptied(folder: Path) -> str:
    """Leave nothing in a bundle."""
    shutil.rmtree(folder)
    folder.mkdir()
    return "an empty folder"


def without_manifest(folder: Path) -> str:
    """Leave everything but what says what it is."""
    (folder / "manifest.json").unlink()
    return "check.py, golden_inputs.npz, golden_outputs.npz, model.onnx"


@pytest.mark.parametrize("named", [(), ("tests/cnn.bundle",), ("-k", "test_other")])
@pytest.mark.parametrize("spoil", [emptied, without_manifest])
def test_a_bundle_without_a_manifest_stops_the_collection(
    project: Path, spoil: Callable[[Path], str], named: tuple[str, ...]
) -> None:
    """A folder that is called a bundle is never passed over in silence, whatever is selected."""
    (project / "tests" / "test_other.py").write_text("def test_other():\n    pass\n", encoding="utf-8")
    left = spoil(project / "tests" / "cnn.bundle")
    said = ran(project, *named, status=2)
    assert "ERROR collecting tests/cnn.bundle" in said
    assert "cnn.bundle is called a bundle and has no manifest.json" in said
    assert f"got    {left}" in said
    assert "Traceback" not in said
    assert "passed" not in said


@pytest.mark.parametrize(("name", "ini"), [("cnn.bundle", ""), ("release", "onnxshrink_bundles = tests/release\n")])
@pytest.mark.parametrize("workers", [False, True])
def test_a_bundle_that_a_killed_update_has_left_aside_is_put_back(
    project: Path, name: str, ini: str, *, workers: bool
) -> None:
    """Killed between its two renames, it leaves the bundle under a hidden name: that is no reason to test nothing."""
    (project / "pytest.ini").write_text(f"[pytest]\ntestpaths = tests\n{ini}", encoding="utf-8")
    bundle = (project / "tests" / "cnn.bundle").rename(project / "tests" / name)
    whole = ran(project, status=0).splitlines()[-1].split(" in ")[0]
    bundle.rename(project / "tests" / f".{name}.old")
    said = ran(project, *(["-n", "2"] if workers else []), status=0, workers=workers)
    assert said.splitlines()[-1].split(" in ")[0] == whole
    assert (bundle / "manifest.json").is_file()
    assert not (project / "tests" / f".{name}.old").exists()


def test_what_an_update_has_left_beside_a_bundle_is_not_collected(project: Path) -> None:
    """Killed after it, the new bundle is in its place; folders that nobody calls a bundle stay where they are."""
    tests = project / "tests"
    whole = ran(project, status=0).splitlines()[-1].split(" in ")[0]
    shutil.copytree(tests / "cnn.bundle", tests / ".cnn.bundle.old")
    shutil.copytree(tests / "cnn.bundle", tests / ".notes.old")
    (tests / ".gone.bundle.old").mkdir()
    assert ran(project, status=0).splitlines()[-1].split(" in ")[0] == whole
    assert sorted(path.name for path in tests.iterdir() if path.suffix == ".old") == [
        ".cnn.bundle.old", ".gone.bundle.old", ".notes.old"
    ]  # fmt: skip


def test_an_empty_folder_of_another_name_is_nobodys_bundle(project: Path) -> None:
    """Unless the ini file names it; what stands beside a bundle is collected as ever."""
    (project / "tests" / "release").mkdir()
    ran(project, status=0)
    ini = "[pytest]\ntestpaths = tests\nonnxshrink_bundles = tests/release\n"
    (project / "pytest.ini").write_text(ini, encoding="utf-8")
    assert "release is called a bundle and has no manifest.json" in ran(project, status=2)


def write_test(project: Path, line: str) -> None:
    text = f"def test_build(onnxshrink_check):\n    {line}\n"
    (project / "tests" / "test_build.py").write_text(text, encoding="utf-8")


def test_the_fixture_says_which_output_how_far_which_sample_since_when(project: Path) -> None:
    """The numbers are those of the check, and the failure is an assertion of the user's own line."""
    build(project / "build.onnx")
    write_test(project, "onnxshrink_check('tests/cnn.bundle', 'build.onnx', latency=False)")
    said = ran(project, "tests/test_build.py", status=1)
    since = json.loads((project / "tests/cnn.bundle/manifest.json").read_text(encoding="utf-8"))["since"]
    row = next(line for line in said.splitlines() if "max_abs_error y" in line)
    assert "is allowed, worst at sample " in row
    assert since in said
    assert "AssertionError: build.onnx is not what it was in tests/cnn.bundle" in said
    assert "> " in said
    assert "pytest_plugin.py" not in said


def test_the_fixture_gives_the_result(project: Path) -> None:
    """For what a test wants to know beyond the verdict."""
    write_test(project, "assert onnxshrink_check('tests/cnn.bundle').outcome == 'passed'")
    ran(project, "tests/test_build.py", status=0)


@pytest.mark.slow
def test_a_new_baseline_is_accepted_only_when_asked_and_told(project: Path) -> None:
    """After that the new build passes, the summary says what changed, and the old model fails."""
    build(project / "build.onnx")
    shutil.copyfile(project / "tests/cnn.bundle/model.onnx", project / "old.onnx")
    write_test(project, "onnxshrink_check('tests/cnn.bundle', 'build.onnx', latency=False)")
    before = (project / "tests/cnn.bundle/manifest.json").read_bytes()
    ran(project, "tests/test_build.py", status=1)
    assert (project / "tests/cnn.bundle/manifest.json").read_bytes() == before
    said = ran(project, "tests/test_build.py", "--onnxshrink-update", status=0)
    assert "onnxshrink: new baselines" in said
    assert "max_abs_error y" in said
    assert "new baselines" not in ran(project, "--onnxshrink-update", status=0)
    write_test(project, "onnxshrink_check('tests/cnn.bundle', 'old.onnx', latency=False)")
    ran(project, "tests/test_build.py", status=1)


@pytest.mark.slow
def test_several_workers_collect_the_same_and_write_nothing(project: Path) -> None:
    """pytest-xdist refuses workers that collect differently; new baselines are one process's work."""
    assert "passed" in ran(project, "-n", "2", status=0, workers=True)
    done = ran(project, "-n", "2", "--onnxshrink-update", status=4, workers=True)
    assert "passed" not in done


def test_pytest_is_not_made_heavier() -> None:
    """Loading the plugin imports nothing that is not pytest's or the standard library's."""
    code = (
        "import sys, pytest; known = set(sys.modules); import onnxshrink.regress.pytest_plugin; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - known} - set(sys.stdlib_module_names); "
        "print(sorted(new))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['onnxshrink']"
