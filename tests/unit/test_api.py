from __future__ import annotations

import builtins
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import cnn, samples_of

import onnxshrink
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.events import Logged
from onnxshrink.core.report import Candidate, Metric, Verdict

CONFIG = """\
model: {onnx: m.onnx}
data: {calibration: {npz: calib.npz}, evaluation: {npz: test.npz}}
variants: {fp32: [], int8: [{kind: quantize_static}]}
targets: [{latency_seconds: 0.02}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float CNN, two sets of samples, a config, and the run of it."""
    folder = tmp_path_factory.mktemp("project")
    model = cnn()
    onnx.save(model, str(folder / "m.onnx"))
    np.savez(folder / "calib.npz", **samples_of(model, 24))
    np.savez(folder / "test.npz", **samples_of(model, 24, seed=1))
    (folder / "cfg.yaml").write_text(CONFIG)
    onnxshrink.run(str(folder / "cfg.yaml"), runs=str(folder / "runs"))
    return folder


def document() -> dict[str, Any]:
    """The same config as a dict."""
    return {
        "name": "cfg",
        "model": {"onnx": "m.onnx"},
        "data": {"calibration": {"npz": "calib.npz"}, "evaluation": {"npz": "test.npz"}},
        "variants": {"fp32": [], "int8": [{"kind": "quantize_static"}]},
        "targets": [{"latency_seconds": 0.02}],
    }


