"""The commonest mistakes, each made on purpose in a folder where all is right, and the words its message must have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_models import Model, cnn, model_of, samples_of

Make = Callable[[Path], list[str]]
"""Makes the mistake in a folder, and gives the command line that meets it."""

NETS = """\
import torch
from torch import nn


def build(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 196, 10))


def broken():
    raise KeyError("hidden_size")


class Airy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        return self.head(torch.special.airy_ai(x).flatten(1))


def airy():
    return Airy()
"""

ONNX = """\
name: r
model: {onnx: model.onnx}
data: {calibration: {npz: calib.npz}, evaluation: {npz: test.npz, metric: top1}}
variants: {int8: [{kind: quantize_static}]}
targets: [{latency_seconds: 0.05}]
"""

TORCH = """\
name: r
model: {factory: "nets:build", inputs: {x: {shape: [batch, 3, 16, 16]}}}
data:
  train: {npz: calib.npz}
  calibration: {npz: calib.npz}
  evaluation: {npz: test.npz, metric: top1}
stages: [{kind: finetune, epochs: 1}, {kind: export}]
variants: {int8: [{kind: quantize_static}]}
targets: [{latency_seconds: 0.05}]
"""

X = samples_of(cnn(), 24)["x"]
Y = np.arange(24) % 10


@dataclass(frozen=True)
class Mistake:
    """One mistake, and words of each part of its message.

    Attributes:
        make: Makes it.
        what: In the first line.
        where: In the part of that name; so are ``got``, ``want`` and ``fix``.
        steps: How many steps had been done when it was told; None if the store was not even opened.
    """

    make: Make
    what: str
    where: str
    got: str
    want: str
    fix: str
    steps: int | None = None


def config(text: str, old: str = "", new: str = "") -> Make:
    """A config with one piece of its text replaced."""
    assert old in text

    def make(folder: Path) -> list[str]:
        (folder / "cfg.yaml").write_text(text.replace(old, new) if old else text)
        return ["run", "cfg.yaml"]

    return make


def samples(file: str, text: str = ONNX, /, **arrays: NDArray[Any]) -> Make:
    """Other samples in ``file``."""

    def make(folder: Path) -> list[str]:
        np.savez(folder / file, **arrays)
        return config(text)(folder)

    return make


def model(build: Callable[[], Model], then: Make) -> Make:
    """Another model in ``model.onnx``."""

    def make(folder: Path) -> list[str]:
        onnx.save(build(), str(folder / "model.onnx"))
        return then(folder)

    return make


def quantize(_: Path) -> list[str]:
    """The one line without a config."""
    return ["quantize", "model.onnx", "--data", "calib.npz", "-o", "o.onnx"]


def truncated(folder: Path) -> list[str]:
    """An archive that was not copied whole."""
    path = folder / "calib.npz"
    path.write_bytes(path.read_bytes()[:3000])
    return config(ONNX)(folder)


def npy_for_npz(folder: Path) -> list[str]:
    """One array where an archive is wanted."""
    np.save(folder / "calib.npy", X)
    return config(ONNX, "calib.npz", "calib.npy")(folder)


def of_int64(folder: Path) -> list[str]:
    """Tokens stored as float32, for an embedding of int64."""
    table = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 8])
    node = helper.make_node("Gather", ["table", "ids"], ["y"], name="embed")
    graph = helper.make_graph([node], "tokens", [ids], [out], [numpy_helper.from_array(table, "table")])
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(built, str(folder / "model.onnx"))
    np.savez(folder / "calib.npz", ids=np.ones((24, 4), np.float32))
    return config(ONNX)(folder)


def channels_last() -> Model:
    """``x[N,16,16,3]``: as Keras exports."""
    transpose = helper.make_node("Transpose", ["x"], ["t"], name="turn", perm=[0, 3, 1, 2])
    pool = helper.make_node("GlobalAveragePool", ["t"], ["y"], name="pool")
    return model_of([transpose, pool], {"x": ["N", 16, 16, 3]}, {"y": ["N", 3, 1, 1]}, {})


def pair() -> Model:
    """Two inputs."""
    node = helper.make_node("Add", ["left", "right"], ["y"], name="add")
    return model_of([node], {"left": ["N", 4], "right": ["N", 4]}, {"y": ["N", 4]}, {})


def three_unnamed(folder: Path) -> list[str]:
    """Arrays without names, one more than there are inputs."""
    np.savez(folder / "calib.npz", *np.ones((3, 8, 4), np.float32))
    return config(ONNX)(folder)


def too_new() -> Model:
    """An opset of the far future."""
    built = cnn()
    built.opset_import[0].version = 99
    return built


def fixed_inside() -> Model:
    """A batch axis that is free at the input and fixed in a node."""
    built = cnn()
    flat = next(node for node in built.graph.node if node.op_type == "Flatten")
    flat.op_type = "Reshape"
    flat.input.append("one_sample")
    built.graph.initializer.append(numpy_helper.from_array(np.array([1, 8]), "one_sample"))
    return built


def folder_for_npz(folder: Path) -> list[str]:
    """Pictures are in a folder, and an archive is a file."""
    (folder / "photos").mkdir()
    return config(ONNX, "calib.npz", "photos")(folder)


def damaged_weights(folder: Path) -> list[str]:
    """A download that broke off."""
    pytest.importorskip("safetensors")
    (folder / "w.safetensors").write_bytes(b"half a header")
    return config(TORCH, '"nets:build"', '"nets:build", weights: w.safetensors')(folder)


def foreign() -> Model:
    """An operator of somebody's own library."""
    built = cnn()
    built.graph.node[1].op_type, built.graph.node[1].domain = "Mish2", "com.acme"
    built.opset_import.append(helper.make_opsetid("com.acme", 1))
    return built


