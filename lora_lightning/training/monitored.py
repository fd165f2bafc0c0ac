"""A metric that something waits for and nothing will log, found before a fit begins."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.training.module import LoRAModule

OF_THE_RUN = re.compile(r"epoch|step|train/loss_step|lr(/.+)?|grad_norm/.+|(samples|tokens)/s|(throughput|memory)/.+")
"""What callbacks that are always there log, and Lightning itself."""
OF_A_FURTHER_SET = re.compile(r"val_[^/]+/.+")
"""Sets beside the first are known only once the data are read."""


def refuse_unlogged(trainer: Trainer, module: LoRAModule, plateau: str | None = None) -> None:
    """Compare what callbacks and a schedule monitor with what the task logs.

    Args:
        plateau: the metric of a ReduceLROnPlateau.

    Raises:
        LoRAError: a metric that nothing can log. Where code of the user's own may log it, it is a warning.
    """
    for who, monitor in _monitored(trainer, plateau):
        if (near := unlogged(monitor, module)) is None:
            continue
        if own := _may_log(trainer, module):
            rank_zero_warn(f"{who} monitors '{monitor}', which is not logged, unless {own} does{near}")
        else:
            raise LoRAError(f"{who} monitors '{monitor}', which is not logged{near}")


def unlogged(metric: str, module: LoRAModule) -> str | None:
    """None where the task, the run or a further set logs it; else what is meant or there, to end an error."""
    known = [name for stage in ("val", "train") for name in module.task.logged(stage)]
    if metric in known or OF_THE_RUN.fullmatch(metric) or OF_A_FURTHER_SET.fullmatch(metric):
        return None
    return f"{did_you_mean(metric, known)} (logged are {', '.join(known)})"


def _monitored(trainer: Trainer, plateau: str | None) -> Iterator[tuple[str, str]]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        waits = isinstance(callback, ModelCheckpoint) and callback.save_top_k != 0
        waits = waits or (isinstance(callback, EarlyStopping) and callback.strict)
        if waits and callback.monitor not in (None, "auto"):
            yield type(callback).__name__, callback.monitor
    if plateau is not None:
        yield "ReduceLROnPlateau", plateau


def _may_log(trainer: Trainer, module: LoRAModule) -> str | None:
    """Whose metrics are not known from here: a module's, a task's with figures of its own, a callback's of others."""
    foreign = (c for c in trainer.callbacks if isinstance(c, LearningRateMonitor) or not _is_known(c))  # type: ignore[attr-defined]
    return figures_of_its_own(module) or next((type(callback).__name__ for callback in foreign), None)


def figures_of_its_own(module: LoRAModule) -> str | None:
    """The class of the user's own, module or task, that may log what is not known from here."""
    for one, where in ((module, type(module).__module__), (module.task, type(module.task).update.__module__)):
        if not _is_ours(where):
            return type(one).__name__
    return None


def _is_known(callback: Callback) -> bool:
    module = type(callback).__module__
    return _is_ours(module) or module.startswith("lightning.pytorch.")


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "lora_lightning"
