"""ONNX Runtime sessions: opened as asked or refused, never on another provider than the one named."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort

from onnxshrink.config.gates import Optimization, Target
from onnxshrink.core.errors import ConfigError, InferenceError, ModelError, ProviderError
from onnxshrink.core.tensors import Array, Batch, TensorSpec, require_tensor
from onnxshrink.runtime.interface import match_inputs
from onnxshrink.runtime.providers import (
    CPU,
    Placement,
    Provider,
    find_provider,
    memory_of,
    placement_of,
    provider_options,
    refuse_fallback,
    refuse_misplaced,
    require_provider,
)

__all__ = ["Optimization", "Session", "refuse_fallback", "require_batch", "require_provider"]

LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_SOURCE_PLACE = re.compile(r"^\S+\.(cc|h):\d+ .*\) (?=\S)")
# What ONNX Runtime says of opsets, operators and kernels that it does not have.
_TOO_NEW = re.compile(r"Opset (\d+) is under development.* for domain (\S+) is till opset (\d+)")
_UNKNOWN_OPERATOR = re.compile(r"(\S+?)\(-?\d+\) is not a registered function/op|No Op registered for (\S+)")
_NO_KERNEL = re.compile(r"Could not find an implementation for (\S+) node with name '([^']*)'")
# ONNX Runtime's spelling of element types, and numpy's.
_DTYPES = {"float": "float32", "double": "float64", "float16": "float16", "string": "object"}


class Session:
    """An inference session whose provider is the one that was asked for.

    Args:
        model: Path of an ``.onnx`` or ``.ort`` file, or serialized model bytes.
        target: Provider, threads, optimization level and provider options.
        optimization: ONNX Runtime's graph optimization level; the target's by default.
        without: Names of ONNX Runtime's optimizers to leave out of it; see `applied_optimizers`.
        config: Session config entries, such as ``{"session.disable_quant_qdq": "1"}``.
        save_optimized: Also write the graph that ONNX Runtime runs to this path.
        profile: Time every kernel, into a file whose name begins so; `end_profile` says where it is.
        name: What to call the model in messages, if ``model`` is bytes.
        like: Inputs of another model, whose batches this one shall take; see `match_inputs`. Its own by default.

    Raises:
        ModelError: ONNX Runtime cannot load the model, or its inputs are not like the other's.
        ProviderError: The provider is not installed, cannot open the model, or runs none of it; or the session silently
            fell back; or the target requires all nodes on the provider, and some are not.
    """

    def __init__(
        self,
        model: Path | bytes,
        target: Target | None = None,
        *,
        optimization: Optimization | None = None,
        without: Sequence[str] = (),
        config: Mapping[str, str] | None = None,
        save_optimized: Path | None = None,
        profile: Path | None = None,
        name: str | None = None,
        like: Sequence[TensorSpec] | None = None,
    ) -> None:
        target = target or Target()
        self.name = name or (str(model) if isinstance(model, Path) else "model in memory")
        self.target = target
        provider = find_provider(target)
        options = ort.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(target.spinning)))
        options.graph_optimization_level = LEVELS[optimization or target.optimization]
        options.log_severity_level = 4  # what goes wrong is raised, and told in our form alone
        for key, value in (config or {}).items():
            options.add_session_config_entry(key, value)
        if save_optimized is not None:
            options.optimized_model_filepath = str(save_optimized)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self._session = _open(model, options, target, provider, list(without), where=self.name)
        self.placement = _placement(self._session, target, provider, where=self.name)
        own = tuple(map(_spec, self._session.get_inputs()))
        self.interface = match_inputs(own if like is None else like, own, where=self.name)
        self.inputs: tuple[TensorSpec, ...] = self.interface.specs
        self.outputs: tuple[TensorSpec, ...] = tuple(map(_spec, self._session.get_outputs()))

    @property
    def providers(self) -> list[str]:
        """ONNX Runtime's names of the providers in use, the asked one first."""
        return list(self._session.get_providers())

    def run(self, batch: Batch, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """One inference.

        Args:
            batch: Input name to array; an array that is no input, such as ``labels``, is left out.
            outputs: Names of the outputs wanted; all by default.

        Returns:
            Output name to array.

        Raises:
            InferenceError: ONNX Runtime fails on the batch.
            ModelError: An input is missing, or an input or output is no tensor.
        """
        names = list(outputs) if outputs is not None else [spec.name for spec in self.outputs]
        for spec in (*self.inputs, *(spec for spec in self.outputs if spec.name in names)):
            require_tensor(spec.name, spec.dtype, where=self.name)
        feed = self.interface.feed(batch, where=self.name)
        try:
            values = self._session.run(names, feed)
        except Exception as e:  # as above: InvalidArgument and RuntimeException share no base but Exception
            given = (TensorSpec(name, str(array.dtype), array.shape) for name, array in feed.items())
            raise InferenceError(
                f"ONNX Runtime cannot run the model: {_first_line(e)}",
                where=self.name,
                got=", ".join(map(str, given)),
                want="a model that takes every length of its named axes",
                fix="export it with the batch axis free in every node (a Reshape or Expand often has it fixed), or fix "
                "the axis of the input: python -m onnxruntime.tools.make_dynamic_shape_fixed",
            ) from e
        return dict(zip(names, values, strict=True))

    def call(self, batch: Batch) -> Callable[[], object]:
        """One inference on ``batch`` as a callable, as an application would call it: nothing is checked or cast in it.

        Raises:
            ModelError: As of `run`, which is tried here once.
        """
        self.run(batch)
        names = [spec.name for spec in self.outputs]
        return partial(self._session.run, names, self.interface.feed(batch, where=self.name))

    def end_profile(self) -> Path:
        """Stop timing kernels; the file is JSON, a list of events."""
        return Path(self._session.end_profiling())

    def bind(self, batch: Batch) -> ort.IOBinding:
        """Inputs and outputs bound once, for inference without copies between host and device.

        On CUDA the inputs are copied to the device here and outputs stay there, so `run_bound` times the network alone.
        """
        binding = self._session.io_binding()
        memory, device_id = memory_of(self.target)
        for name, array in self.interface.feed(batch, where=self.name).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, memory, device_id))
        for spec in self.outputs:  # without a shape: ONNX Runtime allocates what each run turns out to need
            binding.bind_output(spec.name, memory, device_id)
        binding.synchronize_inputs()
        return binding

    def run_bound(self, binding: ort.IOBinding) -> None:
        """One inference on bound inputs; returns when the device is done."""
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()


