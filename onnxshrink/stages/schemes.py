"""What each node of a model can become in 8 bits, and a model whose nodes become different things."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx
from onnxruntime.quantization.quant_utils import add_infer_metadata

from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.stages import NodeScheme, QuantizeDynamic, QuantizeMixed, QuantizeWeights
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.runtime.graph import load_model
from onnxshrink.runtime.isa import detect_isa
from onnxshrink.stages.compact import compact
from onnxshrink.stages.context import Context
from onnxshrink.stages.quantize_dynamic import dynamic_nodes
from onnxshrink.stages.quantize_dynamic import quantized_model as dynamic_model
from onnxshrink.stages.quantize_static import StaticPlan, quantizable_op_types, quantize_static
from onnxshrink.stages.quantize_weights import weight_nodes
from onnxshrink.stages.selection import excluded_nodes, strip
from onnxshrink.stages.small_weights import rewrite_weights

# A convolution with small weights runs in float behind a conversion: slower than float, and no nearer.
_WITHOUT_KERNEL = {"Conv", "ConvTranspose"}


def takeable(plan: StaticPlan, settings: QuantizeMixed) -> dict[str, frozenset[NodeScheme]]:
    """The nodes that can be anything but float, each with the 8-bit schemes that it can take.

    None is offered dynamic quantization in the ``qoperator`` format: both would give the same names to different
    tensors.

    Args:
        plan: Decides for static quantization.
        settings: The operator types and excluded nodes are those of every scheme.
    """
    model = plan.model
    left = set(excluded_nodes(settings.exclude_nodes, model, stage=settings.kind))
    # Where no fixed range serves, one of its own for each input may; what static leaves otherwise was asked for.
    absurd = plan.facts.get("absurd_tensors", {})
    left |= {
        n.name for n in model.graph.node if n.name in plan.excluded and absurd.keys().isdisjoint((*n.input, *n.output))
    }
    static_types = quantizable_op_types(plan.settings)
    dynamic = dynamic_nodes(model) if settings.format == "qdq" else {}
    weights = weight_nodes(model)
    found: dict[str, frozenset[NodeScheme]] = {}
    for node in model.graph.node:
        if node.name in left or (settings.op_types is not None and node.op_type not in settings.op_types):
            continue
        schemes: set[NodeScheme] = set()
        if node.op_type in static_types and node.name not in plan.excluded and not plan.declined:
            schemes.add("static")
        if node.name in dynamic:
            schemes.add("dynamic")
        if node.name in weights and node.op_type not in _WITHOUT_KERNEL:
            schemes.add("weights")
        if schemes:
            found[node.name] = frozenset(schemes)
    return found


def fixed_nodes(
    settings: QuantizeMixed, model: onnx.ModelProto, takes: Mapping[str, Collection[NodeScheme]]
) -> dict[str, NodeScheme]:
    """The nodes whose scheme the config fixes.

    Args:
        settings: The stage's.
        model: A prepared model.
        takes: What each node can become.

    Raises:
        ConfigError: No node has one of the names, or it cannot become that.
    """
    fixed: dict[str, NodeScheme] = {}
    for name, scheme in settings.overrides.items():
        for node in excluded_nodes((name,), model, stage=settings.kind, field="overrides"):
            if scheme != "float" and scheme not in takes.get(node, ()):
                raise ConfigError(
                    f"{node!r} cannot become {scheme}",
                    where=f"{settings.kind}.overrides.{name}",
                    got=scheme,
                    want=", ".join(sorted({"float", *takes.get(node, ())})),
                )
            fixed[node] = scheme
    return fixed


def finish_schemes(
    model: onnx.ModelProto, schemes: Mapping[str, NodeScheme], settings: QuantizeMixed, *, where: str
) -> onnx.ModelProto:
    """Give nodes of a float or statically quantized model their dynamic or weight-only form.

    Args:
        model: Its nodes named as in the float model; changed in place.
        schemes: Node to scheme; static and float ones are left as they are.
        settings: Granularity and 7-bit weights, which `auto` means where the instruction set saturates; weight-only
            ones are 8 bits in blocks of 128.
        where: What to call the model in messages.

    Raises:
        ModelError: ONNX Runtime's quantizer does not understand the graph.
    """
    op_types = {node.name: node.op_type for node in model.graph.node}
    dynamic, weights = (
        {name: op_types[name] for name, scheme in schemes.items() if scheme == kind} for kind in ("dynamic", "weights")
    )
    if dynamic:
        reduce_range = settings.reduce_range
        if reduce_range == "auto":  # ranges of its own for every input: no samples tell which weights saturate
            reduce_range = (detect_isa() if settings.isa == "auto" else settings.isa) == "x86_avx2"
        of_dynamic = QuantizeDynamic(granularity=settings.granularity, reduce_range=reduce_range)
        add_infer_metadata(model)
        try:
            model = dynamic_model(model, of_dynamic, nodes=dynamic)
        except (ValueError, RuntimeError, KeyError) as e:  # what the quantizer raises on a graph it does not understand
            raise ModelError(
                f"ONNX Runtime cannot quantize the model: {str(e).strip().partition(chr(10))[0]}",
                where=where,
                got=type(e).__name__,
                fix="leave `dynamic` out of schemes",
            ) from e
    if weights:
        rewrite_weights(model, weights, QuantizeWeights(bits=8, block_size=128))
    strip(model)
    return model


def finished_model(
    settings: QuantizeMixed, schemes: Mapping[str, NodeScheme], source: Artifact, ctx: Context
) -> tuple[onnx.ModelProto, Facts]:
    """The model whose nodes are what ``schemes`` says, and the facts of its static part.

    Args:
        settings: The stage's.
        schemes: Every node that can be anything but float, and what it becomes.
        source: A float32 model.
        ctx: The run.

    Raises:
        ShrinkError: As of `quantize_static`.
    """
    if "static" not in schemes.values():
        model = prepare(load_model(source.model_path), where=ctx.step)
        return finish_schemes(model, schemes, settings, where=ctx.step), {}
    is_plain = set(schemes.values()) <= {"static", "float"}
    others = tuple(name for name, scheme in schemes.items() if scheme != "static")
    static = settings.static((*settings.exclude_nodes, *others))
    if not is_plain:  # a compact file has other names
        static = static.model_copy(update={"compact": False})
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
        facts = quantize_static(static, source, Path(folder), ctx)
        model = load_model(Path(folder) / "model.onnx")
    if not is_plain:
        model = finish_schemes(model, schemes, settings, where=ctx.step)
        if settings.compact:
            facts["compact"] = compact(model)
    return model, facts
