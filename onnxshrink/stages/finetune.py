"""Fine-tuning: further training, to recover what pruning cost, or so that quantization costs little."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from onnxshrink.config.stages import Finetune
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.runtime.torch_model import count_parameters, load_network, save_network
from onnxshrink.stages.context import Context
from onnxshrink.stages.distill import learn
from onnxshrink.stages.features import observe
from onnxshrink.stages.samples import TrainingBatch, read_samples
from onnxshrink.stages.simulate import Scheme, simulated
from onnxshrink.stages.teachers import Teachers
from onnxshrink.stages.training import Learner, train

_OBSERVED_SAMPLES = 64  # evenly spaced: what the ranges of activations come from
_BATCH = 8


def finetune(settings: Finetune, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Train the network of ``source`` further.

    From labels alone, or against a teacher as `distill` does; where the settings simulate quantization, from the
    network as it was, on the calibration samples.

    Raises:
        ModelError: The teacher cannot be built, or its logits do not fit.
        DataError: The samples do not fit, or have no labels and there is no teacher.
        TrainingError: The loss is not finite.
    """
    if settings.simulate is None:
        return learn(settings, source, out, ctx)
    return _prepare(settings, settings.simulate, source, out, ctx)


class Faithful(Learner):
    """A network that learns to say what it said before.

    Args:
        network: What to train.
        original: The network as it was.
    """

    def __init__(self, network: nn.Module, original: Teachers) -> None:
        super().__init__(network)
        self._original = original

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Noise as a share of the signal, the mean over all floating outputs: ``sum (y - x)^2 / sum x^2``."""
        wanted = self._original(batch, count=None).outputs
        given = observe(self.network, batch.inputs).outputs
        shares = [
            (y - x).square().sum() / x.square().sum().clamp_min(torch.finfo(x.dtype).tiny)
            for y, x in zip(given, wanted, strict=True)
            if x.is_floating_point()
        ]
        return {"noise": torch.stack(shares).mean()}


def _prepare(settings: Finetune, scheme: Scheme, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Train the weights so that they survive rounding: without labels, towards the float network's own outputs."""
    network, architecture = load_network(source)
    original = Teachers([load_network(source)[0]])
    samples = read_samples(ctx, architecture.inputs, labels="unused", role="calibration")
    kept = original.keep(samples, count=None)
    observed = torch.linspace(0, len(samples) - 1, min(_OBSERVED_SAMPLES, len(samples)), dtype=torch.float64).long()
    batches = [samples.take(rows).inputs for rows in torch.split(observed, _BATCH)]
    with simulated(network, scheme, batches) as simulation:
        facts: Facts = {
            "samples": len(samples),
            "parameters": count_parameters(network),
            "original_runs": "once" if kept else "on every batch",
            "simulated": scheme.kind,
            "rounded_activations": simulation.activations,
            "folded_batch_norms": simulation.folded,
        }
        if scheme.exclude_nodes:
            facts["declined"] = "exclude_nodes: they are names in ONNX, so what they name was rounded in training"
        facts |= train(Faithful(network, original), samples, settings, ctx)
    save_network(network, architecture, out)
    return facts