def require_batch(target: Target, specs: Sequence[TensorSpec], *, where: str) -> None:
    """Refuse a target's batch that a model cannot take: its latency would be that of another.

    Args:
        target: One whose ``batch`` is not given takes the model's own.
        specs: The model's inputs.
        where: What to call the model in messages.

    Raises:
        ConfigError: The batch axis has a fixed length, and the target asks for another.
    """
    lengths = [spec.shape[0] for spec in specs if spec.shape]
    fixed = lengths[0] if lengths and not any(isinstance(length, str) for length in lengths) else target.batch
    if "batch" in target.model_fields_set and target.batch != fixed:
        raise ConfigError(
            f"the batch of the model is fixed to {fixed}",
            where=where,
            got=f"targets: batch: {target.batch}",
            want=f"batch: {fixed}",
            fix="drop `batch`, or export with a dynamic batch axis",
        )


def _open(
    model: Path | bytes,
    options: ort.SessionOptions,
    target: Target,
    provider: Provider,
    without: list[str],
    *,
    where: str,
) -> ort.InferenceSession:
    """A session on ``provider``, with the CPU behind it for operators that it does not have."""
    named: list[Any] | None = None
    if provider.devices:
        options.add_provider_for_devices(list(provider.devices), provider_options(target))
    else:
        named = [(provider.name, provider_options(target))] + [CPU] * (provider.name != CPU)
    if provider.name != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    file = os.fspath(model) if isinstance(model, Path) else model
    try:
        # Without its fallback, which would print the provider's error and go on with the CPU.
        return ort.InferenceSession(
            file, options, providers=named, enable_fallback=0, disabled_optimizers=without or None
        )
    except Exception as e:  # ORT raises a dozen unrelated types, RuntimeException and Fail among them
        if provider.name != CPU and _loads_on_cpu(file):
            raise ProviderError(
                f"{provider.name} cannot open the model: {_first_line(e)}",
                where=where,
                got=f"options {target.options}" if target.options else type(e).__name__,
                want="a model and options that the provider takes; the CPU takes the model",
            ) from e
        raise _refused(_first_line(e), type(e).__name__, where=where) from e


def _refused(reason: str, kind: str, *, where: str) -> ModelError:
    """What ONNX Runtime says of a model that it does not load, and what can be done about it."""
    want = f"an ONNX model that onnxruntime {ort.__version__} can run"
    if opset := _TOO_NEW.search(reason):
        asked, domain, known = opset.groups()
        return ModelError(
            f"opset {asked} of {domain} is newer than onnxruntime {ort.__version__} knows",
            where=where,
            got=f"opset {asked}",
            want=f"opset {known} or earlier",
            fix="export it with an earlier opset: {kind: export, opset: 20} or torch.onnx.export(…, "
            "opset_version=20); or update onnxruntime",
        )
    if operator := _UNKNOWN_OPERATOR.search(reason):
        name = operator[1] or operator[2]
        return ModelError(
            f"ONNX Runtime has no operator {name}",
            where=where,
            got=name,
            want=want,
            fix=f"export the model without {name}, written with standard operators; operators from a library of your "
            "own cannot be loaded here",
        )
    if kernel := _NO_KERNEL.search(reason):
        return ModelError(
            f"ONNX Runtime has no kernel on this provider for {kernel[1]}",
            where=where,
            got=f"the node {kernel[2]!r}",
            want=want,
            fix="export it in float32, or write the operator with others; the types of each kernel: onnxruntime's "
            "docs/OperatorKernels.md",
        )
    return ModelError(
        f"ONNX Runtime cannot load the model: {reason}",
        where=where,
        got=kind,
        want=want,
        fix="see what is wrong with it, or export it again: "
        "python -c \"import onnx; onnx.checker.check_model('model.onnx', full_check=True)\"",
    )


def _loads_on_cpu(model: str | bytes) -> bool:
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS["disabled"]
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model, options, providers=[CPU])
    except Exception:  # noqa: BLE001  as above; the error to show is the first one
        return False
    return True


def _placement(session: ort.InferenceSession, target: Target, provider: Provider, *, where: str) -> Placement:
    """Which nodes run where; empty on the CPU, which has no other to fall back to."""
    refuse_fallback(provider.name, session.get_providers(), where=where)
    if provider.name == CPU:
        return {}
    placement = placement_of(session)
    refuse_misplaced(target, provider.name, placement, where=where)
    return placement


def _spec(argument: Any) -> TensorSpec:
    kind = argument.type
    element = kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else kind
    shape = tuple(
        dim if isinstance(dim, str) or (isinstance(dim, int) and dim > 0) else f"dim_{axis}"
        for axis, dim in enumerate(argument.shape or ())
    )
    return TensorSpec(argument.name, _DTYPES.get(element, element), shape)


def _first_line(error: Exception) -> str:
    """The message, without the place in ONNX Runtime's sources that some begin with."""
    return _SOURCE_PLACE.sub("", str(error).strip().partition("\n")[0])
