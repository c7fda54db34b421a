"""Execution providers: found, loaded as plugins, or refused before any work; and where their nodes run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx_models import cnn, samples_of
from pydantic import ValidationError

from onnxshrink.config.gates import Target
from onnxshrink.config.providers import SHORT_NAMES, full_name, short_name
from onnxshrink.core.errors import ConfigError, ModelError, ProviderError
from onnxshrink.runtime import providers
from onnxshrink.runtime.providers import find_provider, memory_of, provider_options, refuse_misplaced, require_provider
from onnxshrink.runtime.session import Session

AZURE = "AzureExecutionProvider"
needs_azure = pytest.mark.skipif(AZURE not in ort.get_available_providers(), reason="this onnxruntime has no azure")


@dataclass
class Loader:
    """Stands for ONNX Runtime's part in plugins: which devices there are once a library is loaded.

    Attributes:
        offers: ``(provider, kind of hardware)`` of each device of the library.
        loaded: Names that libraries were registered under, in order.
    """

    offers: list[tuple[str, str]] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def register(self, name: str, path: str) -> None:
        """As ``onnxruntime.register_execution_provider_library``."""
        if not path.endswith(".so"):
            raise RuntimeError("Failed to load library: invalid ELF header")
        self.loaded.append(name)

    def devices(self) -> list[Any]:
        """As ``onnxruntime.get_ep_devices``."""
        offers = [("CPUExecutionProvider", "CPU"), *(self.offers if self.loaded else [])]
        return [SimpleNamespace(ep_name=n, device=SimpleNamespace(type=SimpleNamespace(name=k))) for n, k in offers]


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    """No library is really loaded."""
    made = Loader()
    providers._load.cache_clear()
    monkeypatch.setattr(ort, "register_execution_provider_library", made.register)
    monkeypatch.setattr(ort, "get_ep_devices", made.devices)
    return made


def test_short_names_lead_to_names_that_onnx_runtime_has() -> None:
    """The map is held against ONNX Runtime's own list of all providers; ROCm left it in 1.23."""
    assert set(SHORT_NAMES.values()) - {"ROCMExecutionProvider"} <= set(ort.get_all_providers())


@pytest.mark.parametrize("name", ["openvino", "OpenVINO", "OpenVINOExecutionProvider", "openvinoexecutionprovider"])
def test_either_name_of_a_provider_means_the_same_target(name: str) -> None:
    """A target is called by the short name, so that two spellings are not two targets."""
    target = Target(provider=name)
    assert target == Target(provider="openvino")
    assert target.name == "openvino"
    assert full_name(target.provider) == "OpenVINOExecutionProvider"


def test_a_name_that_is_not_known_is_onnx_runtimes() -> None:
    """Plugins name themselves: such a name reaches ONNX Runtime as it was written."""
    assert short_name("MyExecutionProvider") == full_name("MyExecutionProvider") == "MyExecutionProvider"
    with pytest.raises(ValidationError):
        Target(provider="")


def test_targets_that_differ_in_what_a_session_is_have_different_names() -> None:
    """Level, threads, batch and device show; a label replaces all of it."""
    names = [
        Target(**settings).name
        for settings in (
            {},
            {"threads": 2},
            {"batch": 8},
            {"optimization": "basic"},
            {"provider": "openvino"},
            {"provider": "openvino", "device": "gpu"},
            {"provider": "openvino", "options": {"device_type": "GPU"}, "label": "iGPU"},
        )
    ]
    assert names == ["cpu", "cpu x2", "cpu, batch 8", "cpu, basic", "openvino", "openvino gpu", "iGPU"]


