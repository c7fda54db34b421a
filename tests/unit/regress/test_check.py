from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import attention, cnn, samples_of

from onnxshrink.regress import check as check_module
from onnxshrink.regress.check import (
    BundleError,
    Result,
    check_bundle,
    describe_model,
    distance,
    item_names,
    main,
    to_junit,
    to_sarif,
    update_bundle,
    write_baseline,
)

SESSION = {"provider": "CPUExecutionProvider", "options": {}, "threads": 1}


def write_bundle(folder: Path, model: onnx.ModelProto, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))
    arrays = samples_of(model, count)
    rows = [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]
    write_baseline(folder, {"session": SESSION, "history": []}, rows)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small CNN."""
    return write_bundle(tmp_path_factory.mktemp("original") / "bundle", cnn())


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A copy to be changed at will."""
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def failed(result: Result) -> set[str]:
    return {item.name for item in result.items if item.outcome == "failed"}


def changed(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """The bundle's model with a change, beside the bundle."""
    model = onnx.load(str(bundle / "model.onnx"))
    change(model)
    path = bundle.parent / "changed.onnx"
    onnx.save(model, str(path))
    return path


def scale(factor: float, name: str = "w4") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = (numpy_helper.to_array(tensor) * np.float32(factor)).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


def flip_lowest_bit(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "w1")
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]


def rename_everything(model: onnx.ModelProto) -> None:
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        node.name += "_"
        for names in (node.input, node.output):
            names[:] = [name if name in ends or not name else f"{name}_" for name in names]
    for tensor in model.graph.initializer:
        tensor.name += "_"
    model.producer_name = "somebody else"


def newer_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version += 1


