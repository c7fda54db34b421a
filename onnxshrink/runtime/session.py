"""ONNX Runtime sessions: opened as asked or refused, never on another provider than the one named."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnxruntime as ort

from onnxshrink.config.gates import Target
from onnxshrink.core.errors import ConfigError, ModelError, ProviderError
from onnxshrink.core.tensors import Array, Batch, TensorSpec, require_tensor
from onnxshrink.runtime.interface import match_inputs

Optimization: TypeAlias = Literal["disabled", "basic", "extended", "all"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
# ONNX Runtime's spelling of element types, and numpy's.
_DTYPES = {"float": "float32", "double": "float64", "float16": "float16", "string": "object"}


class Session:
    """An inference session whose provider is the one that was asked for.

    Args:
        model: Path of an ``.onnx`` or ``.ort`` file, or serialized model bytes.
        target: Provider, threads and provider options.
        optimization: ONNX Runtime's graph optimization level; ``all`` is what a deployed model gets.
        config: Session config entries, such as ``{"session.disable_quant_qdq": "1"}``.
        save_optimized: Also write the graph that ONNX Runtime runs to this path.
        profile: Time every kernel, into a file whose name begins so; `end_profile` says where it is.
        name: What to call the model in messages, if ``model`` is bytes.
        like: Inputs of another model, whose batches this one shall take; see `match_inputs`. Its own by default.

    Raises:
        ModelError: ONNX Runtime cannot load the model, or its inputs are not like the other's.
        ProviderError: The provider is not installed, or the session silently fell back.
    """

    def __init__(
        self,
        model: Path | bytes,
        target: Target | None = None,
        *,
        optimization: Optimization = "all",
        config: Mapping[str, str] | None = None,
        save_optimized: Path | None = None,
        profile: Path | None = None,
        name: str | None = None,
        like: Sequence[TensorSpec] | None = None,
    ) -> None:
        target = target or Target()
        self.name = name or (str(model) if isinstance(model, Path) else "model in memory")
        self.target = target
        provider = require_provider(target)
        options = ort.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(target.spinning)))
        options.graph_optimization_level = _LEVELS[optimization]
        options.log_severity_level = 3
        for key, value in (config or {}).items():
            options.add_session_config_entry(key, value)
        if save_optimized is not None:
            options.optimized_model_filepath = str(save_optimized)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        providers: list[Any] = [(provider, {str(k): str(v) for k, v in target.options.items()})]
        if provider != "CPUExecutionProvider":
            providers.append("CPUExecutionProvider")
        try:
            self._session = ort.InferenceSession(
                os.fspath(model) if isinstance(model, Path) else model, options, providers=providers
            )
        except Exception as e:  # ORT raises a dozen unrelated types, RuntimeException and Fail among them
            raise ModelError(
                f"ONNX Runtime cannot load the model: {_first_line(e)}",
                where=self.name,
                got=type(e).__name__,
                want=f"an ONNX model that onnxruntime {ort.__version__} can run",
            ) from e
        refuse_fallback(provider, self._session.get_providers(), where=self.name)
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
            ModelError: An input is missing, ONNX Runtime refuses the batch, or an input or output is no tensor.
        """
        names = list(outputs) if outputs is not None else [spec.name for spec in self.outputs]
        for spec in (*self.inputs, *(spec for spec in self.outputs if spec.name in names)):
            require_tensor(spec.name, spec.dtype, where=self.name)
        feed = self.interface.feed(batch, where=self.name)
        try:
            values = self._session.run(names, feed)
        except Exception as e:  # as above: InvalidArgument and RuntimeException share no base but Exception
            raise ModelError(f"ONNX Runtime cannot run the model: {_first_line(e)}", where=self.name) from e
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
        device = "cuda" if self.target.provider == "cuda" else "cpu"
        for name, array in self.interface.feed(batch, where=self.name).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
        for spec in self.outputs:
            binding.bind_output(spec.name, device)
        binding.synchronize_inputs()
        return binding

    def run_bound(self, binding: ort.IOBinding) -> None:
        """One inference on bound inputs; returns when the device is done."""
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()


def require_provider(target: Target) -> str:
    """ONNX Runtime's name of the target's provider.

    Raises:
        ProviderError: This build of ONNX Runtime does not have it.
    """
    wanted = _PROVIDERS[target.provider]
    available = ort.get_available_providers()
    if wanted not in available:
        raise ProviderError(
            f"the execution provider {target.provider!r} is not available here",
            got=", ".join(available),
            want=wanted,
            fix="pip install onnxruntime-gpu" if target.provider == "cuda" else "reinstall onnxruntime",
        )
    return wanted


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


def refuse_fallback(wanted: str, got: Sequence[str], *, where: str) -> None:
    """Raise where a session runs on other providers than the one that was asked for.

    Raises:
        ProviderError: ``wanted`` is not the first of ``got``.
    """
    if not got or got[0] != wanted:
        raise ProviderError(
            f"ONNX Runtime dropped {wanted} without an error",
            where=where,
            got=", ".join(got) or "no provider",
            want=wanted,
            fix="check that the provider's libraries load (for CUDA: matching CUDA and cuDNN), or change `targets`",
        )


def _spec(argument: Any) -> TensorSpec:
    kind = argument.type
    element = kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else kind
    shape = tuple(
        dim if isinstance(dim, str) or (isinstance(dim, int) and dim > 0) else f"dim_{axis}"
        for axis, dim in enumerate(argument.shape or ())
    )
    return TensorSpec(argument.name, _DTYPES.get(element, element), shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
