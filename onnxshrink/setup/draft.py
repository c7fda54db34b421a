"""From answers to a config file that runs as it is: the model and the samples are looked into, and nothing is guessed.

The text is rendered from ``recipes/templates``, validated as a run would, and only then written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jinja2
from ruamel.yaml import YAML

import onnxshrink
from onnxshrink.config.data import NpzData, Role
from onnxshrink.config.load import validate
from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import InputSettings
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.core.files import require_files
from onnxshrink.core.importing import search_path
from onnxshrink.core.store import write_atomically
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.reader import open_reader
from onnxshrink.runtime.graph import input_specs, load_model, opset_of, require_float
from onnxshrink.search.scheme import Choice, choice_of
from onnxshrink.setup.answers import Answers, Template
from onnxshrink.setup.output import refuse_existing
from onnxshrink.setup.samples import Samples, look_at_samples, renamed
from onnxshrink.stages.preflight import preflight
from onnxshrink.verify.coverage import audit

_PACKAGE = Path(onnxshrink.__file__).parent
_DIGITS = Path("../../calib_data/digits.npz")
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True, slots=True)
class Draft:
    """A config that runs, not yet written.

    Attributes:
        text: The YAML, with comments.
        config: The same, validated.
        template: What it was made from.
        notes: What was found of the model and the samples, one fact each.
    """

    text: str
    config: RunConfig
    template: Template
    notes: tuple[str, ...]


def draft_digits(out: Path, data: str | None = None) -> Draft:
    """The demonstration: a teacher, a student and images of digits that come with the checkout.

    Args:
        out: Where the config will lie.
        data: The images; those of the checkout by default.

    Raises:
        ConfigError: The images are not there.
    """
    images = Path(data) if data else (_PACKAGE / "recipes" / _DIGITS).resolve()
    if not images.is_file():
        raise ConfigError(
            f"the images of the demonstration are not at {images}",
            where="--template digits",
            want="calib_data/digits.npz of the repository",
            fix="clone the repository, or give the file: --data digits.npz",
        )
    text = (_PACKAGE / "recipes" / "digits.yaml").read_text(encoding="utf-8")
    text = text.partition("\n#\n")[2]  # without the line that tells editors where the checkout has the schema
    text = text.replace(str(_DIGITS), flow(_spelled(str(images), out)))
    text = text.replace("python -m onnxshrink run onnxshrink/recipes/digits.yaml", f"onnxshrink run {out}")
    return Draft(text, _validated(text, out), "digits", ("two small networks, 1,797 images of 8 by 8",))


def draft(answers: Answers, out: Path, template: Template | None = None) -> Draft:
    """Look into the model and the samples, and make a config of them.

    Args:
        answers: What is known.
        out: Where the config will lie; paths in it start at its folder.
        template: ``onnx`` for files; ``vision`` or ``encoder`` for factories, by their inputs if None.

    Raises:
        ConfigError: An answer is wrong, or does not fit the template.
        DataError: The samples cannot be read, or do not fit the model.
        DependencyError: A package that the config needs is not installed.
        ModelError: The model cannot be read, or is quantized already.
    """
    samples = look_at_samples(answers.data, answers.held_out)
    is_file = answers.model.endswith(".onnx")
    if template is not None and is_file != (template == "onnx"):
        raise ConfigError(
            f"the template {template!r} is not for {'ONNX files' if is_file else 'torch factories'}",
            where="--template",
            got=answers.model,
            want="a model.onnx" if template == "onnx" else "package.module:factory",
            fix="leave out --template: the model says which template suits it",
        )
    if is_file and (answers.weights or answers.inputs):
        raise ConfigError(
            "an ONNX file brings its weights and says what its inputs are",
            where="--weights" if answers.weights else "--input",
            got=answers.weights or ", ".join(answers.inputs),
            want="neither --weights nor --input with a model.onnx",
            fix="leave them out, or name the network that they are of: --model package.module:factory",
        )
    values: dict[str, Any] = {"answers": answers, "file": str(out), "metric": samples.metric}
    if is_file:
        specs, notes = _look_at_model(Path(answers.model))
        chosen: Template = "onnx"
        values["model"] = {"onnx": _spelled(answers.model, out)}
    else:
        inputs = dict(answers.inputs) or _inputs_of(samples, answers.data)
        specs, notes = tuple(settings.spec(name) for name, settings in inputs.items()), list[str]()
        chosen = template or ("encoder" if any(spec.dtype.startswith("int") for spec in specs) else "vision")
        values["model"] = {"factory": answers.model}
        if answers.weights:
            values["model"]["weights"] = _spelled(answers.weights, out)
        else:
            notes = ["no weights are given: the factory must load trained ones itself"]
        values["inputs"] = {name: _input(settings) for name, settings in inputs.items()}
    values["data"] = {role: _role(role, samples, specs, out) for role in samples.roles}
    values["image_steps"] = any("steps" in settings for settings in values["data"].values())
    if is_file:
        choice = _scheme(Path(answers.model), samples, specs)
        values |= {"scheme": choice.scheme, "reason": choice.reason}
        notes.append(f"{choice.scheme} int8 suits it: {choice.reason}")
    values["notes"] = notes = [*notes, *samples.notes]
    text = _environment().get_template(f"{chosen}.yaml.j2").render(values)
    return Draft(text, _validated(text, out), chosen, tuple(notes))


def write_draft(made: Draft, out: Path, *, force: bool = False, inputs: Iterable[str] = ()) -> None:
    """Write the config, whole or not at all.

    Raises:
        ConfigError: As of `refuse_existing`.
        StoreError: It cannot be written.
    """
    refuse_existing(out, force=force, inputs=inputs)
    write_atomically(out, made.text.encode())


def _look_at_model(path: Path) -> tuple[tuple[TensorSpec, ...], list[str]]:
    require_files(model=path)
    model = load_model(path)
    require_float(model, where=str(path))
    specs = input_specs(model)
    parameters = sum(prod(tensor.dims) for tensor in model.graph.initializer)
    return specs, [f"{path.name}: opset {opset_of(model)}, {parameters:,} parameters; takes {_listed(specs)}"]


def _inputs_of(samples: Samples, data: str) -> dict[str, InputSettings]:
    if not samples.arrays:
        raise ConfigError(
            "a torch factory does not say what its inputs are, and these samples do not either",
            where="--input",
            got=data,
            want="each input with its shape, batch first",
            fix="--input image=batch,3,224,224",
        )
    return {
        spec.name: InputSettings.model_validate({"shape": spec.shape, "dtype": spec.dtype}) for spec in samples.arrays
    }


def _input(settings: InputSettings) -> dict[str, Any]:
    return {"shape": list(settings.shape)} | ({} if settings.dtype == "float32" else {"dtype": settings.dtype})


def _role(role: Role, samples: Samples, specs: Sequence[TensorSpec], out: Path) -> dict[str, Any]:
    """The settings of one role: paths as seen from the config, arrays renamed, images brought to the input's size."""
    settings = dict(samples.roles[role])
    for name in ("npz", "images", "labels"):
        if name in settings and settings[name] != "folders":
            settings[name] = _spelled(settings[name], out)
    if rename := renamed(samples, specs):
        settings["rename"] = {**settings.get("rename", {}), **rename}
    if "images" in settings:
        settings |= _image_options(specs)
    if role == "evaluation" and samples.metric:
        settings["metric"] = samples.metric
    return settings