def no_clip(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Clip")
    other = next(n for n in model.graph.node if node.output[0] in n.input)
    other.input[list(other.input).index(node.output[0])] = node.input[0]
    model.graph.node.remove(node)


def other_padding(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.name == "conv1")
    next(a for a in node.attribute if a.name == "pads").ints[:] = [2, 2, 0, 0]


def other_name(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "logits"


def swapped_classes(model: onnx.ModelProto) -> None:
    for name in ("w4", "b4"):
        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor)[::-1].copy()
        tensor.CopyFrom(numpy_helper.from_array(array, name))


def test_the_untouched_bundle_passes(bundle: Path) -> None:
    """Every item is looked into but the latency of the baseline against itself."""
    result = check_bundle(bundle)
    assert result.outcome == "passed"
    assert result.exit_code == 0
    assert [item.name for item in result.items if item.outcome != "passed"] == ["latency_ratio"]
    assert tuple(item.name for item in result.items) == item_names(bundle)
    assert {item.baseline for item in result.items} == {result.since}


def test_the_same_network_under_other_names_passes(bundle: Path) -> None:
    """Names of tensors and nodes, and who made the file, are no part of what it computes."""
    result = check_bundle(bundle, changed(bundle, rename_everything), latency=False)
    assert not failed(result), [item for item in result.items if item.outcome == "failed"]
    assert "other bytes" in next(item.reason for item in result.items if item.name == "model")


@pytest.mark.parametrize(
    ("change", "found", "behaviour"),
    [
        (flip_lowest_bit, {"weights"}, False),
        (scale(1.01), {"weights"}, True),
        (swapped_classes, {"weights", "top1_agreement y"}, True),
        (newer_opset, {"opset"}, False),
        (no_clip, {"operators", "graph"}, True),
        (other_padding, {"graph"}, True),
        (other_name, {"outputs"}, True),
    ],
)
def test_a_changed_model_is_told_by_what_changed(
    bundle: Path, change: Callable[[onnx.ModelProto], None], found: set[str], *, behaviour: bool
) -> None:
    """Whatever it does to the outputs; with only behaviour in question, what does nothing to them passes."""
    model = changed(bundle, change)
    result = check_bundle(bundle, model, latency=False)
    assert found <= failed(result), failed(result)
    loose = check_bundle(bundle, model, latency=False, behaviour_only=True)
    assert bool(failed(loose)) is behaviour, failed(loose)
    assert not failed(loose) & {"weights", "opset", "operators", "graph"}


def test_a_changed_weight_is_named(bundle: Path) -> None:
    """The item says which tensor."""
    result = check_bundle(bundle, changed(bundle, flip_lowest_bit), latency=False)
    reason = next(item.reason for item in result.items if item.name == "weights")
    assert reason == "1 of 9 tensors differ; changed: w1"


@pytest.mark.parametrize("name", ["model.onnx", "golden_inputs.npz", "golden_outputs.npz", "check.py"])
@pytest.mark.parametrize("how", ["changed", "truncated", "missing"])
def test_damage_is_told_by_the_file(bundle: Path, name: str, how: str) -> None:
    """Each way of spoiling each file fails an item with the file's name; no other file is accused."""
    path = bundle / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if how == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    result = check_bundle(bundle)
    items = [item for item in result.items if item.name.startswith("integrity") and item.outcome == "failed"]
    assert [item.file for item in items] == [name]
    assert how in items[0].reason
    assert result.exit_code == 1


@pytest.mark.parametrize("change", ["missing", "truncated", "edited", "newer"])
def test_a_bundle_that_cannot_be_read_is_an_error(bundle: Path, change: str) -> None:
    """The manifest is what everything else is checked against, so its damage is no verdict: exit code 2."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        path.write_text(path.read_text()[:-20])
    elif change == "edited":
        manifest["tolerances"]["y"]["max_abs"] = 100.0
        path.write_text(json.dumps(manifest))
    else:
        manifest["schema"] = 99
        check_module.write_manifest(bundle, {k: v for k, v in manifest.items() if k != "digest"})
    with pytest.raises(BundleError) as e:
        check_bundle(bundle)
    assert e.value.exit_code == 2
    assert e.value.where is not None
    assert main([str(bundle)]) == 2


def sign(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a manifest with a change and a signature that fits it, as an attacker would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps({**rest, "digest": digest}))


@pytest.mark.parametrize("name", ["../victim", "/etc/hostname", "sub/../../victim"])
@pytest.mark.parametrize("place", ["files", "external"])
def test_a_bundle_reaches_nothing_outside_its_folder(bundle: Path, name: str, place: str) -> None:
    """Neither a check nor an update reads, writes or removes what a signed manifest names elsewhere."""
    victim = bundle.parent / "victim"
    victim.write_text("precious")

    def change(manifest: dict[str, Any]) -> None:
        if place == "files":
            manifest["files"][name] = {"sha256": "0" * 64, "size_bytes": 1}
        else:
            manifest["model"]["external"] = [name]

    sign(bundle, change)
    with pytest.raises(BundleError, match="outside the folder"):
        check_bundle(bundle)
    with pytest.raises(BundleError, match="outside the folder"):
        update_bundle(bundle, changed(bundle, scale(1.01)))
    assert victim.read_text() == "precious"


def test_a_model_reaches_no_data_outside_its_folder(bundle: Path) -> None:
    """A candidate whose weights lie elsewhere is refused before anything is read."""
    (bundle.parent / "w.data").write_bytes(b"0" * 4096)

    def outside(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../w.data")

    model = onnx.load(str(bundle / "model.onnx"))
    outside(model)
    folder = bundle.parent / "in"
    folder.mkdir()
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="outside the folder"):
        describe_model(folder / "m.onnx")
    assert failed(check_bundle(bundle, folder / "m.onnx")) == {"model"}


@pytest.mark.parametrize("part", ["model", "files", "tolerances", "session", "golden", "machine", "versions", "schema"])
def test_a_signed_manifest_that_lacks_a_part_is_an_error_of_the_users(bundle: Path, part: str) -> None:
    """Exit code 2 and not a traceback, whatever the signature says."""
    sign(bundle, lambda manifest: manifest.pop(part))
    assert main([str(bundle)]) == 2


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("tolerances", "y", "max_abs"), "1", "manifest.tolerances.y.max_abs is missing, or no number"),
        (("tolerances", "y", "max_abs"), float("nan"), "NaN is no number that a manifest can hold"),
        (("tolerances", "y", "max_abs"), 10**400, "is no number that a manifest can hold"),
        (("tolerances", "y", "ranks_classes"), 1, "no true or false"),
        (("model", "size_bytes"), True, "manifest.model.size_bytes is missing, or no whole number"),
        (("model", "size_bytes"), 2**70, "manifest.model.size_bytes is missing, or no whole number"),
        (("model", "opsets"), [], "manifest.model.opsets is no object"),
        (("model", "external"), {}, "manifest.model.external is no list"),
        (("model", "external"), ["w\0"], "no file is called 'w\\x00'"),
        (("model", "weights"), [["w1"]], "no pairs of name and digest"),
        (("session", "threads"), 10**6, "session.threads is not between 0 and 1024"),
        (("session", "optimization"), "most", "session.optimization is no level"),
        (("golden", "n_samples"), 0, "golden.n_samples is less than one"),
        (("schema",), "1", "manifest.schema is missing, or no whole number"),
        (("since",), None, "manifest.since is missing, or no text"),
    ],
)
def test_a_signed_manifest_says_where_it_is_not_as_it_should_be(
    bundle: Path, place: tuple[str, ...], value: Any, said: str
) -> None:
    """Exit code 2, and the field by its name: of another type, beyond measure, or without meaning."""

    def change(manifest: dict[str, Any]) -> None:
        inner = manifest
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value

    sign(bundle, change)
    with pytest.raises(BundleError) as e:
        check_bundle(bundle)
    assert said in e.value.what
    assert main([str(bundle)]) == 2


def test_classes_that_the_golden_outputs_do_not_have_are_a_failed_item(tmp_path: Path) -> None:
    """A manifest that says so is forged; the other items still have their verdict."""
    nodes = [onnx.helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)]
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", ["N", 4]), ("y", []))]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    folder = write_bundle(tmp_path / "b", model)
    sign(folder, lambda manifest: manifest["tolerances"]["y"].update(ranks_classes=True))
    assert failed(check_bundle(folder)) == {"top1_agreement y"}


def test_outputs_that_are_all_zero_have_no_relative_distance(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another level of optimization gives a little noise instead, the manifest stays JSON."""
    model, own, calls = changed(bundle, scale(0.0)), check_module.run_samples, iter(range(100))

    def noisy(session: Any, samples: Any) -> list[dict[str, Any]]:
        noise = np.float32(1e-6 if next(calls) == 2 else 0)
        return [{name: np.zeros_like(array) + noise for name, array in row.items()} for row in own(session, samples)]

    monkeypatch.setattr(check_module, "run_samples", noisy)
    _, tolerances = check_module.learn_tolerances(
        model, SESSION, describe_model(model), [{"x": np.zeros((1, 3, 16, 16), np.float32)}]
    )
    assert tolerances["y"]["relative_l2"] is None
    assert tolerances["y"]["max_abs"] == pytest.approx(4e-6)
    json.dumps(tolerances, allow_nan=False)


def test_names_that_a_terminal_cannot_show_are_no_bug(bundle: Path) -> None:
    """A tensor may be called anything; what the stream has no character for is written as its number."""
    sign(bundle, lambda manifest: manifest["files"].update({"größe": {"sha256": "0", "size_bytes": 1}}))
    command = [sys.executable, str(bundle / "check.py")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    assert r"gr\xf6\xdfe is missing" in done.stdout


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", '{"digest": "x"}', "\x00"])
def test_text_that_is_no_manifest_is_an_error_of_the_users(bundle: Path, text: str) -> None:
    """Other JSON, deep JSON, none: exit code 2."""
    (bundle / "manifest.json").write_text(text)
    assert main([str(bundle)]) == 2


def test_a_manifest_beyond_measure_is_not_read(bundle: Path) -> None:
    """A file of zeros that takes no room on the disk would take all memory."""
    with (bundle / "manifest.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(BundleError, match="larger than"):
        check_bundle(bundle)


def test_golden_samples_are_never_unpickled(bundle: Path, tmp_path: Path) -> None:
    """Objects in an archive are refused, also where digests fit: reading them would run what they say."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    bomb = np.empty(1, object)
    bomb[0] = Bomb()
    np.savez(bundle / "golden_inputs.npz", **{"0.0": bomb})
    digest = hashlib.sha256((bundle / "golden_inputs.npz").read_bytes()).hexdigest()
    size = (bundle / "golden_inputs.npz").stat().st_size
    sign(bundle, lambda m: m["files"]["golden_inputs.npz"].update(sha256=digest, size_bytes=size))
    assert failed(check_bundle(bundle)) == {"max_abs_error y"}
    assert not (tmp_path / "exploded").exists()


def test_a_small_model_may_gain_a_name(bundle: Path) -> None:
    """5% of a few kilobytes are less than metadata take; 5 kB more of them are too many."""

    def described(length: int) -> Callable[[onnx.ModelProto], None]:
        def change(model: onnx.ModelProto) -> None:
            model.doc_string = "x" * length

        return change

    assert not failed(check_bundle(bundle, changed(bundle, described(3000)), latency=False))
    assert failed(check_bundle(bundle, changed(bundle, described(5000)), latency=False)) == {"size_bytes"}


def test_a_file_that_is_no_model_fails(bundle: Path, tmp_path: Path) -> None:
    """A truncated candidate is a verdict on it, and what hangs on it is skipped."""
    (tmp_path / "half.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:-100])
    result = check_bundle(bundle, tmp_path / "half.onnx")
    assert failed(result) == {"model"}
    assert {item.outcome for item in result.items if item.name.startswith("max_abs")} == {"skipped"}


def test_the_description_agrees_with_onnx(tmp_path: Path) -> None:
    """What is read from the bytes is what the onnx package reads."""
    model = attention()
    onnx.save(model, str(tmp_path / "m.onnx"))
    found = describe_model(tmp_path / "m.onnx")
    assert found["opsets"] == {entry.domain: entry.version for entry in model.opset_import}
    assert found["ir_version"] == model.ir_version
    counts = {node.op_type: 0 for node in model.graph.node}
    for node in model.graph.node:
        counts[node.op_type] += 1
    assert found["op_types"] == counts
    assert {name for name, _ in found["weights"]} == {tensor.name for tensor in model.graph.initializer}
    assert found["size_bytes"] == (tmp_path / "m.onnx").stat().st_size


def test_external_data_is_part_of_the_model(tmp_path: Path) -> None:
    """Weights in a file beside the model are signed, compared and counted like those inside it."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    model = cnn()
    onnx.save(model, str(folder / "model.onnx"), save_as_external_data=True, location="w.data", size_threshold=0)
    rows = [{"x": samples_of(model, 1)["x"]}]
    write_baseline(folder, {"session": SESSION}, rows)
    assert check_bundle(folder).outcome == "passed"
    data = bytearray((folder / "w.data").read_bytes())
    data[3] ^= 0x10
    (folder / "w.data").write_bytes(data)
    assert {"integrity w.data", "weights"} <= failed(check_bundle(folder))


def test_distances_are_what_numpy_says() -> None:
    """Largest difference, where it is, and the relative norm over all samples."""
    rng = np.random.default_rng(0)
    want = [rng.standard_normal((1, 5)).astype(np.float32) for _ in range(3)]
    have = [row + rng.standard_normal((1, 5)).astype(np.float32) / 10 for row in want]
    gap = distance(want, have)
    error = np.abs(np.stack(want).astype(float) - np.stack(have))
    assert gap.max_abs == pytest.approx(error.max())
    assert gap.sample == int(error.max(axis=(1, 2)).argmax())
    assert gap.relative_l2 == pytest.approx(np.linalg.norm(error) / np.linalg.norm(np.stack(want)), rel=1e-6)


@pytest.mark.parametrize(
    ("have", "flaw"),
    [
        (np.array([[1.0, np.nan]], np.float32), "NaN"),
        (np.array([[1.0, np.inf]], np.float32), "infinity"),
        (np.zeros((1, 3), np.float32), "in place of"),
    ],
)
def test_what_cannot_be_compared_is_a_flaw(have: np.ndarray[tuple[int, ...], np.dtype[np.float32]], flaw: str) -> None:
    """A NaN on one side never passes as near."""
    gap = distance([np.array([[1.0, 2.0]], np.float32)], [have])
    assert flaw in str(gap.flaw)
    assert gap.max_abs == float("inf")


def test_tolerances_are_never_zero(bundle: Path) -> None:
    """An output that was the same at every optimization level may still move by what float32 sums may."""
    limits = json.loads((bundle / "manifest.json").read_text())["tolerances"]["y"]
    assert 0 < limits["max_abs"] < 1e-3
    assert limits["max_abs"] >= 4 * limits["learned_max_abs"]
    assert 0 < limits["relative_l2"] < 1e-3


def classifier(sign: float = 1.0) -> onnx.ModelProto:
    """One row in, the number of its class out."""
    weights = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32) * np.float32(sign)
    return network(
        [helper.make_node("MatMul", ["x", "w"], ["l"]), helper.make_node("ArgMax", ["l"], ["k"], axis=1, keepdims=0)],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("k", TensorProto.INT64, ["n"])],
        [numpy_helper.from_array(weights, "w")],
    )


def network(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: Sequence[Any] = ()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def baseline(folder: Path, model: onnx.ModelProto, sample: dict[str, Any]) -> Path:
    """A bundle with one golden sample, as a model with large inputs has."""
    folder.mkdir()
    onnx.save(model, str(folder / "model.onnx"))
    write_baseline(folder, {"session": SESSION}, [sample])
    return folder


def test_one_golden_class_that_is_another_fails(tmp_path: Path) -> None:
    """One of one may not differ, though one of many may: else nothing could fail where a single class is golden."""
    folder = baseline(tmp_path / "bundle", classifier(), {"x": np.ones((1, 3), np.float32)})
    assert check_bundle(folder).outcome == "passed"
    other = changed(folder, lambda model: model.CopyFrom(classifier(-1.0)))
    assert failed(check_bundle(folder, other, latency=False, behaviour_only=True)) == {"max_abs_error k"}


@pytest.mark.parametrize("share", [False, True])
def test_a_model_that_draws_at_random_is_no_baseline(tmp_path: Path, *, share: bool) -> None:
    """It differs from itself as much as from another: that is inconclusive, neither an alarm nor a pass."""
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])]
    nodes = [helper.make_node("RandomUniformLike", ["x"], ["r"])]
    nodes.append(
        helper.make_node("Greater", ["r", "x"], ["y"]) if share else helper.make_node("Identity", ["r"], ["y"])
    )
    kind = TensorProto.BOOL if share else TensorProto.FLOAT
    model = network(nodes, ends, [helper.make_tensor_value_info("y", kind, [1, 64])])
    folder = baseline(tmp_path / "bundle", model, {"x": np.full((1, 64), 0.5, np.float32)})
    # Sessions of one process draw alike, so another process is asked.
    command = [sys.executable, "-I", str(folder / "check.py"), "--json"]
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.returncode == 0, other.stderr
    result = json.loads(other.stdout)
    assert result["outcome"] == "inconclusive"
    unsure = {item["name"]: item["reason"] for item in result["items"] if item["outcome"] == "inconclusive"}
    assert unsure.keys() == ({"max_abs_error y"} if share else {"max_abs_error y", "relative_l2 y"})
    assert all("the baseline differs from itself as much" in reason for reason in unsure.values())


