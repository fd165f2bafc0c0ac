"""How fast a fit goes, and how much memory it takes at most."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lora_lightning.tasks.base import examples_in, tokens_in
from lora_lightning.training.checkpoints.loop_state import is_between_steps, is_logged, logged_steps
from lora_lightning.training.loss_weighting import is_padding
from lora_lightning.training.strategies.collectives import gather, reduce_number

MIB = 2**20


class Throughput(Callback):
    """Examples and tokens per second of all processes together, and the peak of memory, every `log_every_n_steps`.

    The time is that of training and of waiting for batches since the last log row, without validations and what happens
    between epochs. Tokens are those of `attention_mask`, without padding. Logged are
    `throughput/samples_per_second`, `throughput/tokens_per_second` and, in MiB and of the process that takes most,
    `memory/cuda_peak_mib` or `memory/process_peak_mib` (the process's peak, the model included).
    The progress bar shows the newest figure, at first after 1, 2, 4, ... steps.
    """

    def __init__(self) -> None:
        self.samples = self.tokens = self.seconds = self.peak_mib = 0.0
        """Totals of the fit up to the last log row."""
        self._samples = self._seconds = 0.0
        """Of this process since then."""
        self._tokens: Tensor | int = 0
        self._running_since: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew, before a resumed fit's totals are loaded."""
        if stage == "fit":
            vars(self).update(vars(Throughput()))

    def state_dict(self) -> dict[str, Any]:
        return self._totals()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batch, unless it is padding that gives all processes equally many."""
        if self._running_since is None:
            self._running_since = time.perf_counter()
        if not is_padding(trainer, batch_idx):
            self._samples += getattr(getattr(pl_module, "task", None), "examples", examples_in)(batch)
            if (tokens := tokens_in(batch)) is not None:
                self._tokens = self._tokens + tokens

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_between_steps(trainer):
            return
        step, logged = logged_steps(trainer) + 1, is_logged(trainer)
        if logged or (step & (step - 1) == 0 and step < trainer.log_every_n_steps):  # type: ignore[attr-defined]
            samples, tokens, seconds = self._read_counts()
            rates = {"samples": samples / seconds} | ({"tokens": tokens / seconds} if tokens else {})
            shown = {f"{name}/s": rate for name, rate in rates.items()}
            pl_module.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
            if logged:
                figures = {f"throughput/{name}_per_second": rate for name, rate in rates.items()}
                kind = "cuda" if pl_module.device.type == "cuda" else "process"
                figures[f"memory/{kind}_peak_mib"] = reduce_number(trainer, peak_mib(pl_module.device), "max")
                pl_module.log_dict(figures, batch_size=1)
                self._add_up()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next training batch."""
        if self._running_since is not None:
            self._seconds += time.perf_counter() - self._running_since
            self._running_since = None

    on_train_epoch_end = on_validation_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what came after the last log row to the totals."""
        self.on_validation_start(trainer, pl_module)
        self._add_up()
        self.peak_mib = reduce_number(trainer, peak_mib(pl_module.device), "max")

    def _read_counts(self) -> tuple[float, float, float]:
        """Samples and tokens over all processes, and seconds, since the last log row."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # so that the clock is right
        samples, tokens = map(sum, zip(*gather((self._samples, float(self._tokens))), strict=True))
        if self._running_since is not None:
            now = time.perf_counter()
            self._seconds, self._running_since = self._seconds + now - self._running_since, now
        return samples, tokens, self._seconds

    def _totals(self) -> dict[str, float]:
        """Those of the fit until now."""
        names = ("samples", "tokens", "seconds")
        return {n: getattr(self, n) + count for n, count in zip(names, self._read_counts(), strict=True)}

    def _add_up(self) -> None:
        vars(self).update(self._totals())
        self._samples, self._tokens, self._seconds = 0.0, 0, 0.0


def peak_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    try:
        import resource
    except ImportError:  # on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak * 1024 / MIB  # Linux counts in KiB