def _image_options(specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Size and layout that the model's one image input asks for, and the likeliest scale, which must be looked at."""
    if len(specs) != 1 or len(specs[0].shape) != 4:
        raise ConfigError(
            "images feed a model with one input of four axes",
            where="--data",
            got=_listed(specs),
            want="such as 'image' float32[batch,3,224,224]",
            fix="give an .npz of its inputs",
        )
    shape = specs[0].shape
    last = shape[3] in (1, 3) and shape[1] not in (1, 3)
    channels, height, width = (shape[3], shape[1], shape[2]) if last else shape[1:]
    side = height if isinstance(height, int) and height == width else 224
    steps: list[dict[str, Any]] = [{"resize": side + side // 7}, {"crop": side}]
    if specs[0].dtype != "uint8":
        steps.append({"normalize": _IMAGENET if channels == 3 else {"mean": [0.5], "std": [0.5]}})
    return {"steps": steps} | ({"layout": "nhwc"} if last else {})


def _scheme(path: Path, samples: Samples, specs: Sequence[TensorSpec]) -> Choice:
    """Static or dynamic, by what a session runs on the first sample, or on noise where that is not at hand."""
    batch = None
    settings = samples.roles["calibration"]
    if "npz" in settings:
        read = {**settings, "rename": {**settings.get("rename", {}), **renamed(samples, specs)}}
        batch = next(iter(open_reader(NpzData.model_validate(read), specs, batch_size=1)))
    try:
        return choice_of(audit(path, batch=batch))
    except ModelError as e:  # what ONNX Runtime can run and the audit cannot read back
        return Choice("static", f"the graph could not be audited: {e.what}")


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, specs))


def _spelled(path: str, out: Path) -> str:
    """A path as the config's folder sees it; one that was given from the root stays so."""
    given = Path(path).expanduser()
    return str(given) if given.is_absolute() else os.path.relpath(given, out.parent)


def _validated(text: str, out: Path) -> RunConfig:
    """The config, after every check that a run makes before its first stage."""
    config = validate(YAML(typ="rt").load(text), base=out.parent, origin=out.name)
    with search_path(out.parent):
        preflight(config)
    return config


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(  # noqa: S701  YAML, and `flow` quotes what must be
        loader=jinja2.FileSystemLoader(_PACKAGE / "recipes" / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["flow"] = flow
    return environment


def flow(value: Any) -> str:
    """``{npz: data.npz, split: test}``: plain values as YAML on one line, quoted only where they must be."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
