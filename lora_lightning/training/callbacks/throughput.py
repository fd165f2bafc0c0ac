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
from lora_lightning.training.strategies.collectives import reduce_number

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
        self.samples = self.tokens = 0.0
        """Totals of the fit up to the last log row."""
        self.seconds = 0.0
        self.peak_mib = 0.0
        self._begin()
        self._running_since: float | None = None

    def _begin(self) -> None:
        self._samples, self._seconds = 0, 0.0
        self._tokens: Tensor | int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("samples", "tokens", "seconds"):
            setattr(self, name, float(state_dict[name]))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.samples = self.tokens = self.seconds = self.peak_mib = 0.0
        self._begin()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batch, unless it is padding that gives all processes equally many."""
        if self._running_since is None:
            self._running_since = time.perf_counter()
        if is_padding(trainer, batch_idx):
            return
        examples = getattr(getattr(pl_module, "task", None), "examples", examples_in)
        self._samples += examples(batch)
        tokens = tokens_in(batch)
        if tokens is not None:
            self._tokens = tokens + (0 if self._tokens is None else self._tokens)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_between_steps(trainer):
            return
        step, logged = logged_steps(trainer) + 1, is_logged(trainer)
        if logged or (step & (step - 1) == 0 and step < trainer.log_every_n_steps):  # type: ignore[attr-defined]
            self._log_rates(trainer, pl_module, logged)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what came after the last log row to the totals."""
        self._pause()
        self._add_up(*self._read_counts(trainer, pl_module))
        self.peak_mib = reduce_number(trainer, peak_mib(pl_module.device), "max")

    def _pause(self) -> None:
        """Stop the clock until the next batch."""
        if self._running_since is not None:
            self._seconds += time.perf_counter() - self._running_since
            self._running_since = None

    def _log_rates(self, trainer: Trainer, module: LightningModule, logged: bool) -> None:
        samples, tokens, seconds = self._read_counts(trainer, module)
        rates = {"samples": samples / seconds} | ({"tokens": tokens / seconds} if tokens else {})
        module.log_dict({f"{name}/s": x for name, x in rates.items()}, prog_bar=True, logger=False, batch_size=1)
        if logged:
            figures = {f"throughput/{name}_per_second": x for name, x in rates.items()}
            kind = "cuda" if module.device.type == "cuda" else "process"
            figures[f"memory/{kind}_peak_mib"] = reduce_number(trainer, peak_mib(module.device), "max")
            module.log_dict(figures, batch_size=1)
            self._add_up(samples, tokens, seconds)

    def _read_counts(self, trainer: Trainer, module: LightningModule) -> tuple[float, float, float]:
        """Samples and tokens over all processes, and seconds, since the last log row."""
        totals = torch.zeros(2, dtype=torch.float64 if module.device.type != "mps" else None, device=module.device)
        totals[0] = self._samples
        if self._tokens is not None:
            totals[1] = self._tokens
        if trainer.world_size > 1:
            totals = trainer.strategy.reduce(totals, reduce_op="sum")
        samples, tokens = totals.tolist()  # waits for the device, so the clock is right
        if self._running_since is not None:
            now = time.perf_counter()
            self._seconds, self._running_since = self._seconds + now - self._running_since, now
        return samples, tokens, self._seconds

    def _add_up(self, samples: float, tokens: float, seconds: float) -> None:
        self.samples, self.tokens, self.seconds = self.samples + samples, self.tokens + tokens, self.seconds + seconds
        self._begin()


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
