"""What `explain` says of pairs of models of every kind, and the settings that it proposes."""

from __future__ import annotations

import json
from pathlib import Path

import explain_mutations as mutations
import numpy as np
import onnx_models as nets
import pytest
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from onnxshrink.config.stages import Equalize, QuantizeDynamic, QuantizeWeights, Stage, ToFp16
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.runtime.graph import load_model
from onnxshrink.stages.quantize_dynamic import quantize_dynamic
from onnxshrink.stages.quantize_weights import quantize_weights
from onnxshrink.stages.to_fp16 import to_fp16
from onnxshrink.verify import explain as explain_module
from onnxshrink.verify.diagnosis import Finding
from onnxshrink.verify.explain import NodeError, explain


def made(stage: Stage, model: nets.Model, folder: Path) -> nets.Model:
    """The model behind a stage that takes no samples."""
    assert not isinstance(stage, Equalize)
    out = folder / "out"
    out.mkdir()
    work = {QuantizeDynamic: quantize_dynamic, QuantizeWeights: quantize_weights, ToFp16: to_fp16}[type(stage)]  # type: ignore[index]
    context = nets.context_of(nets.ArrayReader({}), folder)
    work(stage, nets.artifact_of(model, folder / "source"), out, context)  # type: ignore[operator]
    return load_model(out / "model.onnx")


@pytest.mark.parametrize("network", ["mlp", "encoder"])
@pytest.mark.parametrize(
    "stage", [QuantizeDynamic(reduce_range=True), QuantizeWeights(bits=8), ToFp16()], ids=lambda s: s.kind
)
def test_other_kinds_of_candidates_are_taken(stage: Stage, network: str, tmp_path: Path) -> None:
    """Dynamic, weight-only and float16 candidates: every node is matched, and nothing is called a fault."""
    model = mutations.NETWORKS[network]()
    arrays = mutations.samples(network, model)
    found = mutations.explained(model, made(stage, model, tmp_path), arrays)
    assert found.unmatched == ()
    assert found.findings == ()
    assert any(node.local_sqnr_db is not None for node in found.nodes)


def test_four_bits_are_called_too_few(tmp_path: Path) -> None:
    """The weights' part is the largest, and the patch leaves those nodes alone."""
    model = mutations.NETWORKS["encoder"]()
    candidate = made(QuantizeWeights(bits=4, activations="float"), model, tmp_path)
    found = mutations.explained(model, candidate, mutations.samples("encoder", model))
    assert {node.finding.cause for node in found.findings} == {"resolution"}
    assert found.patch["kind"] == "quantize_weights"


def test_a_model_is_itself() -> None:
    """No error, no finding, no patch."""
    model = mutations.mlp()
    found = mutations.explained(model, model, mutations.samples("mlp", model))
    assert found.findings == ()
    assert found.patch == {}
    assert found.sqnr_db == {"y": None}


@pytest.mark.parametrize("case", list(mutations.cases())[::25], ids=lambda case: case.name)
def test_the_patch_is_a_stage(case: mutations.Case) -> None:
    """What is written to YAML is a stage of the config, and names nodes of the reference."""
    found = case.run()
    (stage,) = YAML(typ="safe").load(found.to_yaml())
    settings = TypeAdapter(Stage).validate_python(stage)
    assert settings.kind == "quantize_static"
    names = {node.name for node in mutations.NETWORKS[case.network]().graph.node}
    assert set(settings.exclude_nodes) <= names  # type: ignore[union-attr]
    assert json.loads(found.to_json())["nodes"][0]["finding"]["cause"] == found.nodes[0].finding.cause


def test_twice_is_the_same() -> None:
    """Equal models and samples give equal text."""
    case = next(iter(mutations.cases()))
    assert case.run().to_json() == case.run().to_json()


def test_the_patch_mends_it() -> None:
    """A clipped tensor, the patch applied: the outputs gain what was lost."""
    model = mutations.mlp()
    arrays = mutations.samples("mlp", model)
    case = next(c for c in mutations.cases() if (c.network, c.cause) == ("mlp", "activation_clipping"))
    broken = case.run()
    settings = {name: value for name, value in broken.patch.items() if name != "kind"}
    mended = mutations.explained(model, mutations.quantized(model, arrays, **settings), arrays)
    before, after = broken.sqnr_db["y"], mended.sqnr_db["y"]
    assert before is not None
    assert after is not None
    assert before < 25
    assert after > 35


def node_error(name: str, share: float, settings: dict[str, object]) -> NodeError:
    """A node with a finding, and its share of what differs."""
    finding = Finding("resolution", name, f"{name}_out", "", "", settings)
    return NodeError(name, "Conv", f"{name}_out", 20.0, 20.0, 20.0, share, finding)


@pytest.mark.parametrize(
    ("small", "names"), [(0.001, None), (0.02, ["b"])], ids=["not worth its conversions", "most of what is left"]
)
def test_a_node_is_left_in_float_only_where_that_mends_much(small: float, names: list[str] | None) -> None:
    """What a setting of the whole stage mends comes first; of the rest, nodes that make a share of it worth a word."""
    model = mutations.mlp()
    candidate = mutations.quantized(model, mutations.samples("mlp", model))
    per_channel, left_alone = {"granularity": "per_channel"}, {"exclude_nodes": ["b"]}
    nodes = (node_error("a", 0.9, per_channel), node_error("b", small, left_alone))
    patch = explain_module._patch(nodes, candidate)
    assert patch["granularity"] == "per_channel"
    assert patch.get("exclude_nodes") == names


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    """Which of the three is not there."""
    with pytest.raises(ConfigError, match=r"there is no file .*a\.onnx"):
        explain(tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "x.npz")


def test_another_network_is_refused() -> None:
    """Two models without a tensor in common are no pair."""
    model = mutations.mlp()
    with pytest.raises(ModelError):
        mutations.explained(model, nets.cnn(), {"x": np.zeros((2, 16), np.float32)})
