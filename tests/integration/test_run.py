from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from command_line import CONFIG, PATIENCE, cached, command, environment, make_project, onnxshrink, report_of
from safetensors.torch import save_file

from onnxshrink.core.artifact import digest_folder
from onnxshrink.core.report import Report

pytestmark = pytest.mark.slow

# The command line with a Ctrl-C in the middle of its training: nobody has to look in time.
INTERRUPTED = """
import os
import signal

from torch.optim.optimizer import register_optimizer_step_post_hook

from onnxshrink.__main__ import main

steps = []


def interrupt(*_):
    steps.append(1)
    if len(steps) == 300:
        os.kill(os.getpid(), signal.SIGINT)


register_optimizer_step_post_hook(interrupt)
main()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A project whose config has been run once."""
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder, onnxshrink("run", "cfg.yaml", cwd=folder)


@pytest.fixture
def project(finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> Path:
    """A copy of the finished project, store included, to be changed at will."""
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def models(folder: Path) -> dict[str, bytes]:
    run = folder / "runs" / "cfg"
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.onnx"))}


def test_a_run_leaves_the_winner_every_variant_and_the_report(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """One command from a torch factory to a verified int8 model, with its evidence."""
    folder, result = finished
    assert result.returncode == 0, result.stdout + result.stderr
    run = folder / "runs" / "cfg"
    names = {"model.onnx", "variants/fp32/model.onnx", "variants/int8/model.onnx", "bundle/model.onnx"}
    assert names | {"teacher/model.onnx", "reference/model.onnx"} == set(models(folder))
    report = Report.read(run / "report.json")
    assert report.winner == "int8"
    assert (run / "model.onnx").read_bytes() == (run / "variants/int8/model.onnx").read_bytes()
    for path in run.rglob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
    assert "▸ int8" in result.stdout
    assert "runs/cfg/model.onnx" in result.stdout
    assert [step.name for step in report.steps][:3] == ["source", "source ▸ export", "distill ▸ source"]
    assert report.versions["onnxruntime"] == ort.__version__
    assert report.config["stages"][0]["warm_up_ratio"] == 0.05
    assert all(not step.cached and step.facts is not None for step in report.steps)


def test_the_report_agrees_with_a_second_source(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Accuracy, SQNR and bytes in the report are what ONNX Runtime and numpy say of the files that were left."""
    run = finished[0] / "runs" / "cfg"
    report = Report.read(run / "report.json")
    data = np.load(finished[0] / "data.npz")
    test = data["split"] == "test"

    def logits(name: str) -> np.ndarray[Any, Any]:
        session = ort.InferenceSession(run / report.candidate(name).model, providers=["CPUExecutionProvider"])
        out: np.ndarray[Any, Any] = session.run(["logits"], {"image": data["image"][test]})[0]
        return out

    int8, reference, labels = logits("int8"), logits("reference"), data["labels"][test]
    top1 = (int8.argmax(1) == labels).mean()
    drop = (logits("teacher").argmax(1) == labels).mean() - top1
    sqnr = 10 * np.log10((reference.astype("f8") ** 2).sum() / ((reference.astype("f8") - int8) ** 2).sum())
    row = report.candidate("int8")
    values = {name: row.metric(name) for name in ("top1", "accuracy_drop", "sqnr_db", "size_bytes")}
    want = {"top1": top1, "accuracy_drop": drop, "sqnr_db": sqnr, "size_bytes": (run / row.model).stat().st_size}
    for name, metric in values.items():
        assert metric is not None
        assert metric.value == pytest.approx(want[name], abs=1e-6)


def test_a_second_run_does_nothing_but_measure_latency(project: Path) -> None:
    """Every step is found in the store, and the files that are left are the same bytes."""
    before = models(project)
    report = report_of(onnxshrink("run", "cfg.yaml", "--json", cwd=project))
    assert all(cached(report).values()), cached(report)
    assert models(project) == before
    shown = onnxshrink("run", "cfg.yaml", cwd=project)
    assert "cached  distill" in shown.stdout + shown.stderr


def test_only_what_changed_is_done_again(project: Path) -> None:
    """Other types redo the quantization alone, not the calibration it shares."""
    changed = onnxshrink("run", "cfg.yaml", "--json", "--set", "variants.int8[0].types=s8s8", cwd=project)
    redone = [name for name, found in cached(report_of(changed)).items() if not found]
    assert redone == ["int8/quantize_static", "verify/int8", "close-up/int8"]


@pytest.mark.parametrize(
    ("change", "first_redone"),
    [
        (lambda p: (p / "shapes.py").write_text("WIDTH = 24\n"), "source"),
        (
            lambda p: (p / "nets.py").write_text((p / "nets.py").read_text().replace("bias=False", "bias=True")),
            "source",
        ),
        (lambda p: (p / "data.npz").write_bytes(_shuffled(p / "data.npz")), "distill ▸ finetune"),
    ],
)
def test_changed_code_and_data_under_an_old_path_are_noticed(
    project: Path, change: Callable[[Path], object], first_redone: str
) -> None:
    """Keys hash contents, never paths: a module that the factory imports counts as well."""
    change(project)
    report = report_of(onnxshrink("run", "cfg.yaml", "--json", cwd=project))
    redone = [name for name, found in cached(report).items() if not found]
    assert redone[0] == first_redone
    assert "distill" in redone


def _shuffled(path: Path) -> bytes:
    import io

    with np.load(path) as archive:
        arrays = dict(archive)
    order = np.r_[np.random.default_rng(1).permutation(160), np.arange(160, 240)]
    buffer = io.BytesIO()
    np.savez(buffer, image=arrays["image"][order], labels=arrays["labels"][order], split=arrays["split"])
    return buffer.getvalue()


def test_a_moved_project_finds_its_results(project: Path) -> None:
    """The folder's name is no part of any key: a renamed project with its store redoes nothing."""
    moved = project.rename(project.with_name("elsewhere"))
    report = report_of(onnxshrink("run", "cfg.yaml", "--json", cwd=moved))
    assert all(cached(report).values())


def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """``kill -9`` again and again, then one run to the end: the same bytes, and nothing half-written on the way."""
    make_project(tmp_path)
    rng = random.Random(0)  # noqa: S311
    for _ in range(4):
        process = subprocess.Popen(
            command("run", "cfg.yaml"),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(rng.uniform(2.0, 9.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        objects = tmp_path / "runs/.store/objects"
        assert all(digest_folder(path) == path.name for path in objects.glob("*"))
    result = onnxshrink("run", "cfg.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert models(tmp_path) == models(finished[0])
    assert not list((tmp_path / "runs/.store/work").iterdir())


def test_ctrl_c_ends_quietly(tmp_path: Path) -> None:
    """A run interrupted while it trains says that nothing is lost, without a traceback, and exits with 130."""
    make_project(tmp_path)
    line = [sys.executable, "-W", "error", "-c", INTERRUPTED, "run", "cfg.yaml", "--set", "stages[0].epochs=4000"]
    done = subprocess.run(
        line, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert list((tmp_path / "runs/.store/memo").glob("*.json"))  # the teacher, which was trained before it


def test_two_runs_at_once_do_not_disturb_each_other(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Two processes on one store and one run folder: both end well, and leave what one would have left."""
    make_project(tmp_path)
    pair = [
        subprocess.Popen(command("run", "cfg.yaml", "--json"), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in pair:
        process.communicate(timeout=PATIENCE)
    assert [process.returncode for process in pair] == [0, 0]
    assert models(tmp_path) == models(finished[0])


def test_a_failed_gate_exits_with_1_and_still_leaves_the_evidence(project: Path) -> None:
    """No variant passes: no winner at the top, every model and the report are there, and the reason is printed."""
    result = onnxshrink("run", "cfg.yaml", "--set", "gates.max_size=1 kB", cwd=project)
    assert result.returncode == 1
    assert "exceeds the limit of 1,000 bytes" in " ".join(result.stdout.split())
    assert "model.onnx" not in models(project)
    assert Report.read(project / "runs/cfg/report.json").winner is None


def test_mistakes_are_told_before_any_work(tmp_path: Path) -> None:
    """A typo, a missing factory, data that does not fit and a provider that is not there cost no training."""
    make_project(tmp_path)
    for overrides, says in (
        (["stages[0].epochz=1"], "did you mean 'epochs'?"),
        (["model.factory=nets:bild"], "did you mean 'build'?"),
        (["stages[0].teacher.factory=nets:bild"], "did you mean 'build'?"),
        (["model.factory=nest:build"], "cannot find the source of 'nest'"),
        (["data.train.split=trian"], "train"),
        (["model.inputs={picture: {shape: [batch, 1, 6, 6]}, mask: {shape: [batch]}}"], "picture"),
        (["model.inputs.image.shape=[batch, 1, 7, 7]"], "shape"),
        (["model.inputs.image.dtype=float64"], "float64"),
        (["targets=[{provider: cuda}]"], "onnxruntime-gpu"),
        (["variants={fp32: []}", "targets=[{provider: cuda}]"], "onnxruntime-gpu"),
    ):
        if says == "onnxruntime-gpu" and "CUDAExecutionProvider" in ort.get_available_providers():
            continue
        result = onnxshrink("run", "cfg.yaml", *(part for o in overrides for part in ("--set", o)), cwd=tmp_path)
        assert result.returncode == 2, (overrides, result.stderr)
        assert says in result.stderr, (overrides, result.stderr)
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "runs/.store").exists(), overrides


def test_a_bug_of_ours_exits_with_3(tmp_path: Path) -> None:
    """What is no mistake of the user keeps its traceback."""
    make_project(tmp_path)
    (tmp_path / "pydantic.py").write_text("raise RuntimeError('not the real one')\n")
    result = onnxshrink("run", "cfg.yaml", cwd=tmp_path)
    assert result.returncode == 3
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_users_own_weights_and_any_subset_of_stages(tmp_path: Path, suffix: str) -> None:
    """Factory and weights in, a pruned int8 model out; accuracy is measured against the source as it was brought."""
    make_project(tmp_path)
    state = _trained(tmp_path)
    if suffix == ".pth":
        torch.save({"state_dict": state}, tmp_path / "w.pth")
    else:
        save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "cfg.yaml").write_text(
        CONFIG.split("stages:")[0].replace('"nets:build", ', f'"nets:build", weights: w{suffix}, ')
        + "stages: [{kind: prune_channels, pruning_ratio: 0.25}, {kind: export}]\n"
        + "variants: {int8: [{kind: quantize_static, granularity: per_tensor}]}\ntargets: [{latency_seconds: 0.2}]\n"
    )
    report = report_of(onnxshrink("run", "cfg.yaml", "--json", cwd=tmp_path))
    assert [c["name"] for c in report["candidates"]] == ["source", "reference", "int8"]
    session = ort.InferenceSession(tmp_path / "runs/cfg/source/model.onnx", providers=["CPUExecutionProvider"])
    ones = np.ones((2, 1, 6, 6), np.float32)
    network = _network(tmp_path)
    network.load_state_dict(state)
    want = network.eval()(torch.from_numpy(ones)).detach().numpy()
    np.testing.assert_allclose(session.run(None, {"image": ones})[0], want, atol=1e-5)


def _network(folder: Path) -> torch.nn.Module:
    from onnxshrink.core.importing import load_entry, search_path

    with search_path(folder):
        network: torch.nn.Module = load_entry("nets:build")()
    return network


def _trained(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: tensor.clone() for name, tensor in _network(folder).state_dict().items()}


def test_an_onnx_file_and_npy_data_are_a_source_too(project: Path) -> None:
    """No torch in the config: an ONNX file, loose arrays, one stage."""
    shutil.copy(project / "runs/cfg/teacher/model.onnx", project / "mine.onnx")
    with np.load(project / "data.npz") as archive:
        np.save(project / "x.npy", archive["image"])
        np.save(project / "y.npy", archive["labels"])
    (project / "own.yaml").write_text(
        "model: {onnx: mine.onnx}\n"
        "data:\n"
        "  calibration: {npy: {image: x.npy}, max_samples: 32}\n"
        "  evaluation: {npy: {image: x.npy, labels: y.npy}, metric: top1}\n"
        "variants: {int8: [{kind: quantize_static, format: qoperator}]}\n"
        "targets: [{latency_seconds: 0.2}, {latency_seconds: 0.2, threads: 2}]\n"
    )
    result = onnxshrink("run", "own.yaml", cwd=project)
    assert result.returncode == 0, result.stderr
    assert "on cpu x2" in result.stdout
    report = Report.read(project / "runs/own/report.json")
    int8 = onnx.load(project / "runs/own" / report.candidate("int8").model)
    assert "QLinearConv" in {node.op_type for node in int8.graph.node}


def test_a_users_own_reader_calibrates(project: Path) -> None:
    """Data may come from a callable; its source is part of the key."""
    (project / "reader.py").write_text(
        "import numpy as np\n\n\ndef batches(scale):\n"
        "    rng = np.random.default_rng(0)\n"
        "    return [{'image': (scale * rng.normal(size=(8, 1, 6, 6))).astype(np.float32)} for _ in range(3)]\n"
    )
    own = "data.calibration={entry: 'reader:batches', args: {scale: 2.0}}"
    first = report_of(onnxshrink("run", "cfg.yaml", "--json", "--set", own, cwd=project))
    redone = [name for name, found in cached(first).items() if not found]
    assert "int8/quantize_static ▸ calibrate" in redone
    assert "distill" not in redone
    (project / "reader.py").write_text((project / "reader.py").read_text().replace("range(3)", "range(4)"))
    again = report_of(onnxshrink("run", "cfg.yaml", "--json", "--set", own, cwd=project))
    assert not cached(again)["int8/quantize_static ▸ calibrate"]


def test_quiet_says_nothing_and_json_only_json(project: Path) -> None:
    """``--quiet`` leaves both streams empty; ``--json`` prints one document, for errors as well."""
    quiet = onnxshrink("run", "cfg.yaml", "--quiet", cwd=project)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    broken = onnxshrink("run", "nothing.yaml", "--json", cwd=project)
    assert broken.returncode == 2
    assert '"kind": "ConfigError"' in broken.stdout


def test_what_pruning_costs_is_measured_without_a_teacher_too(tmp_path: Path) -> None:
    """A factory may bring its own weights: accuracy is measured against the network before it was cut."""
    make_project(tmp_path)
    text = CONFIG.replace(CONFIG[CONFIG.index("  - {kind: distill") : CONFIG.index("  - {kind: prune")], "")
    (tmp_path / "cfg.yaml").write_text(text.replace("pruning_ratio: 0.25", "pruning_ratio: 0.5"))
    first = report_of(onnxshrink("run", "cfg.yaml", "--json", cwd=tmp_path))
    assert first["candidates"][0]["name"] == "source"
    (tmp_path / "cfg.yaml").write_text(text.replace("stages:\n", "stages:\n  - {kind: finetune, epochs: 1}\n"))
    again = report_of(onnxshrink("run", "cfg.yaml", "--json", cwd=tmp_path))
    assert again["candidates"][0]["name"] == "unpruned"


def test_what_the_users_code_prints_is_not_in_the_json(project: Path) -> None:
    """A factory that prints leaves standard output to the report."""
    nets = project / "nets.py"
    nets.write_text(nets.read_text().replace("    return", "    print('building')\n    return"))
    result = onnxshrink("run", "cfg.yaml", "--json", cwd=project)
    assert report_of(result)["winner"] == "int8"
    assert "building" in result.stderr


def test_a_gate_that_stays_undecided_is_a_warning(project: Path) -> None:
    """Whoever reads the warnings alone learns that a gate was not decided."""
    override = "gates={max_accuracy_drop: 0.001}"
    result = onnxshrink("run", "cfg.yaml", "--set", override, "--json", cwd=project)
    report = report_of(result)
    undecided = {
        (row["name"], verdict["gate"])
        for row in report["candidates"]
        for verdict in row["verdicts"]
        if verdict["outcome"] == "inconclusive"
    }
    assert undecided
    assert all(
        any(text.startswith(f"{name}: {gate} is inc") for text in report["warnings"]) for name, gate in undecided
    )