def without_kernel() -> Model:
    """Valid ONNX for which ONNX Runtime's CPU has no kernel: Erf in double precision."""
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], name="down", to=TensorProto.DOUBLE),
        helper.make_node("Erf", ["b"], ["e"], name="erf"),
        helper.make_node("Cast", ["e"], ["y"], name="up", to=TensorProto.FLOAT),
    ]
    return model_of(nodes, {"x": ["N", 3, 16, 16]}, {"y": ["N", 3, 16, 16]}, {})


def quantized() -> Model:
    """A model with one Q/DQ pair."""
    built = cnn()
    built.graph.node[1].input[0] = "dq"
    built.graph.node.insert(1, helper.make_node("QuantizeLinear", ["c1", "s", "z"], ["q"], name="q"))
    built.graph.node.insert(2, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"], name="dq"))
    built.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "s"))
    built.graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), "z"))
    return built


def torch_file(folder: Path) -> list[str]:
    """Weights of torch where a model is wanted."""
    (folder / "model.pt").write_bytes(b"PK weig")
    return config(ONNX, "model.onnx", "model.pt")(folder)


def git_lfs_pointer(folder: Path) -> list[str]:
    """What ``git clone`` leaves without Git LFS."""
    (folder / "model.onnx").write_text("version https://git-lfs.github.")
    return config(ONNX)(folder)


def empty(folder: Path) -> list[str]:
    """A config that was never written."""
    (folder / "cfg.yaml").touch()
    return ["run", "cfg.yaml"]


def without_its_data(folder: Path) -> list[str]:
    """The ``.onnx`` file was copied and its data file was not."""
    file = "model.onnx.data"
    onnx.save(cnn(), str(folder / "model.onnx"), save_as_external_data=True, location=file, size_threshold=0)
    (folder / file).unlink()
    return config(ONNX)(folder)


def weights(**shapes: tuple[int, ...]) -> Make:
    """A state dict with these shapes; an underscore stands for a dot."""

    def make(folder: Path) -> list[str]:
        numpy_file = pytest.importorskip("safetensors.numpy")
        state = {name[1:].replace("_", "."): np.zeros(shape, np.float32) for name, shape in shapes.items()}
        numpy_file.save_file(state, folder / "w.safetensors")
        return config(TORCH, '"nets:build"', '"nets:build", weights: w.safetensors')(folder)

    return make


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("boo"),))


