"""The steps of one variant in order, from where it came from to the session that is deployed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from onnxshrink.config.base import fingerprint
from onnxshrink.config.gates import Target
from onnxshrink.config.run import RunConfig
from onnxshrink.config.stages import Distill, Optimize, PruneChannels, PruneWeights, Stage
from onnxshrink.config.training import Learning
from onnxshrink.core.artifact import Artifact
from onnxshrink.runtime.session import Optimization
from onnxshrink.stages.memo import Memo
from onnxshrink.stages.optimize import optimize_partly, pass_names
from onnxshrink.stages.references import original_of, reference_of
from onnxshrink.verify.checkpoints import Runtime

_LEVELS: tuple[Optimization, ...] = ("disabled", "basic", "extended", "all")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The model after one step.

    Attributes:
        name: Of the step, such as ``optimize/slim`` or ``session at extended``.
        make: Gives the model, of kind ``onnx``; nothing is made before it is asked for, and nothing twice.
        runtime: How the model is run.
        is_session: Whether the step is one of ONNX Runtime's: the model is that of the step before.
    """

    name: str
    make: Callable[[], Artifact]
    runtime: Runtime
    is_session: bool = False


@dataclass(frozen=True, slots=True)
class Way:
    """What every step is measured against, and the steps.

    Attributes:
        reference: Kind ``torch`` or ``onnx``.
        reference_name: What to call it.
        steps: At least one.
    """

    reference: Artifact
    reference_name: str
    steps: tuple[Checkpoint, ...]


def drift_way(config: RunConfig, memo: Memo) -> Way:
    """From the last torch network of the branch, run by torch, or from the ONNX file that the config names.

    What torch stages change, they change on purpose: no drift is measured there.

    Args:
        config: One with a single variant.
        memo: Where its stages are run.
    """
    stages, labels, artifacts = _chain(config, memo)
    begin = max((at for at, artifact in enumerate(artifacts) if artifact.kind == "torch"), default=0)
    kind = "torch" if artifacts[begin].kind == "torch" else "onnx"
    name = f"the {kind} source" if begin == 0 else f"torch after {labels[begin - 1]}"
    steps = _onnx_steps(config, memo, stages[begin:], labels[begin:], artifacts[begin:])
    return _way(artifacts[begin], name, [*steps, *session_steps(artifacts[-1], config.targets[0])])


def accuracy_way(config: RunConfig, memo: Memo) -> Way:
    """From what the run's accuracy is measured against: the teacher, or the network before it was cut or trained.

    Networks are scored as ONNX, exported as the config says. What is cut and trained right after it is one step.

    Args:
        config: One with a single variant.
        memo: Where its stages are run.
    """
    stages, labels, artifacts = _chain(config, memo)
    variant = next(iter(config.variants))
    original = original_of(config, memo, artifacts[: len(config.stages) + 1], {variant: artifacts})
    steps: list[Checkpoint] = []
    begin = next(at for at, artifact in enumerate(artifacts) if artifact.kind == "onnx")
    if original is None:
        original = "the exported network" if begin else "the onnx source", reference_of(memo, stages, artifacts)
    else:
        begin -= 1
        steps += _torch_steps(config, memo, stages[:begin], labels, artifacts)
    steps += _onnx_steps(config, memo, stages[begin:], labels[begin:], artifacts[begin:])
    return _way(original[1], original[0], [*steps, *session_steps(artifacts[-1], config.targets[0])])


def session_steps(model: Artifact, target: Target) -> list[Checkpoint]:
    """The levels of ONNX Runtime's graph optimization, up to the target's own; its kernels first if not the CPU's."""
    on_cpu = target.provider == "cpu"
    levels = _LEVELS[: _LEVELS.index(target.optimization) + 1]
    on = "" if on_cpu else f" on {target.provider}"
    return [
        Checkpoint(f"session at {level}{on}", partial(_given, model), Runtime(target, level), is_session=True)
        for level in (levels[1:] or levels if on_cpu else levels)
    ]


def _way(reference: Artifact, name: str, steps: Sequence[Checkpoint]) -> Way:
    """The steps under names that differ."""
    seen: Counter[str] = Counter()
    named = []
    for step in steps:
        seen[step.name] += 1
        named.append(replace(step, name=f"{step.name} ({seen[step.name]})") if seen[step.name] > 1 else step)
    return Way(reference, name, tuple(named))


def _chain(config: RunConfig, memo: Memo) -> tuple[tuple[Stage, ...], list[str], list[Artifact]]:
    """The variant's stages, a label for each, and the artifacts: the source, then what each stage made."""
    ((name, stages),) = config.branches()
    trunk = memo.fold(memo.open(config.model), config.stages)
    artifacts = [*trunk, *memo.fold(trunk[-1], config.variants[name], f"{name}/")[1:]]
    own = len(config.stages)
    labels = [stage.kind if at < own else f"{name}/{stage.kind}" for at, stage in enumerate(stages)]
    return stages, labels, artifacts


def _torch_steps(
    config: RunConfig, memo: Memo, stages: Sequence[Stage], labels: Sequence[str], artifacts: Sequence[Artifact]
) -> Iterator[Checkpoint]:
    """After each torch stage from the first that is measured against the original."""
    cuts = (PruneChannels, PruneWeights)
    begins = [at for kinds in (Distill, cuts) for at, stage in enumerate(stages) if isinstance(stage, kinds)]
    label = ""
    for at in range(begins[0] if begins else 0, len(stages)):
        label += labels[at]
        mended = isinstance(stages[at], cuts) and at + 1 < len(stages) and isinstance(stages[at + 1], Learning)
        if mended:
            label += ", "
            continue
        make = partial(memo.derive, config.export_settings(), artifacts[at + 1], f"{labels[at]} ▸ export")
        yield Checkpoint(label, make, _plain(config))
        label = ""


def _onnx_steps(
    config: RunConfig, memo: Memo, stages: Sequence[Stage], labels: Sequence[str], artifacts: Sequence[Artifact]
) -> Iterator[Checkpoint]:
    """After each stage that changed the model, and within `Optimize` after each of its passes."""
    runtime = _plain(config)
    for stage, label, before, after in zip(stages, labels, artifacts, artifacts[1:], strict=False):
        if before.digest == after.digest:
            continue
        name = label
        if isinstance(stage, Optimize):
            names = [f"{label}/{pass_}" for pass_ in pass_names()]
            for count, name in enumerate(names[:-1], 1):
                make = partial(_after_passes, memo, stage, before, name, count=count, seed=config.seed)
                yield Checkpoint(name, make, runtime)
            name = names[-1]
        yield Checkpoint(name, partial(_given, after), runtime)


def _after_passes(memo: Memo, stage: Optimize, source: Artifact, name: str, *, count: int, seed: int) -> Artifact:
    """What the stage `optimize` had made after so many passes, kept like the stage's own result."""
    key = {
        "settings": fingerprint(stage),
        "passes": count,
        "input": source.digest,
        "seed": seed,
        "data": {role: memo.data_key(role) for role in stage.uses},
    }
    context = memo.context(name, stage.uses)
    work = partial(optimize_partly, stage, source, ctx=context, n_passes=count)
    return memo.once(name, "optimize_partly", key, "onnx", work, uses={"onnx"})


def _given(artifact: Artifact) -> Artifact:
    return artifact


def _plain(config: RunConfig) -> Runtime:
    """The graph node by node on the CPU: what the file says, and none of what a session makes of it."""
    return Runtime(Target(threads=config.targets[0].threads))
