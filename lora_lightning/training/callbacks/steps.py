"""What is logged and shown of optimizer steps: rates, norms of gradients, speed and memory."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lora_lightning.lora.inject import adapted_layers
from lora_lightning.tasks.base import examples_in, tokens_in
from lora_lightning.training.checkpoints.loop_state import is_between_steps, is_logged, logged_steps
from lora_lightning.training.loss_weighting import is_padding
from lora_lightning.training.strategies.collectives import gather, reduce_number

MIB = 2**20


class StepFigures(Callback):
    """Logs `lr`, `grad_norm/A`, `grad_norm/B` and `grad_norm/all` every `log_every_n_steps`, before clipping.

    `grad_norm/all` is over everything that trains: what `gradient_clip_val` is compared with. `lr` is the first
    group's; other groups, such as B's in LoRA+, are logged as `lr/NAME` where their rate differs.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not trainer.loggers or not (is_logged(trainer) or trainer.should_stop):
            return
        layers, (first, *others) = [layer for _, layer in adapted_layers(pl_module)], optimizer.param_groups
        figures: dict[str, Any] = {"lr": float(first["lr"])}
        for i, group in enumerate(others, 1):
            if any(group.get(key) != first.get(key) for key in ("lr", "initial_lr")):
                figures[f"lr/{group.get('name', f'group_{i}')}"] = float(group["lr"])
        parts = {part: [getattr(layer, f"lora_{part}") for layer in layers] for part in "AB"}
        parts["all"] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, parameters in parts.items():
            if gradients := [p.grad for p in parameters if p.grad is not None]:
                norm = torch.nn.utils.get_total_norm(gradients)
                # Of sharded gradients all processes must gather it.
                figures[f"grad_norm/{name}"] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()
        pl_module.log_dict(figures, batch_size=1)


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
        self._device = torch.device("cpu")
        self._running_since: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew, before a resumed fit's totals are loaded."""
        if stage == "fit":
            vars(self).update(vars(Throughput()), _device=trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        """The fit's totals until now."""
        names = ("samples", "tokens", "seconds")
        return {n: getattr(self, n) + count for n, count in zip(names, self._read_counts(), strict=True)}

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

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
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
        tokens_here = float(torch.as_tensor(self._tokens, device=self._device))  # waits, so that the clock is right
        samples, tokens = map(sum, zip(*gather((self._samples, tokens_here)), strict=True))
        if self._running_since is not None:
            now = time.perf_counter()
            self._seconds, self._running_since = self._seconds + now - self._running_since, now
        return samples, tokens, self._seconds

    def _add_up(self) -> None:
        vars(self).update(self.state_dict(), _samples=0.0, _tokens=0, _seconds=0.0)


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


class Progress(RichProgressBar):
    """Lightning's RichProgressBar (done, time passed, time left, batches per second) with short figures behind it.

    `train/loss_step` is called loss, the version number is left out, and tokens per second are shown where there are
    tokens, else samples per second. Metrics that a module logs with `prog_bar=True` follow under their names.
    """

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:  # type: ignore[override]
        """As text, since Lightning would give all of them three decimals."""
        metrics = dict(super().get_metrics(trainer, pl_module))
        if "train/loss_step" in metrics:
            metrics["loss"] = metrics.pop("train/loss_step")
        first = ["loss", "tokens/s" if "tokens/s" in metrics else "samples/s"]
        names = [*first, *(name for name in metrics if name not in {*first, "v_num", "samples/s"})]
        return {name: _short(metrics[name]) for name in names if name in metrics}


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
