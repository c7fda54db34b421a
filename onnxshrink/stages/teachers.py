"""Networks to learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onnxshrink.core.errors import ModelError
from onnxshrink.stages.acceleration import make_accelerator
from onnxshrink.stages.features import Seen, observe
from onnxshrink.stages.samples import Samples, TrainingBatch
from onnxshrink.stages.tasks import form_of

_KEPT_BYTES = 1 << 29


class Teachers:
    """Networks to learn from: run in eval mode, never trained and never saved.

    Not a module, so that no learner takes their parameters for its own.

    Args:
        networks: At least one.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks = tuple(network.eval() for network in networks)
        self._kept: tuple[Tensor, ...] | None = None

    @torch.no_grad()
    def __call__(self, batch: TrainingBatch, modules: Sequence[str] = (), *, count: int | None = 1) -> Seen:
        """What they say of some samples.

        Args:
            batch: The samples.
            modules: Modules of the first teacher to look at.
            count: Outputs that are wanted; None for all.

        Returns:
            The first ``count`` outputs, each the mean over the teachers: for logits that is the geometric mean of their
            distributions at every temperature, one of the two that Hinton et al. (2015, section 2) name.
        """
        device = batch.inputs[0].device
        if self._kept is not None:
            return Seen(tuple(values[batch.rows].to(device) for values in self._kept), {})
        first, *others = (
            observe(network.to(device), batch.inputs, () if at else modules) for at, network in enumerate(self.networks)
        )
        outputs = first.outputs[:count]
        for other in others:
            if [x.shape for x in other.outputs[:count]] != [x.shape for x in outputs]:
                raise ModelError(
                    "the outputs of the teachers cannot be averaged",
                    where="averaged_with",
                    got=", ".join(form_of(output) for output in other.outputs[:count]),
                    want=", ".join(form_of(output) for output in outputs) + ", as of the first teacher",
                )
            outputs = tuple(a + b for a, b in zip(outputs, other.outputs, strict=False))
        return Seen(tuple(output / len(self.networks) for output in outputs) if others else outputs, first.features)

    def keep(self, samples: Samples, *, count: int | None) -> bool:
        """Let them say once what they say of every sample, if it is the same every epoch and takes half a GiB at most.

        Args:
            samples: All that will be asked.
            count: Outputs that will be wanted; None for all.

        Returns:
            False if they will run on each batch.
        """
        if samples.is_random:
            return False
        one = self(samples.take(torch.arange(2)), count=count).outputs
        if not all(output.ndim and len(output) == 2 for output in one):
            return False  # not one for each sample
        if sum(output[0].numel() * output.element_size() for output in one) * len(samples) > _KEPT_BYTES:
            return False
        parts = samples.in_order(make_accelerator().device)
        said = [[output.cpu() for output in self(part, count=count).outputs] for part in parts]
        self._kept = tuple(torch.cat(values) for values in zip(*said, strict=True))
        return True
