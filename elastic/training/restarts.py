"""Go on from a checkpoint where Lightning would leave out, or repeat, how an epoch ends.

`ModelCheckpoint(every_n_train_steps=…)` writes at an epoch's last batch, before validation: Lightning goes on
with the next epoch's first batch, and neither validates, nor ends that epoch, nor begins the next.
Where steps bound the run, it ends an epoch again that had ended before its checkpoint was written.
"""

from typing import Any

import lightning as L
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.loops.loop import _Loop

from elastic.training.kinds import find_base, is_kind


def reopen_last_batch(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint of an epoch's last batch, in place, go on with the epoch's validation."""
    if "loops" not in checkpoint:  # of weights alone, which Lightning refuses in its own words
        return
    loops = checkpoint["loops"]["fit_loop"]
    batches = loops["epoch_loop.batch_progress"]
    if not batches["is_last_batch"] or batches["total"]["completed"] == batches["total"]["processed"]:
        return
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for part in ("total", "current"):
        batches[part]["completed"] = batches[part]["processed"]
        # As a validation has it that was interrupted in its first batch, which Lightning carries out again.
        validation[part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def end_epoch_once(trainer: L.Trainer) -> None:
    """End an epoch whose batches are trained, and none that has ended; to be called as training starts."""
    loop = trainer.fit_loop
    batches, fetcher = loop.epoch_loop, loop._data_fetcher
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        find_base(loop, _Loop).restarting.fset(loop, False)  # its own setter says True again
        loop.reset_restart_stage()
    elif (
        loop.restarted_mid_epoch
        and batches.batch_progress.is_last_batch
        and is_kind(fetcher, _PrefetchDataFetcher)
        and not batches._should_check_val_fx(fetcher)
    ):  # nothing is left to validate, and no batch to train
        fetcher.batches, fetcher.done = [], True
        batches._batches_that_stepped += 1