def test_importing_the_package_imports_nothing_else() -> None:
    """Not even pydantic: a name is imported when it is first used."""
    code = (
        "import sys; import onnxshrink; "
        "assert not [m for m in sys.modules if m.startswith('onnxshrink.')]; "
        "assert not {'numpy', 'onnx', 'onnxruntime', 'pydantic', 'rich', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(onnxshrink.__file__).parent.parent)


def test_every_public_name_is_there_and_others_are_not() -> None:
    """What `__all__` lists can be got and is documented; a misspelt name is an AttributeError."""
    assert set(onnxshrink.__all__) == set(onnxshrink._PLACES)
    assert set(onnxshrink.__all__) <= set(dir(onnxshrink))
    assert all(getattr(onnxshrink, name).__doc__ for name in onnxshrink.__all__)
    with pytest.raises(AttributeError, match="quantise"):
        onnxshrink.quantise  # noqa: B018


def test_a_run_leaves_what_the_command_line_leaves(folder: Path) -> None:
    """The same files with the same bytes, but for what is measured anew."""
    command = [sys.executable, "-m", "onnxshrink", "run", str(folder / "cfg.yaml"), "--runs", "other", "--quiet"]
    subprocess.run(command, check=True, cwd=folder, capture_output=True)
    ours, theirs = (
        {str(path.relative_to(runs)): path for path in (runs / "cfg").rglob("*") if path.is_file()}
        for runs in (folder / "runs", folder / "other")
    )
    assert set(ours) == set(theirs)
    assert {"cfg/bundle/manifest.json", "cfg/MODEL_CARD.md", "cfg/report.json"} <= set(ours)
    models = [name for name in ours if name.endswith((".onnx", ".npz"))]
    assert all(ours[name].read_bytes() == theirs[name].read_bytes() for name in models)


def test_a_dict_is_a_config_and_stays_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its paths start at the working folder; overrides reach a copy; everything else comes from the file's run."""
    monkeypatch.chdir(folder)
    given = document()
    report = onnxshrink.run(given, ["targets[0].latency_seconds=0.03"], runs="runs")
    assert given == document()
    assert report.config["targets"][0]["latency_seconds"] == 0.03
    saved = onnxshrink.Report.read(Path("runs", "cfg", "report.json"))
    assert [(row.name, row.digest) for row in saved.candidates] == [(row.name, row.digest) for row in report.candidates]


def test_a_finished_config_takes_no_overrides(folder: Path) -> None:
    """A RunConfig runs as it is, and the refusal says what to do."""
    config = onnxshrink.RunConfig.model_validate(document(), context={"base": folder})
    assert onnxshrink.run(config, runs=folder / "runs").winner is not None
    with pytest.raises(ConfigError, match="model_copy"):
        onnxshrink.run(config, ["select=fastest"])


def test_the_one_liners_take_text(folder: Path) -> None:
    """Paths may be strings, as people write them in notebooks."""
    model, out, data = (str(folder / name) for name in ("m.onnx", "int8.onnx", "test.npz"))
    onnxshrink.quantize(model, str(folder / "calib.npz"), out, evaluation=data)
    assert onnxshrink.compare(model, out, data).candidate("candidate").metric("sqnr_db") is not None
    assert onnxshrink.explain(model, out, data, max_samples=2).nodes
    assert onnxshrink.inspect(out, data=data).quantized_op_types
    assert onnxshrink.check(str(folder / "runs" / "cfg" / "bundle")).outcome == "passed"


def test_a_search_leaves_its_pages(folder: Path) -> None:
    """A config with a budget and the one-liner leave card and page, with the search on it, beside what was tried."""
    budget = {"max_size": "1MB", "min_sqnr_db": 10, "families": ["fp16"]}
    config = onnxshrink.RunConfig.model_validate(
        {**document(), "name": "sought", "variants": {"fp32": []}, "budget": budget}, context={"base": folder}
    )
    assert onnxshrink.run(config, runs=folder / "runs").winner is not None
    model, data, out = (str(folder / name) for name in ("m.onnx", "test.npz", "fits.onnx"))
    assert onnxshrink.fit(model, data, out, budget=budget, runs=str(folder / "runs")).winner is not None
    for name in ("sought", "fit-m"):
        left = {path.name for path in (folder / "runs" / name).iterdir()}
        assert {"search.json", "search.csv", "report.json", "report.html", "MODEL_CARD.md"} <= left
        assert 'id="search-title"' in (folder / "runs" / name / "report.html").read_text(encoding="utf-8")
    assert (folder / "runs" / "sought" / "bundle" / "manifest.json").is_file()


def test_a_run_is_logged_and_nobody_hears_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Steps at INFO and warnings at WARNING, to `onnxshrink`, whose only own handler says nothing."""
    caplog.set_level(logging.INFO, "onnxshrink")
    onnxshrink.run(folder / "cfg.yaml", ["seed=1"], runs=folder / "runs")
    Logged().warned("50% left")
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert ("onnxshrink", "INFO", "started int8/quantize_static") in said
    assert any(text.startswith("finished int8/quantize_static in ") for _, _, text in said)
    assert ("onnxshrink", "WARNING", "50% left") in said
    assert {name for name, _, _ in said} == {"onnxshrink"}
    assert [type(handler) for handler in logging.getLogger("onnxshrink").handlers] == [logging.NullHandler]


def test_an_unheard_run_prints_nothing(folder: Path) -> None:
    """Neither to standard output nor to standard error: not even warnings through logging's last resort."""
    code = "import onnxshrink; onnxshrink.run('cfg.yaml')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_progress_is_plain_lines_where_there_is_no_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each step, on standard error."""
    with onnxshrink.progress() as events:
        onnxshrink.run(folder / "cfg.yaml", runs=folder / "runs", events=events)
    out, err = capsys.readouterr()
    assert out == ""
    assert "quantize_static" in err
    assert "\x1b" not in err


def test_progress_in_a_notebook_is_plain_lines_too(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard output, without cursor moves, though a kernel sets FORCE_COLOR as if it were a terminal."""
    shell = type("ZMQInteractiveShell", (), {})  # by this name rich knows a notebook
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    with onnxshrink.progress() as events:
        onnxshrink.run(folder / "cfg.yaml", runs=folder / "runs", events=events)
    out, err = capsys.readouterr()
    assert err == ""
    assert "quantize_static" in out
    assert "\x1b" not in out


def test_a_notebook_shows_a_table(folder: Path) -> None:
    """One row a model, the winner marked, with the report's own figures."""
    report = onnxshrink.Report.read(folder / "runs" / "cfg" / "report.json")
    html = report._repr_html_()
    assert html.count("<tr>") == 1 + len(report.candidates)
    assert f"<th>▸ {report.winner}</th>" in html
    size = report.candidate("int8").metric("size_bytes")
    assert size is not None
    assert size.value is not None
    assert f"<td>{size.value / 1000:,.1f} kB</td>" in html


def test_a_notebook_tells_the_cosine_of_the_task_from_that_of_an_output() -> None:
    """Both have one name; the column is the task's."""
    metrics = (Metric("cosine", 0.25, target="cpu", output="y"), Metric("cosine", 0.75, target="cpu"))
    config = {"data": {"evaluation": {"metric": "cosine"}}}
    row = Candidate("int8", "variant", "", "", metrics)
    html = onnxshrink.Report("r", config, (row,), (), None, "", {}, {}, 0.0)._repr_html_()
    assert "<td>0.75</td>" in html
    assert "0.25" not in html


def test_names_cannot_smuggle_markup_into_a_notebook() -> None:
    """Names, targets, notes, reasons and warnings are text."""
    evil = "<script>x</script>"
    metrics = (
        Metric("size_bytes", None, note=evil),
        Metric("a:<b>", 0.5, "ratio", 0.4, 0.6, target=evil),
        Metric("latency_ratio", 0.5, "ratio", 0.49, 0.51, target="cpu"),
    )
    row = Candidate(evil, "variant", "", "", metrics, (Verdict("g", 1.0, "failed", evil),))
    config = {"data": {"evaluation": {"metric": {"entry": "a:<b>", "better": "higher"}}}}
    html = onnxshrink.Report(evil, config, (row,), (), None, evil, {}, {}, 0.0, (evil,))._repr_html_()
    assert "<script" not in html
    assert "<b>:" not in html.replace("</b>:", "")
    assert html.count("<table>") == 2
    assert "0.5 (0.4 to 0.6)" in html
    assert "<td>failed</td>" in html


def test_the_reference_of_the_api_is_written_from_its_docstrings(tmp_path: Path) -> None:
    """As `python tools/dev.py docs` does it: every public name is on the page, without a warning."""
    pytest.importorskip("pdoc", reason="needs the dev extra")
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--output-directory", str(tmp_path), "onnxshrink"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""
    page = (tmp_path / "onnxshrink.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in onnxshrink.__all__)