def test_a_model_without_inputs_has_a_bundle(tmp_path: Path) -> None:
    """There is nothing to give it at once, and its outputs are golden like any other's."""
    ends = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])]
    weights = [numpy_helper.from_array(np.ones(3, np.float32), "w")]
    model = network([helper.make_node("Identity", ["w"], ["y"])], [], ends, weights)
    assert check_bundle(baseline(tmp_path / "bundle", model, {})).outcome == "passed"


def test_an_update_accepts_files_that_may_not_be_written(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files checked out read-only are replaced, not written to, so the new ones do not inherit that."""
    for path in bundle.iterdir():
        path.chmod(0o444)
    modes: list[int] = []
    write = check_module.write_baseline

    def looked(folder: Path, *rest: Any) -> Any:
        modes.extend(path.stat().st_mode & 0o200 for path in folder.iterdir())
        return write(folder, *rest)

    monkeypatch.setattr(check_module, "write_baseline", looked)
    update_bundle(bundle, changed(bundle, scale(1.01)))
    assert modes
    assert all(modes)  # root writes to any file, so it is the mode that tells
    assert check_bundle(bundle).outcome == "passed"


def test_an_update_accepts_the_model_and_says_what_changed(bundle: Path) -> None:
    """Afterwards it is the baseline, the one before is in the history, and other files in the folder stay."""
    model = changed(bundle, scale(1.01))
    (bundle / "note.txt").write_text("ours")
    before = json.loads((bundle / "manifest.json").read_text())
    changes = "\n".join(update_bundle(bundle, model))
    assert "model: " in changes
    assert "weights: 1 of 9 tensors differ; changed: w4" in changes
    assert "max_abs_error y" in changes
    after = json.loads((bundle / "manifest.json").read_text())
    assert after["history"] == [{"since": before["since"], "sha256": before["model"]["sha256"]}]
    assert check_bundle(bundle, model).outcome == "passed"
    assert check_bundle(bundle).outcome == "passed"
    assert (bundle / "note.txt").read_text() == "ours"
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".bundle")] == []


def test_an_update_that_cannot_be_made_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    """A model that does not take the golden inputs leaves the bundle as it was."""
    other = attention()
    onnx.save(other, str(tmp_path / "other.onnx"))
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(BundleError, match="cannot run golden sample 0"):
        update_bundle(bundle, tmp_path / "other.onnx")
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


@pytest.mark.parametrize("killed", [True, False])
def test_an_update_that_ends_halfway_loses_no_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, *, killed: bool
) -> None:
    """Killed, or refused by the disk, between the two renames: the next check finds the old bundle in its place."""
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    rename = Path.rename

    def stopped(path: Path, target: Path) -> Path:
        if path.name.endswith(".new"):
            raise KeyboardInterrupt if killed else OSError(28, "no space left")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped)
        with pytest.raises(KeyboardInterrupt if killed else OSError):
            update_bundle(bundle, changed(bundle, scale(1.01)))
    assert bundle.exists() is not killed
    assert check_bundle(bundle).outcome == "passed"
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_junit_is_what_ci_servers_read(bundle: Path) -> None:
    """Counts agree with the cases, and each failure says what."""
    result = check_bundle(bundle, changed(bundle, no_clip), latency=False)
    root = ET.fromstring(to_junit(result))  # noqa: S314  our own text
    suite = root[0]
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    cases = suite.findall("testcase")
    assert int(suite.attrib["tests"]) == len(cases) == len(result.items)
    assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure")) == len(failed(result))
    assert int(suite.attrib["skipped"]) == len(suite.findall("testcase/skipped")) == 1
    assert all(case.attrib["name"] and case.attrib["classname"] for case in cases)
    assert len({case.attrib["name"] for case in cases}) == len(cases)
    # Jenkins' xUnit plugin refuses a file with any attribute that its junit-10.xsd does not have.
    assert root.attrib.keys() <= {"name", "time", "tests", "failures", "errors"}
    known = {
        "name",
        "tests",
        "failures",
        "errors",
        "group",
        "time",
        "skipped",
        "timestamp",
        "hostname",
        "id",
        "package",
    }
    assert suite.attrib.keys() <= known
    assert all(case.attrib.keys() <= {"name", "time", "classname", "group"} for case in cases)


def test_sarif_has_what_the_standard_requires(bundle: Path) -> None:
    """Version, driver, rules that results refer to, and a place for each."""
    (bundle / "golden_inputs.npz").unlink()
    result = check_bundle(bundle, changed(bundle, no_clip), latency=False)
    log = json.loads(to_sarif(result))
    assert log["version"] == "2.1.0"
    run = log["runs"][0]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(run["results"]) == len(failed(result))
    for row in run["results"]:
        assert row["ruleId"] in rules
        assert row["level"] in {"error", "warning"}
        assert row["message"]["text"]
        assert row["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].endswith((".onnx", ".npz"))


def test_sarif_places_are_uris(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absolute path is a ``file:`` URI, since none may begin with a slash; others stay as named."""
    strange = bundle.rename(bundle.parent / "ein Bündel #1")
    (strange / "golden_inputs.npz").unlink()
    monkeypatch.chdir(strange.parent)
    found = []
    for folder in (strange, Path(strange.name)):
        row = json.loads(to_sarif(check_bundle(folder)))["runs"][0]["results"][0]
        found.append(row["locations"][0]["physicalLocation"]["artifactLocation"]["uri"])
    assert found[0] == (strange / "golden_inputs.npz").as_uri()
    assert found[1] == "ein%20B%C3%BCndel%20%231/golden_inputs.npz"


BLOCKED = """\
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"onnxshrink", "onnx", "torch", "pydantic", "rich", "typer"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_copy_in_the_bundle_needs_nothing_of_ours(bundle: Path) -> None:
    """``python check.py`` gives the verdict of `check_bundle` where only numpy and onnxruntime can be imported."""
    assert (bundle / "check.py").read_bytes() == Path(check_module.__file__).read_bytes()
    model = changed(bundle, flip_lowest_bit)
    script = str(bundle / "check.py")
    command = [sys.executable, "-I", "-W", "error", "-c", BLOCKED, script]
    own = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, cwd=bundle.parent)
    assert own.returncode == 0, own.stderr
    assert json.loads(own.stdout)["outcome"] == "passed"
    other = subprocess.run(
        [*command, str(model), "--json", "--no-latency", "--junit", "out.xml", "--sarif", "out.sarif"],
        capture_output=True, text=True, check=False, cwd=bundle.parent,
    )  # fmt: skip
    assert other.returncode == 1, other.stderr
    names = {item["name"] for item in json.loads(other.stdout)["items"] if item["outcome"] == "failed"}
    assert names == failed(check_bundle(bundle, model, latency=False))
    assert (bundle.parent / "out.xml").is_file()
    assert (bundle.parent / "out.sarif").is_file()


def test_a_model_that_is_not_there_is_no_bundle(bundle: Path) -> None:
    """``python check.py modle.onnx`` misses the model, and does not ask for a bundle of that name."""
    command = [sys.executable, str(bundle / "check.py"), str(bundle.parent / "modle.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no model" in done.stderr


def test_help_needs_neither_numpy_nor_onnxruntime(bundle: Path) -> None:
    """And a check without them says what to install, with exit code 2."""
    code = BLOCKED.replace('"rich"', '"rich", "numpy", "onnxruntime"')
    command = [sys.executable, "-I", "-c", code, str(bundle / "check.py")]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "--behaviour-only" in told.stdout
    lacking = subprocess.run(command, capture_output=True, text=True, check=False)
    assert lacking.returncode == 2
    assert "pip install onnxruntime" in lacking.stderr


def test_a_quantized_output_may_move_by_its_own_steps(tmp_path: Path) -> None:
    """The step of an output that a DequantizeLinear gives is read from the file."""
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 4]) for name in "xy"]
    scale_value = struct.unpack("<f", struct.pack("<f", 0.05))[0]
    weights = [
        numpy_helper.from_array(np.array(0.05, np.float32), "s"),
        numpy_helper.from_array(np.array(128, np.uint8), "z"),
    ]
    graph = onnx.helper.make_graph(nodes, "g", value[:1], value[1:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    folder = write_bundle(tmp_path / "b", model)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"]["steps"] == {"y": scale_value}
    assert manifest["tolerances"]["y"]["max_abs"] == pytest.approx(2 * scale_value)


def test_a_manifest_that_was_edited_is_signed_anew_by_an_update(bundle: Path) -> None:
    """What was edited is said, and the tolerances are learned again."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    limit = manifest["tolerances"]["y"]["max_abs"]
    manifest["tolerances"]["y"]["max_abs"] = 100.0
    path.write_text(json.dumps(manifest))
    changes = update_bundle(bundle)
    assert "signed anew" in changes[0]
    assert json.loads(path.read_text())["tolerances"]["y"]["max_abs"] == limit
    assert check_bundle(bundle).outcome == "passed"


def test_an_update_needs_the_golden_inputs(bundle: Path) -> None:
    """A baseline cannot be made of damaged ones."""
    (bundle / "golden_inputs.npz").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="damaged"):
        update_bundle(bundle)