@pytest.mark.parametrize(
    ("provider", "fix"),
    [
        ("cuda", "pip install onnxruntime-gpu"),
        ("openvino", "onnxruntime-openvino, in place of onnxruntime; or pip install onnxruntime-ep-openvino"),
        ("qnn", "pip install onnxruntime-qnn, and give the `library` in it"),
        ("xnnpack", "no package on PyPI has it"),
        ("rocm", "use migraphx"),
        ("opnvino", "did you mean 'openvino'?"),
        ("Nonesuch", "give the plugin's `library`"),
    ],
)
def test_a_provider_that_is_not_here_says_what_is_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, provider: str, fix: str
) -> None:
    """The list of what is there, and the package that brings the one asked for."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="not available here") as error:
        require_provider(Target(provider=provider))
    assert (error.value.got, error.value.want) == (provider, "CPUExecutionProvider")
    assert error.value.fix is not None
    assert fix in error.value.fix


def test_a_plugin_is_loaded_once_under_its_providers_name(loader: Loader, tmp_path: Path) -> None:
    """Some plugins call themselves what they are registered as, so that must be the name that was asked for."""
    library = tmp_path / "plugin.so"
    library.touch()
    loader.offers = [("OpenVINOExecutionProvider", "CPU"), ("OpenVINOExecutionProvider", "NPU"), ("other", "GPU")]
    target = Target(provider="openvino", library=library)
    found = [find_provider(target), find_provider(target.model_copy(update={"device": "npu"}))]
    assert [len(provider.devices) for provider in found] == [1, 1]
    assert [providers.kind_of(provider.devices[0]) for provider in found] == ["cpu", "npu"]
    assert loader.loaded == ["OpenVINOExecutionProvider"]
    with pytest.raises(ProviderError, match="has no gpu here") as error:
        find_provider(target.model_copy(update={"device": "gpu"}))
    assert error.value.got == "cpu, npu"


def test_a_plugin_without_hardware_is_refused(loader: Loader, tmp_path: Path) -> None:
    """As OpenVINO's plugin does on a processor that is not Intel's: it loads, and offers nothing."""
    library = tmp_path / "plugin.so"
    library.touch()
    loader.offers = [("other", "GPU")]
    with pytest.raises(ProviderError, match="finds no hardware") as error:
        find_provider(Target(provider="openvino", library=library))
    assert error.value.got == "devices of CPUExecutionProvider (cpu), other (gpu)"


def test_a_library_that_cannot_be_loaded_is_our_error(loader: Loader, tmp_path: Path) -> None:
    """ONNX Runtime's reason is told, with the path; nothing is kept of the try."""
    library = tmp_path / "plugin.txt"
    library.touch()
    for _ in range(2):
        with pytest.raises(ProviderError, match="invalid ELF header") as error:
            find_provider(Target(provider="openvino", library=library))
        assert error.value.where == str(library)
    assert not loader.loaded


def test_a_real_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime itself refuses it."""
    library = tmp_path / "plugin.so"
    library.write_text("no library", encoding="utf-8")
    with pytest.raises(ProviderError, match="cannot be loaded"):
        find_provider(Target(provider="Nonesuch", library=library))


def test_options_that_nobody_hears_are_refused() -> None:
    """The CPU ignores every option, and a provider that is built in has no `device` to choose."""
    session = ort.InferenceSession(cnn().SerializeToString(), providers=[("CPUExecutionProvider", {"nonesuch": "1"})])
    assert session.get_provider_options() == {"CPUExecutionProvider": {}}  # which is why
    with pytest.raises(ConfigError, match="takes no options"):
        require_provider(Target(options={"nonesuch": 1}))
    with pytest.raises(ConfigError, match="built in"):
        require_provider(Target(device="npu"))


def test_options_reach_onnx_runtime_as_text() -> None:
    """Booleans as its parser reads them, mappings as JSON; an option without a value is a mistake."""
    options = {"device_id": 1, "use_tf32": False, "gpu_mem_limit": 2**31, "load_config": {"CPU": {"b": 1, "a": 2}}}
    assert provider_options(Target(provider="cuda", options=options)) == {
        "device_id": "1",
        "use_tf32": "False",
        "gpu_mem_limit": "2147483648",
        "load_config": '{"CPU": {"a": 2, "b": 1}}',
    }
    with pytest.raises(ConfigError, match="'device_id' has no value"):
        provider_options(Target(provider="cuda", options={"device_id": None}))


@pytest.mark.parametrize(
    ("settings", "memory"),
    [
        ({}, ("cpu", 0)),
        ({"provider": "cuda"}, ("cuda", 0)),
        ({"provider": "cuda", "options": {"device_id": "1"}}, ("cuda", 1)),
        ({"provider": "tensorrt", "options": {"device_id": 2}}, ("cuda", 2)),
        ({"provider": "directml"}, ("dml", 0)),
        ({"provider": "openvino", "options": {"device_type": "GPU"}}, ("cpu", 0)),
    ],
)
def test_tensors_are_bound_where_the_provider_computes(settings: dict[str, Any], memory: tuple[str, int]) -> None:
    """On the very device of the options; a provider that takes tensors from the host gets them there."""
    assert memory_of(Target(**settings)) == memory


def test_inputs_and_outputs_are_bound_to_the_device_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs without a shape, so that one whose shape only the run knows is bound as well."""
    model = cnn()
    session = Session(model.SerializeToString())
    session.target = Target(provider="cuda", options={"device_id": 1})
    bound: list[tuple[Any, ...]] = []

    class Binding:
        """Notes what is bound."""

        def bind_ortvalue_input(self, name: str, value: object) -> None:
            bound.append((name, value))

        def bind_output(self, *args: object) -> None:
            bound.append(args)

        def synchronize_inputs(self) -> None:
            bound.append(("synchronized",))

    monkeypatch.setattr(session._session, "io_binding", Binding, raising=False)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", lambda _, memory, device: (memory, device))
    session.bind(samples_of(model, 2))
    assert bound == [("x", ("cuda", 1)), ("y", "cuda", 1), ("synchronized",)]


