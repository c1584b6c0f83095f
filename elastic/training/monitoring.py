"""Refuse a metric that a run is to watch and that nothing logs, as early as that can be known."""

import lightning as L

from elastic.errors import TrainingError

VALIDATED = ("val/", "val_")  # as metrics of validation begin


def is_validated(metric: str) -> bool:
    """Tell whether a metric is one of validation, by its name."""
    return metric.startswith(VALIDATED)


def check_validation(trainer: L.Trainer, metric: str) -> None:
    """Refuse a run that does not validate once an epoch, where a metric of validation is watched.

    Raises:
        TrainingError: always then.
    """
    if not is_validated(metric):
        return
    if trainer.limit_val_batches == 0:
        raise TrainingError(
            f"growth watches '{metric}', but trainer.limit_val_batches=0 leaves it out: let it run, or watch "
            "a metric of training with callbacks.growth.monitor"
        )
    if not trainer.enable_validation:
        raise TrainingError(
            f"growth watches '{metric}', but nothing is validated: give the fit validation data and the "
            "module a validation_step, or watch a metric of training with monitor"
        )
    if trainer.val_check_interval != 1.0:
        raise TrainingError(
            f"growth looks at '{metric}' once an epoch, validation comes every {trainer.val_check_interval}: "
            "leave trainer.val_check_interval at 1.0"
        )


def check_logged(trainer: L.Trainer, metric: str) -> None:
    """Refuse a metric that is not there when it has to be.

    Raises:
        TrainingError: always then; it names those that are.
    """
    if metric not in trainer.callback_metrics:
        logged = ", ".join(sorted(trainer.callback_metrics)) or "none"
        raise TrainingError(
            f"growth watches '{metric}', which is not logged; there are: {logged}: name one of them, or log "
            "it in training_step with on_epoch=True, or in validation_step"
        )
