"""Training, which distillation and fine-tuning share: seeded, and the same weights again for the same seed."""

from __future__ import annotations

import torch

from onnxshrink.config.training import Training
from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import TrainingError
from onnxshrink.core.machine import peak_memory_bytes, reset_peak_memory
from onnxshrink.stages.acceleration import arithmetic, make_accelerator, seeded, shared_norms
from onnxshrink.stages.context import Context
from onnxshrink.stages.loop import Learner, Loop
from onnxshrink.stages.samples import Samples

__all__ = ["Learner", "train"]


def train(learner: Learner, samples: Samples, settings: Training, ctx: Context, *, part: str = "training") -> Facts:
    """Train in place; the network is in eval mode and on the CPU afterwards.

    The same seed, data and number of threads give the same weights on a CPU, byte for byte, whether or not the training
    was killed and went on from a checkpoint; torch's global random state is left as it was.

    Under torchrun or ``accelerate launch`` every process calls this with the same arguments, learns from its part of
    each batch, and ends with the same weights. Gradients are those of the whole batch; only BatchNorm on a CPU knows no
    more than the process's own samples.

    Args:
        learner: What to train and what to minimize; frozen parameters stay as they are.
        samples: The training data.
        settings: How.
        ctx: Seed, step, events, and the folder for checkpoints.
        part: Name of this training in its stage: a stage that trains more than once names each.

    Returns:
        ``epochs``: for each (of more than 200, for 200 of them) its number, its mean loss, the learning rate of its
            last step, the weighted terms of the loss where there are several, and, with early stopping, its figure on
            the held-out samples as ``held_out``;
        ``best_epoch`` whose weights are kept, with early stopping; ``resumed_from_step`` where a checkpoint was found;
        ``precision``, ``device``, ``processes`` where there are more than one; ``peak_memory_bytes`` of this process,
        and ``peak_gpu_memory_bytes``.

    Raises:
        ConfigError: The device cannot do the precision.
        TrainingError: The loss or a gradient is not finite; every parameter is frozen; early stopping leaves too few
            samples.
    """
    dtype = arithmetic(settings, ctx.step)
    if not any(parameter.requires_grad for parameter in learner.parameters()):
        raise TrainingError("the network has nothing to train: every parameter is frozen", where=ctx.step)
    accelerator = make_accelerator()
    device, cuda = accelerator.device, accelerator.device.type == "cuda"
    reset_peak_memory()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with (
        seeded(ctx.seed + accelerator.process_index, device),
        shared_norms(learner, accelerator),
        torch.enable_grad(),
    ):
        facts = Loop(learner, samples, settings, ctx, accelerator=accelerator, dtype=dtype, part=part).run()
    facts |= {"precision": str(dtype).removeprefix("torch."), "device": device.type}
    if accelerator.num_processes > 1:
        facts["processes"] = accelerator.num_processes
    facts["peak_memory_bytes"] = peak_memory_bytes()
    if cuda:
        facts["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    learner.cpu().eval()
    return facts