def test_a_place_that_cannot_be_written_is_the_users_to_mend(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and the path, not a traceback."""
    assert main([str(bundle), "--junit", str(bundle / "nowhere" / "out.xml")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_latency_is_compared_on_the_same_machine_only(bundle: Path) -> None:
    """Elsewhere it is skipped, with the reason, unless it is asked for."""
    model = changed(bundle, rename_everything)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["machine"]["id"] = "another"
    check_module.write_manifest(bundle, {k: v for k, v in manifest.items() if k != "digest"})
    item = check_bundle(bundle, model).items[-1]
    assert (item.name, item.outcome) == ("latency_ratio", "skipped")
    assert "another machine" in item.reason
    assert check_bundle(bundle, model, latency=True).items[-1].value is not None


@pytest.mark.parametrize(
    ("ratios", "outcome"),
    [([1.2] * 12, "failed"), ([1.0] * 12, "passed"), ([1.0] * 6 + [1.2] * 6, "inconclusive"),
     ([1.0] * 11 + [9.0], "passed"), ([1.2] * 11 + [0.1], "failed")],
)  # fmt: skip
def test_latency_fails_where_the_interval_lies_above_the_limit(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, ratios: list[float], outcome: str
) -> None:
    """One round that was disturbed decides nothing."""
    monkeypatch.setattr(check_module, "measure_ratio", lambda *_: (ratios, 1.0))
    item = check_bundle(bundle, changed(bundle, rename_everything)).items[-1]
    assert item.outcome == outcome
