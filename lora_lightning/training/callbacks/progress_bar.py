"""The progress bar: Lightning's, with the loss and one rate, in few characters."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's RichProgressBar (done, time passed, time left, batches per second) with short figures behind it.

    `train/loss_step` is called loss, the version number is left out, and tokens per second are shown where there are
    tokens, else samples per second. Metrics that a module logs with `prog_bar=True` follow under their names.
    """

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:  # type: ignore[override]
        """As text, since Lightning would give all of them three decimals."""
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        rates = {f"{name}/s": metrics.pop(f"{name}/s", None) for name in ("tokens", "samples")}
        shown = {"loss": metrics.pop("train/loss_step", None), **rates}
        if shown["tokens/s"] is not None:
            del shown["samples/s"]
        shown = {name: value for name, value in shown.items() if value is not None}
        return {name: _short(value) for name, value in {**shown, **metrics}.items()}


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
