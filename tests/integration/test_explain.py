"""The command ``explain``: a table in 80 columns, JSON, and a patch in a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import explain_mutations as mutations
import numpy as np
import onnx
import pytest
from ruamel.yaml import YAML


def files(folder: Path) -> list[str]:
    """A network, itself quantized with a range that is far too narrow, and samples."""
    model = mutations.mlp()
    arrays = mutations.samples("mlp", model)
    candidate = mutations.quantized(model, arrays)
    scale = next(tensor for tensor in candidate.graph.initializer if tensor.name == "r1_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(0.3), "r1_scale"))
    onnx.save(model, folder / "reference.onnx")
    onnx.save(candidate, folder / "candidate.onnx")
    np.savez(folder / "x.npz", **arrays)  # type: ignore[arg-type]
    return ["reference.onnx", "candidate.onnx", "--data", "x.npz"]


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in its own process, 80 columns wide."""
    return subprocess.run(
        [sys.executable, "-m", "onnxshrink", "explain", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={"COLUMNS": "80", "OMP_NUM_THREADS": "1", "PATH": ""},
    )


@pytest.mark.slow
def test_explain_on_the_command_line(tmp_path: Path) -> None:
    """The table names the cause and fits, the patch is written, JSON is JSON, and a wrong path is told."""
    arguments = files(tmp_path)
    shown = call(tmp_path, *arguments, "--out", "patch.yaml", "--top", "2")
    assert shown.returncode == 0, shown.stderr
    assert "dense1" in shown.stdout
    assert "activation_clipping" in shown.stdout
    assert "more; --json has them all" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    (stage,) = YAML(typ="safe").load((tmp_path / "patch.yaml").read_text())
    assert (stage["kind"], stage["method"]) == ("quantize_static", "minmax")
    told = json.loads(call(tmp_path, *arguments, "--json", "--max-samples", "4", "--max-memory", "1").stdout)
    assert told["samples"] == 4
    assert {"node", "local_sqnr_db", "propagated_sqnr_db", "output_sqnr_db", "finding"} <= told["nodes"][0].keys()
    (tmp_path / "mine.yaml").write_text("mine")
    alike = call(tmp_path, "reference.onnx", "reference.onnx", *arguments[2:], "--out", "mine.yaml")
    assert (alike.returncode, (tmp_path / "mine.yaml").read_text()) == (0, "mine")
    assert "mine.yaml is not written" in alike.stderr
    assert "mine.yaml" not in alike.stdout
    missing = call(tmp_path, "nothing.onnx", *arguments[1:])
    assert missing.returncode == 2
    assert "there is no file" in missing.stderr
