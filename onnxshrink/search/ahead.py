"""Calibrations that the next trials have in common: done once before them, in shards on all workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from onnxshrink.calibration.parts import Sharding
from onnxshrink.config.data import EntryData
from onnxshrink.config.run import RunConfig
from onnxshrink.config.stages import Calibrate, QuantizeMixed, QuantizeStatic
from onnxshrink.core.artifact import digest_json
from onnxshrink.core.errors import ShrinkError
from onnxshrink.core.importing import search_path
from onnxshrink.core.store import Store
from onnxshrink.search.attempt import Deadline, TimeUp
from onnxshrink.search.workers import is_loss
from onnxshrink.stages.memo import Memo
from onnxshrink.stages.together import is_trained


def calibrate_ahead(configs: Sequence[RunConfig], *, runs: Path, base: Path, sharding: Sharding) -> None:
    """Calibrate the trunks of trials once; else every worker would do so alone, and some of them the same one.

    Nothing is trained here: a trunk that trains is calibrated when a trial has made it, if this machine's store has it.
    What goes wrong is left to the trials to meet and to tell.

    Args:
        configs: Of the trials, one variant each.
        runs: Folder of the store.
        base: The config file's folder, where the user's modules may lie.
        sharding: The workers, none of them at work.
    """
    with search_path(base):
        store = Store(runs / ".store")
        for config in _trunks(configs):
            memo = Memo(store, config.data, config.seed, Deadline(sharding.until), sharding=sharding)
            try:
                if is_trained(config, store):
                    memo.derive(Calibrate(), memo.fold(memo.open(config.model), config.stages)[-1])
            except (ShrinkError, TimeUp, TimeoutError):
                continue
            except Exception as e:
                if not is_loss(e):
                    raise
                return


def uncut(config: RunConfig) -> str | None:
    """Why calibration samples cannot be cut into shards; None where they can."""
    data = config.data.calibration
    if isinstance(data, EntryData):
        return f"{data.entry} gives its samples one after the other: a calibration of them is not cut into shards"
    return None


def _trunks(configs: Sequence[RunConfig]) -> Iterator[RunConfig]:
    """A config for each trunk that is calibrated as it is, without its variants; none whose samples cannot be cut."""
    seen = set()
    for config in configs:
        (tail,) = config.variants.values()
        if not tail or not isinstance(tail[0], QuantizeStatic | QuantizeMixed) or uncut(config):
            continue
        trunk = config.model_copy(update={"variants": {"trunk": ()}})
        key = digest_json(trunk.model_dump(mode="json"))
        if key not in seen:
            seen.add(key)
            yield trunk