def pickled_weights(folder: Path) -> list[str]:
    """A ``.pth`` file with code in it."""
    torch = pytest.importorskip("torch")
    torch.save({"0.weight": Code()}, folder / "w.pth")
    return config(TORCH, '"nets:build"', '"nets:build", weights: w.pth')(folder)


def of_somebody_else(folder: Path) -> list[str]:
    """The run's folder holds a thesis."""
    (folder / "runs" / "r").mkdir(parents=True)
    (folder / "runs" / "r" / "thesis.txt").write_text("mine")
    return config(ONNX)(folder)


def under_a_file(folder: Path) -> list[str]:
    """Runs below something that is no folder: not even the superuser can write there."""
    (folder / "file").touch()
    return [*config(ONNX)(folder), "--runs", "file/runs"]


NAN = np.where(np.arange(X.size).reshape(X.shape) == 7 * X[0].size, np.float32("nan"), X)
STATIC = "{kind: quantize_static}"
FOUR_BITS = "{kind: finetune, epochs: 1, simulate: {kind: quantize_weights, bits: 4}}, {kind: export, opset: 18}"

MISTAKES: dict[str, Mistake] = {
    # samples
    "input_name": Mistake(
        samples("calib.npz", X=X, ids=Y),
        "no array for the model input 'x'",
        "calib.npz",
        "'X', 'ids'",
        "'x' float32[N,3,16,16]",
        "rename: {X: x}",
    ),
    "unnamed_inputs": Mistake(
        model(pair, three_unnamed),
        "no array for the model input 'left'",
        "calib.npz",
        "'arr_0', 'arr_1', 'arr_2'",
        "'right' float32[N,4]",
        "rename: {arr_0: left}",
    ),
    "nhwc_for_nchw": Mistake(
        samples("calib.npz", x=X.transpose(0, 2, 3, 1)),
        "shape the model cannot take",
        "calib.npz",
        "float32[24,16,16,3]",
        "float32[N,3,16,16]",
        "NHWC and the model wants NCHW: array.transpose(0, 3, 1, 2)",
    ),
    "nchw_for_nhwc": Mistake(
        model(channels_last, config(ONNX)),
        "shape the model cannot take",
        "calib.npz",
        "float32[24,3,16,16]",
        "float32[N,16,16,3]",
        "NCHW and the model wants NHWC: array.transpose(0, 2, 3, 1)",
    ),
    "uint8_for_float": Mistake(
        samples("calib.npz", x=X.astype(np.uint8)),
        "dtype uint8, and the model takes float32",
        "calib.npz",
        "uint8[24,3,16,16]",
        "float32[N,3,16,16]",
        "array.astype('float32') / 255",
    ),
    "float_for_int": Mistake(
        of_int64,
        "dtype float32, and the model takes int64",
        "calib.npz",
        "'ids' float32[24,4]",
        "'ids' int64[N,4]",
        "array.astype('int64')",
    ),
    "wrong_size": Mistake(
        samples("calib.npz", x=X.repeat(2, 2).repeat(2, 3)),
        "shape the model cannot take",
        "calib.npz",
        "float32[24,3,32,32]",
        "float32[N,3,16,16]",
        "resize or crop",
    ),
    "no_batch_axis": Mistake(
        samples("calib.npz", x=X[0]),
        "shape the model cannot take",
        "calib.npz",
        "float32[3,16,16]",
        "float32[N,3,16,16]",
        "array[None]",
    ),
    "nan": Mistake(
        samples("calib.npz", x=NAN),
        "sample 7 of 'x' holds nan",
        "calib.npz",
        "nan at x[7, 0, 0, 0]",
        "finite numbers",
        "remove the sample",
        steps=1,
    ),
    "no_samples": Mistake(
        samples("calib.npz", x=X[:0]),
        "there are no samples",
        "calib.npz",
        "no rows",
        "at least one sample",
        "what wrote the file",
    ),
    # labels
    "one_based": Mistake(
        samples("test.npz", x=X, labels=Y + 1),
        "the label of sample 9 is 10, and the model has 10 classes",
        "test.npz",
        "labels from 1 to 10",
        "each from 0 to 9",
        "from 1 to 10; classes count from 0: labels - 1",
        steps=1,
    ),
    "one_based_training": Mistake(
        samples("test.npz", TORCH, x=X, labels=Y + 1),
        "the label of sample 9 is 10, and the model has 10 classes",
        "test.npz",
        "labels from 1 to 10",
        "each from 0 to 9",
        "labels - 1",
        steps=1,
    ),
    "float_labels": Mistake(
        samples("test.npz", TORCH, x=X, labels=Y.astype(float)),
        "the labels are no class numbers",
        "test.npz",
        "'labels' float64[24]",
        "'labels' int64[24]",
        "labels.astype('int64')",
    ),
    "text_labels": Mistake(
        samples("test.npz", x=X, labels=Y.astype(str)),
        "the labels are no class numbers",
        "test.npz",
        "'labels' <U21[24]",
        "int64[24]",
        "np.unique(labels, return_inverse=True)[1]",
    ),
    "one_hot_labels": Mistake(
        samples("test.npz", x=X, labels=np.eye(10, dtype=int)[Y]),
        "the labels have the wrong shape",
        "test.npz",
        "int64[24,10]",
        "int64[24]",
        "labels.argmax(1)",
    ),
    "fewer_labels": Mistake(
        samples("test.npz", x=X, labels=Y[:20]),
        "'x' and 'labels' have different numbers of samples",
        "test.npz",
        "'x' 24, 'labels' 20",
        "as many in each",
        "save the arrays of the same samples together",
    ),
    "metric_without_labels": Mistake(
        samples("test.npz", TORCH, x=X),
        "labels are needed",
        "test.npz",
        "'x'",
        "one for each sample",
        "add an array named 'labels'",
    ),
    # files
    "truncated_npz": Mistake(
        truncated, "cannot be read as an .npz archive", "calib.npz", "3000 bytes", "numpy.savez", "copied whole"
    ),
    "pickled_npz": Mistake(
        samples("calib.npz", x=np.array([{"a": 1}], object)),
        "pickled arrays are refused",
        "calib.npz, array 'x'",
        "dtype object",
        "numbers",
        "array.astype('float32')",
    ),
    "npy_for_npz": Mistake(
        npy_for_npz,
        "cannot be read as an .npz archive",
        "calib.npy",
        "a .npy file",
        "numpy.savez",
        "npy: {input: file.npy}",
    ),
    "no_such_file": Mistake(
        config(ONNX, "calib.npz", "callib.npz"),
        "there is nothing at",
        "cfg.yaml:3  data.calibration.npz",
        "'callib.npz'",
        "an existing file",
        "did you mean 'calib.npz'?",
    ),
    "their_folder": Mistake(
        of_somebody_else, "holds files that are not a run's", "runs/r", "thesis.txt", "an empty folder", "--runs PATH"
    ),
    "unwritable_folder": Mistake(
        under_a_file, "Not a directory", "file/runs", "free on the disk", "a folder that can be written", "--runs PATH"
    ),
    "folder_for_npz": Mistake(
        folder_for_npz, "this is a folder", "photos", "a folder", "numpy.savez", "{images: FOLDER}"
    ),
    # models
    "fixed_inside": Mistake(
        model(fixed_inside, config(ONNX)),
        "cannot run the model",
        "int8/quantize_static",
        "'x' float32[",
        "every length of its named axes",
        "make_dynamic_shape_fixed",
        steps=2,
    ),
    "damaged_weights": Mistake(
        damaged_weights,
        "cannot be read as safetensors",
        "w.safetensors",
        "13 bytes",
        "a state dict",
        "copied whole",
        steps=0,
    ),
    "opset_too_new": Mistake(
        model(too_new, config(ONNX)),
        "opset 99 of ai.onnx is newer than onnxruntime",
        "quantize_static",
        "opset 99",
        "or earlier",
        "opset_version=",
        steps=1,
    ),
    "opset_too_old_for_blocks": Mistake(
        config(TORCH, "{kind: finetune, epochs: 1}, {kind: export}", FOUR_BITS),
        "in opset 18 convolutions are stored in 8",
        "cfg.yaml:7  stages[1]",
        "'opset': 18",
        "opset: 21 or later",
        "{kind: export, opset: 21}",
    ),
    "unknown_operator": Mistake(
        model(foreign, config(ONNX)),
        "ONNX Runtime has no operator com.acme:Mish2",
        "quantize_static",
        "com.acme:Mish2",
        "an ONNX model that onnxruntime",
        "standard operators",
        steps=1,
    ),
    "no_kernel": Mistake(
        model(without_kernel, config(ONNX, ", metric: top1")),
        "ONNX Runtime has no kernel on this provider for Erf",
        "model.onnx",
        "'erf'",
        "an ONNX model that onnxruntime",
        "float32",
        steps=2,
    ),
    "quantized_already": Mistake(
        model(quantized, quantize),
        "the model is quantized already",
        "model.onnx",
        "DequantizeLinear, QuantizeLinear",
        "a float32 model",
        "start from the float model",
    ),
    "external_data": Mistake(
        without_its_data,
        "external data of the ONNX model is missing",
        "model.onnx",
        "nothing at",
        "its data files beside it",
        "copy the data file",
    ),
    "other_weights": Mistake(
        weights(_conv1_weight=(4, 3, 3, 3)),
        "the weights do not fit the network",
        "w.safetensors",
        "unexpected 'conv1.weight'",
        "also '0.weight'",
        "did you mean",
        steps=0,
    ),
    "weights_of_another_size": Mistake(
        weights(_0_weight=(4, 3, 3, 3), _0_bias=(4,), _3_weight=(100, 784), _3_bias=(100,)),
        "the weight '3.weight' has a shape that does not fit",
        "w.safetensors",
        "[100, 784]",
        "[10, 784]",
        "check `args`",
        steps=0,
    ),
    "pickled_weights": Mistake(
        pickled_weights, "it was not read", "w.pth", "a pickle", "a state dict", "safetensors.torch.save_file", steps=0
    ),
    "no_such_factory": Mistake(
        config(TORCH, "nets:build", "nets:biuld"),
        "'nets' has no 'biuld'",
        "nets.py",
        "nets:biuld",
        "package.module:callable",
        "did you mean 'build'?",
    ),
    "no_such_module": Mistake(
        config(TORCH, "nets:build", "net:build"),
        "cannot find the source of 'net'",
        "/",
        "net:build",
        "beside the config file",
        "check the spelling",
    ),
    "failing_factory": Mistake(
        config(TORCH, "nets:build", "nets:broken"),
        "the factory failed: KeyError: 'hidden_size'",
        "nets:broken",
        "args {}",
        "a torch.nn.Module",
        "nets.broken()",
        steps=0,
    ),
    "wrong_argument": Mistake(
        config(TORCH, '"nets:build"', '"nets:build", args: {wdth: 3}'),
        "unexpected keyword argument 'wdth'",
        "nets:build",
        "{'wdth': 3}",
        "a torch.nn.Module",
        "check `args`",
        steps=0,
    ),
    "operator_without_onnx": Mistake(
        config(TORCH, "nets:build", "nets:airy"),
        "the dynamo exporter cannot take the network",
        "Airy",
        "DispatchError",
        "operators that ONNX can express",
        "exporter: torchscript",
        steps=1,
    ),
    "torch_file_for_onnx": Mistake(
        torch_file,
        "cannot be read as an ONNX model",
        "model.pt",
        "7 bytes",
        "an ONNX model",
        "onnxshrink init --template vision",
    ),
    "git_lfs_pointer": Mistake(
        git_lfs_pointer, "cannot be read as an ONNX model", "model.onnx", "31 bytes", "an ONNX model", "git lfs pull"
    ),
    "no_such_model": Mistake(
        lambda _: ["quantize", "modle.onnx", "--data", "calib.npz", "-o", "o.onnx"],
        "there is no file modle.onnx",
        "model",
        "nothing",
        "model.onnx",
        "did you mean 'model.onnx'?",
    ),
    "output_folder": Mistake(
        lambda _: ["quantize", "model.onnx", "--data", "calib.npz", "-o", "out/o.onnx"],
        "the output's folder is not there",
        "out",
        "nothing",
        "a folder",
        "mkdir -p out",
    ),
    "output_over_input": Mistake(
        lambda _: ["quantize", "model.onnx", "--data", "calib.npz", "-o", "model.onnx"],
        "the output would overwrite an input",
        "model.onnx",
        "the same file",
        "a file of its own",
        "-o PATH",
    ),
    # the config
    "empty_config": Mistake(
        empty, "the config file holds no options", "cfg.yaml", "an empty file", "options such as", "onnxshrink init"
    ),
    "unreadable_override": Mistake(
        lambda folder: [*config(ONNX)(folder), "--set", "stages[0].epochs"],
        "cannot be read",
        "--set",
        "stages[0].epochs",
        "path=value",
        "then = and the value",
    ),
    "no_config": Mistake(
        lambda _: ["run", "cgf.yaml"],
        "the config file cannot be read",
        "cgf.yaml",
        "no config",
        "a YAML file",
        "onnxshrink init",
    ),
    "not_yaml": Mistake(
        config(ONNX, "data: {", "data: ["),
        "the config file is not valid YAML",
        "cfg.yaml:3",
        "data: [",
        "YAML 1.2",
        "a bracket",
    ),
    "tab": Mistake(
        config(ONNX, "data: {", "data:\n\t{"),
        "the config file is not valid YAML",
        "cfg.yaml:4",
        "{calibration",
        "YAML 1.2",
        "indent with spaces",
    ),
    "key_twice": Mistake(
        config(ONNX, "model:", "name: s\nmodel:"),
        'duplicate key "name"',
        "cfg.yaml:2",
        "name: s",
        "each key once",
        "remove one of the two",
    ),
    "misspelt_option": Mistake(
        config(ONNX, STATIC, "{kind: quantize_static, metod: mse}"),
        "unknown option 'metod'",
        "cfg.yaml:4  variants.int8[0].metod",
        "metod",
        "granularity, types",
        "did you mean 'method'?",
    ),
    "misspelt_stage": Mistake(
        config(ONNX, "quantize_static", "quantise_static"),
        "unknown stage 'quantise_static'",
        "cfg.yaml:4  variants.int8[0]",
        "quantise_static",
        "distill, prune_channels",
        "did you mean 'quantize_static'?",
    ),
    "wrong_type": Mistake(
        config(TORCH, "epochs: 1", "epochs: many"),
        "the value is wrong: 'many'",
        "cfg.yaml:7  stages[0].epochs",
        "'many'",
        "a whole number",
        "give a whole number",
    ),
    "wrong_order": Mistake(
        config(TORCH, "{kind: finetune, epochs: 1}, {kind: export}", "{kind: export}, {kind: finetune, epochs: 1}"),
        "'finetune' takes a torch model and is given an onnx model",
        "cfg.yaml:7  stages[1]",
        "'finetune'",
        "a stage that takes an onnx model",
        "move it before {kind: export}",
    ),
    "no_export": Mistake(
        config(TORCH, ", {kind: export}"),
        "'quantize_static' takes an onnx model and is given a torch model",
        "variants.int8[0]",
        "'quantize_static'",
        "a stage that takes a torch model",
        "put {kind: export} before it",
    ),
    "no_calibration": Mistake(
        config(ONNX, "calibration: {npz: calib.npz}, "),
        "needs data.calibration",
        "variants.int8[0]",
        "'quantize_static'",
        "data: {calibration: …}",
        "npz: samples.npz",
    ),
    "no_provider": Mistake(
        config(ONNX.replace(STATIC, ""), "{latency", "{provider: DmlExecutionProvider, latency"),
        "the execution provider 'directml' is not available here",
        "targets, onnxruntime",
        "directml",
        "CPUExecutionProvider",
        "pip install onnxruntime-directml",
    ),
}