PARTLY = {"A": [("conv1", "Conv"), ("conv2", "Conv")], "CPUExecutionProvider": [("shape", "Shape"), ("", "Gather")]}


def test_a_provider_that_takes_no_node_is_refused() -> None:
    """All on the CPU is a fallback, though the session names the provider first."""
    placed = {"CPUExecutionProvider": [(f"n{index}", "Conv") for index in range(7)]}
    with pytest.raises(ProviderError, match="takes no node of the model") as error:
        refuse_misplaced(Target(provider="A"), "A", placed, where="m.onnx")
    assert error.value.got == "n0 (Conv), n1 (Conv), n2 (Conv), n3 (Conv), n4 (Conv) and 2 more"


def test_a_partial_fallback_is_refused_only_where_all_is_required() -> None:
    """The nodes that run elsewhere are named, those without a name by their operator."""
    refuse_misplaced(Target(provider="A"), "A", PARTLY, where="m.onnx")
    refuse_misplaced(Target(provider="A", require_all=True), "A", {"A": PARTLY["A"]}, where="m.onnx")
    refuse_misplaced(Target(provider="A", require_all=True), "A", {}, where="a model of constants alone")
    with pytest.raises(ProviderError, match="runs 2 of 4 nodes; the others run on CPUExecutionProvider") as error:
        refuse_misplaced(Target(provider="A", require_all=True), "A", PARTLY, where="m.onnx")
    assert error.value.got == "shape (Shape), a node (Gather)"


@needs_azure
def test_a_provider_that_registers_and_runs_nothing_is_refused() -> None:
    """Azure's is in the standard wheel, comes first in `get_providers`, and takes no node: a real silent fallback."""
    model = cnn().SerializeToString()
    options = ort.SessionOptions()
    assert ort.InferenceSession(model, options, providers=[AZURE, "CPUExecutionProvider"]).get_providers()[0] == AZURE
    with pytest.raises(ProviderError, match=rf"{AZURE} takes no node.*run on CPUExecutionProvider"):
        Session(model, Target(provider="azure"))
    # The second source: ONNX Runtime's own switch refuses the same session.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.log_severity_level = 4
    with pytest.raises(Exception, match="assigned to the default CPU EP"):
        ort.InferenceSession(model, options, providers=[AZURE])


@needs_azure
def test_a_model_that_the_provider_refuses_and_one_that_nobody_takes_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CPU is asked: a model that it takes is not at fault."""
    broken = onnx.load_from_string(cnn().SerializeToString())
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match="NoSuchOperator"):
        Session(broken.SerializeToString(), Target(provider="azure"))
    real = ort.InferenceSession

    def refusing(model: object, options: object, providers: Any, **settings: Any) -> object:
        if AZURE in str(providers):
            raise RuntimeError("/onnxruntime/python/state.cc:1053 void Create(const std::string&) Invalid option: x")
        return real(model, options, providers=providers, **settings)

    monkeypatch.setattr(ort, "InferenceSession", refusing)
    with pytest.raises(ProviderError, match="cannot open the model: Invalid option: x"):
        Session(cnn().SerializeToString(), Target(provider="azure", options={"x": 1}))


def test_the_level_of_a_target_is_the_level_of_its_sessions(tmp_path: Path) -> None:
    """Unless a session asks for its own."""
    model = cnn().SerializeToString()
    seen = {}
    for name, asked in {"target": None, "own": "extended"}.items():
        path = tmp_path / f"{name}.onnx"
        Session(model, Target(optimization="disabled"), optimization=asked, save_optimized=path)
        seen[name] = len(onnx.load(path).graph.node)
    assert seen["target"] == len(cnn().graph.node)
    assert seen["own"] < seen["target"]
    batch = samples_of(cnn(), 2)
    outputs = [Session(model, Target(optimization=level)).run(batch)["y"] for level in ("disabled", "all")]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)
