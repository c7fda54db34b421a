"""A manifest that somebody forged, or that a merge spoiled, is told as such."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import cnn, samples_of

from onnxshrink.regress.check import BundleError, check_bundle, item_names, main, update_bundle, write_baseline

Place = tuple[str | int, ...]
UNREAD = ("metrics", "config")
TEXTS = st.text(max_size=8) | st.text(st.characters(categories=["Cs", "Cc"]), min_size=1, max_size=3)
NUMBERS = st.integers() | st.sampled_from([2**63, -(2**64), 10**25, 10**308, 17 * 10**307, 10**400]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@cache
def original() -> tuple[Path, dict[str, Any]]:
    """A bundle of a CNN as `write_baseline` leaves it, with all that a run adds, and its manifest."""
    folder = Path(mkdtemp(prefix="onnxshrink-")) / "bundle"
    folder.mkdir()
    onnx.save(cnn(), folder / "model.onnx")
    session = {"provider": "CPUExecutionProvider", "options": {}, "threads": 1, "optimization": "all"}
    kept = {
        "session": session,
        "history": [{"since": "then", "sha256": "0"}],
        "latency": {"p50_ms": 1.0, "lo_ms": 0.9, "hi_ms": 1.1},
        "metrics": [{"name": "size_bytes", "value": 1.0}],
        "config": {"seed": 0},
    }
    rows = [{"x": row[None]} for row in samples_of(cnn(), 2)["x"]]
    return folder, json.loads(json.dumps(write_baseline(folder, kept, rows) | read(folder)))


@pytest.fixture(scope="module", autouse=True)
def no_leftovers() -> Iterator[None]:
    """Remove the bundle when all is done."""
    yield
    shutil.rmtree(original()[0].parent)


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every value of a manifest, whatever it is in."""
    if at:
        yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*at, key))


def mutated(manifest: dict[str, Any], at: Place, value: Any) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(json.dumps(manifest))
    inner: Any = whole
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return whole


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """With the digest that fits, as one who knows how would forge it."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "digest": hashlib.sha256(text.encode()).hexdigest()}


def status(*arguments: str) -> tuple[int, str]:
    """Exit status and what is printed, on streams that are as strict as a terminal's."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with redirect_stdout(out), redirect_stderr(out):
        code = main(arguments)
        out.flush()
    return code, out.buffer.getvalue().decode()  # type: ignore[attr-defined]


@st.composite
def forgeries(draw: st.DrawFn) -> dict[str, Any]:
    """A manifest with one value that is another: any JSON, or of the same type as before."""
    _, manifest = original()
    at = draw(st.sampled_from(sorted(places(manifest), key=str)))
    before: Any = manifest
    for key in at:
        before = before[key]
    alike = {str: TEXTS, int: NUMBERS, float: NUMBERS, bool: st.booleans()}.get(type(before), VALUES)
    return mutated(manifest, at, draw(VALUES | alike))


@pytest.mark.slow
@given(forged=forgeries(), fits=st.booleans(), how=st.sampled_from(["own", "model", "reports", "update"]))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_no_manifest_is_a_bug_of_ours(forged: dict[str, Any], fits: bool, how: str) -> None:  # noqa: FBT001
    """Whatever value is in it, signed or not: passed, a failed item or an error that says what to do, never another."""
    source, _ = original()
    with TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(source, Path(scratch) / "bundle"))
        (folder / "manifest.json").write_text(json.dumps(signed(forged) if fits else forged))
        model, xml, sarif = str(folder / "model.onnx"), str(folder / "o.xml"), str(folder / "o.sarif")
        options = {
            "own": [],
            "model": [model, "--no-latency", "--json"],
            "reports": [model, "--no-latency", "--junit", xml, "--sarif", sarif],
            "update": ["--update"],
        }[how]
        code, said = status(str(folder), *options)
    assert code in {0, 1, 2}, said
    if code == 2:
        assert '"what"' in said if "--json" in options else said.startswith("error: "), said


@given(forged=forgeries())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_an_unsigned_change_never_passes(forged: dict[str, Any]) -> None:
    """A check of it, and its items for pytest, end in the error that is told; equal JSON alone is no change."""
    source, manifest = original()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        text = json.dumps(forged)
        (folder / "manifest.json").write_text(text)
        if text == json.dumps(manifest):
            assert item_names(folder) == item_names(source)
            return
        for ask in (check_bundle, item_names):
            with pytest.raises(BundleError):
                ask(folder)


def test_what_no_check_reads_may_be_anything() -> None:
    """Facts of the run that made it are told to people, not to a check."""
    source, manifest = original()
    for name in UNREAD:
        with TemporaryDirectory() as scratch:
            folder = Path(shutil.copytree(source, Path(scratch) / "bundle"))
            (folder / "manifest.json").write_text(json.dumps(signed(mutated(manifest, (name,), [None, {"x": "?"}]))))
            assert check_bundle(folder).outcome == "passed"
            update_bundle(folder)
            assert check_bundle(folder).outcome == "passed"
