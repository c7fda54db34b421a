"""The loop of a training: steps, epochs, and what a killed one goes on from."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onnxshrink.config.training import Training
from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import TrainingError
from onnxshrink.stages.acceleration import same_everywhere, share_of
from onnxshrink.stages.checkpoint import Checkpoints, copy_of, digest_tensors, restore, tensors_of
from onnxshrink.stages.context import Context
from onnxshrink.stages.early_stopping import FIGURE, best_epoch, hold_out, is_over, sum_of, thinned
from onnxshrink.stages.optimizer import Average, make_optimizer, schedule
from onnxshrink.stages.samples import Samples, TrainingBatch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Learner(nn.Module, ABC):
    """A network and what it is to learn: the parameters of both are trained, and only the network is kept.

    Args:
        network: What to train.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @abstractmethod
    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Every term of the loss, weighted, as a scalar mean over the batch; their sum is minimized.

        Inputs and labels are where the parameters are. What a learner holds besides parameters and buffers, such as a
        teacher, it has to bring there; ``batch.rows`` stay on the CPU.
        """

    def judge(self, batch: TrainingBatch) -> Tensor:
        """A figure for each sample, ``(batch,)``, by which early stopping tells epochs apart; lower is better.

        Asked in eval mode and without gradients. The loss, unless a learner knows better.
        """
        return _total(self(batch)).expand(len(batch))


class Loop:
    """One training, and all that it has to remember: what its checkpoints hold.

    Args:
        learner: What to train.
        samples: The training data.
        settings: How.
        ctx: Seed, step, events, and the folder for checkpoints.
        accelerator: The processes and the device.
        dtype: Of matrix products in the forward pass.
        part: The training's name in its stage.
    """

    def __init__(
        self,
        learner: Learner,
        samples: Samples,
        settings: Training,
        ctx: Context,
        *,
        accelerator: Accelerator,
        dtype: torch.dtype,
        part: str,
    ) -> None:
        self._learner, self._samples, self._settings, self._ctx = learner, samples, settings, ctx
        self._accelerator = accelerator
        self._rows, self._held_out = hold_out(len(samples), settings.early_stopping, seed=ctx.seed, where=samples.where)
        self._checkpoints = Checkpoints(
            ctx.scratch,
            part,
            {
                "settings": settings.model_dump(mode="json"),
                "samples": len(samples),
                "seed": ctx.seed,
                "processes": accelerator.num_processes,
                "precision": str(dtype),
                "start": digest_tensors(tensors_of(learner)) if ctx.scratch else None,
            },
            ctx.events,
        )
        self._weights = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(self._weights, settings)
        self._model, self._optimizer = accelerator.prepare(learner, optimizer)
        self._autocast = torch.autocast(accelerator.device.type, dtype=dtype, enabled=dtype != torch.float32)
        self._scaler = torch.amp.GradScaler(accelerator.device.type, enabled=dtype == torch.float16)
        self._average = None if settings.ema_decay is None else Average(self._weights, settings.ema_decay)
        self._best: dict[str, Tensor] | None = None
        self._epochs: list[dict[str, Any]] = []
        self._summed: dict[str, float] = {}
        self._step = 0
        self._n_batches = len(_split(self._rows, settings.batch_size))
        self._written = time.monotonic()

    def run(self) -> Facts:
        """Train to the end, from the last checkpoint if there is one; the learner has the weights to keep."""
        state = self._load()
        resumed = {} if state is None else {"resumed_from_step": state["step"]}
        if state is not None and "facts" in state:
            restore(self._learner, state["learner"])
            return {**state["facts"], **resumed}
        if state is not None:
            self._resume(state)
        self._learn_epochs()
        if self._best is not None:
            restore(self._learner, self._best)
        elif self._average is not None:
            self._average.swap()
        same_everywhere(self._learner, self._accelerator)
        self._accelerator.free_memory()
        facts: Facts = {"epochs": thinned(self._epochs)}
        if self._settings.early_stopping is not None:
            facts["best_epoch"] = best_epoch(self._epochs)
        self._save({"learner": tensors_of(self._learner), "facts": facts})
        return facts | resumed

    def _learn_epochs(self) -> None:
        settings = self._settings
        order = torch.Generator().manual_seed(self._ctx.seed)
        self._learner.train()
        for epoch in range(1, settings.epochs + 1):
            if is_over(self._epochs, settings.early_stopping):
                return
            # Drawn for the epochs before a checkpoint as well: the order follows from the seed alone.
            drawn = self._rows[torch.randperm(len(self._rows), generator=order)]
            batches = _split(drawn, settings.batch_size)
            for rows in batches[max(0, self._step - (epoch - 1) * len(batches)) :]:
                due = self._learn(rows, epoch)
                if self._step == epoch * len(batches):
                    self._end_epoch(epoch)
                if due:
                    self._save(self._state())

    def _learn(self, rows: Tensor, epoch: int) -> bool:
        """One step; True if a checkpoint is due, in all processes or in none."""
        settings, accelerator = self._settings, self._accelerator
        total = settings.epochs * self._n_batches
        rate = settings.learning_rate * schedule(self._step, total, settings.warm_up_ratio)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        own, weight = share_of(rows, accelerator.process_index, accelerator.num_processes)
        self._optimizer.zero_grad()
        with self._autocast:
            terms: dict[str, Tensor] = self._model(self._take(own, epoch))
            loss = _total(terms) * weight
        accelerator.backward(self._scaler.scale(loss))
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self._weights, settings.max_gradient_norm or math.inf)
        due = time.monotonic() - self._written >= 60 * settings.checkpoint_minutes
        values = torch.stack([term.detach().double() * weight / accelerator.num_processes for term in terms.values()])
        shared = torch.cat([values, values.new_tensor([float(due and accelerator.is_main_process)])])
        *means, written = accelerator.reduce(shared).tolist()
        mean = sum(means)
        # Scaled gradients of float16 overflow now and then: the scaler skips the step and scales less.
        if not math.isfinite(mean) or not (self._scaler.is_enabled() or math.isfinite(norm.item())):
            where = f"{self._ctx.step}, epoch {epoch}, step {self._step + 1}, learning rate {rate:.3g}"
            raise _astray(f"the loss is {mean:.3g} and its gradient has norm {norm.item():.3g}", where)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._step += 1
        if self._average is not None:
            self._average.update(self._step)
        for name, value in zip(terms, means, strict=True):
            self._summed[name] = self._summed.get(name, 0.0) + value * len(rows)
        self._ctx.events.progress(self._ctx.step, self._step, total, f"loss {mean:.3f}, epoch {epoch}")
        return bool(written)

    def _end_epoch(self, epoch: int) -> None:
        means = {name: value / len(self._rows) for name, value in self._summed.items()}
        entry: dict[str, Any] = {"epoch": epoch, "loss": round(sum(means.values()), 6)}
        entry["learning_rate"] = float(f"{self._optimizer.param_groups[0]['lr']:.4g}")
        if len(means) > 1:
            entry["terms"] = {name: round(value, 6) for name, value in means.items()}
        self._epochs.append(entry)
        self._summed = {}
        if self._settings.early_stopping is None:
            return
        same_everywhere(self._learner, self._accelerator)
        with self._averaged():
            figure = self._judge()
            if not math.isfinite(figure):
                raise _astray(f"the held-out samples are judged {figure:.3g}", f"{self._ctx.step}, epoch {epoch}")
            entry[FIGURE] = round(figure, 6)
            if best_epoch(self._epochs) == epoch:
                self._best = copy_of(self._learner)

    def _judge(self) -> float:
        """The mean figure of the held-out samples, of which each process judges some."""
        accelerator = self._accelerator
        own = self._held_out[accelerator.process_index :: accelerator.num_processes]
        self._learner.eval()
        with self._autocast:
            summed = sum_of(lambda rows: self._learner.judge(self._take(rows)), own, self._settings.batch_size)
        self._learner.train()
        shared = torch.tensor(summed, dtype=torch.float64, device=accelerator.device)
        return float(accelerator.reduce(shared)) / len(self._held_out)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The learner with the averaged weights, if there is an average."""
        if self._average is None:
            yield
            return
        self._average.swap()
        yield
        self._average.swap()

    def _take(self, rows: Tensor, epoch: int | None = None) -> TrainingBatch:
        return self._samples.take(rows, epoch=epoch).to(self._accelerator.device)

    def _state(self) -> dict[str, Any]:
        """All that the next step depends on, but for what follows from data, settings and seed."""
        device = self._accelerator.device
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        return {
            "learner": tensors_of(self._learner),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": None if self._average is None else self._average.tensors,
            "best": self._best,
            "random": {name: self._accelerator.gather(own[None].to(device)) for name, own in random.items()},
            "epochs": self._epochs,
            "summed": self._summed,
        }

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Go on from `_state`."""
        restore(self._learner, state["learner"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.restore(state["average"])
        self._best, self._epochs, self._summed = state["best"], state["epochs"], state["summed"]
        self._step = state["step"]
        # Copied: torch crashes on a state that does not begin its storage.
        own = {name: table[self._accelerator.process_index].clone() for name, table in state["random"].items()}
        torch.set_rng_state(own["cpu"])
        if "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], self._accelerator.device)

    def _load(self) -> dict[str, Any] | None:
        """What the first process finds, for all."""
        found = [self._checkpoints.load() if self._accelerator.is_main_process else None]
        if self._accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(found)
        return found[0]

    def _save(self, state: Mapping[str, Any]) -> None:
        if self._accelerator.is_main_process:
            self._checkpoints.save(self._step, {"step": self._step, **state})
        self._written = time.monotonic()


def _total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of a learner's terms, float64."""
    return torch.stack([term.double() for term in terms.values()]).sum()


def _split(order: Tensor, batch_size: int) -> list[Tensor]:
    """Batches of at least two samples: BatchNorm has no variance over one, so a lonely last one joins its neighbour."""
    batches: list[Tensor] = list(torch.split(order, max(batch_size, 2)))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _astray(what: str, where: str) -> TrainingError:
    return TrainingError(
        f"training went astray: {what}",
        where=where,
        want="finite numbers",
        fix="lower `learning_rate`, and check the scale of the inputs",
    )
