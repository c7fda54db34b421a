"""What a training runs on: processes, device, arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onnxshrink.config.training import Training
from onnxshrink.core.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def make_accelerator() -> Accelerator:
    """The processes that torchrun or ``accelerate launch`` started, or this one alone; on GPUs where there are any."""
    from accelerate import Accelerator  # takes a second
    from accelerate.utils import DistributedDataParallelKwargs

    # A learner may hold weights that a step does not use, such as those of an output that no loss asks for.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[unused])


def arithmetic(settings: Training, where: str) -> torch.dtype:
    """The dtype of matrix products in the forward pass; weights and their updates are always float32.

    Args:
        settings: The precision asked for.
        where: The step, for messages.

    Raises:
        ConfigError: float16 without a GPU: its small range needs kernels and a loss scale that only CUDA has.
    """
    cuda = torch.cuda.is_available()
    if settings.precision == "float16" and not cuda:
        raise ConfigError(
            "float16 training needs a CUDA device, and there is none",
            where=where,
            got="precision: float16",
            want="float32, or bfloat16, which the CPU has as well",
            fix="precision: auto",
        )
    if settings.precision == "auto":
        return torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    dtype: torch.dtype = getattr(torch, settings.precision)
    return dtype


def share_of(rows: Tensor, index: int, count: int) -> tuple[Tensor, float]:
    """The part of a batch that one of several processes learns from.

    Losses are means over the part, and gradients are averaged over the processes. With the loss multiplied by the
    weight, that average is the gradient of the mean over the whole batch, however uneven the parts are.

    Args:
        rows: The batch of all processes, at least one row.
        index: Number of the process.
        count: How many there are.

    Returns:
        Its rows and the weight of its loss. No part has one sample, where the batch has two: BatchNorm has no variance
        over one. A process for which nothing is left goes along with the first one's rows, which weigh 0 for it.
    """
    parts = torch.tensor_split(rows, max(1, min(count, len(rows) // 2)))
    if index >= len(parts):
        return parts[0], 0.0
    return parts[index], len(parts[index]) * count / len(rows)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global random state starts from ``seed`` inside, and is what it was outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def shared_norms(network: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """BatchNorm over the samples of all processes at once, where torch has it: on GPUs.

    On CPUs every process normalizes by the statistics of its own samples; the running ones are the first process's.
    """
    shared = accelerator.num_processes > 1 and accelerator.device.type == "cuda"
    norms = [(module, type(module)) for module in network.modules() if shared and type(module) in _NORMS]
    # By class, for `convert_sync_batchnorm` makes new modules and drops the hooks of the old ones.
    for module, _ in norms:
        module.__class__ = nn.SyncBatchNorm
        module.process_group = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind in norms:
            module.__class__ = kind


@torch.no_grad()
def same_everywhere(network: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the first one's buffers and weights."""
    if accelerator.num_processes > 1:
        for tensor in (*network.parameters(), *network.buffers()):
            # gloo takes contiguous tensors of numbers only, and what is true or false is never learned.
            if tensor.dtype != torch.bool:
                sent = tensor.contiguous()
                torch.distributed.broadcast(sent, src=0)
                tensor.copy_(sent)
