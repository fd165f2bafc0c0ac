"""Stops a fit before a loss or gradient that is not finite reaches a weight, and says where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.data import table_of
from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import tensors_in
from lora_lightning.training.strategies.base import is_sharded, local_shard
from lora_lightning.training.strategies.collectives import gather, reduce_number


class NotFiniteError(LoRAError):
    """A loss or a gradient became infinite or NaN."""


class StopOnNonFinite(Callback):
    """Checks the loss and the norm of all gradients in each optimizer step, before the optimizer uses them.

    Weights, optimizer and checkpoints stay those of the last good step. With a loss scaler, which skips steps whose
    gradients overflow, only the loss is checked.
    """

    def __init__(self) -> None:
        self._batch: Any = None
        self._losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._losses = []
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check with one transfer from the device.

        Raises:
            NotFiniteError: with the step, the batches' rows where they are known, and the first bad layer.
        """
        named = [(name, local_shard(p.grad)) for name, p in pl_module.named_parameters() if p.grad is not None]
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            named = []
        norm = nn.utils.get_total_norm([grad for _, grad in named])
        values = torch.stack([x.float().to(pl_module.device) for x in (*self._losses, norm)])
        finite = values.isfinite().tolist()
        losses_are_bad, is_bad = not all(finite[:-1]), not all(finite)
        if not reduce_number(trainer, is_bad, "max"):  # all stop at the same step, also where gradients are sharded
            return
        wrong = [name for name, grad in named if not torch.isfinite(torch.linalg.vector_norm(grad))]
        message = self._message(trainer, pl_module, wrong)  # in every process: a forward may need them all
        # The process with the bad loss knows its rows.
        raise NotFiniteError(max(gather((losses_are_bad, is_bad, message)))[-1])

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._batch = None

    def _message(self, trainer: Trainer, module: LightningModule, bad: Sequence[str]) -> str:
        losses = [bool(torch.isfinite(loss)) for loss in self._losses]
        last = trainer.fit_loop.epoch_loop.batch_idx
        first = last - len(losses) + 1
        batches = [first + i for i, fine in enumerate(losses) if not fine] or list(range(first, last + 1))
        what = f"{'gradient' if all(losses) else 'loss'} of optimizer step {trainer.global_step + 1}"
        clauses = [f"the {what} is not finite: epoch {trainer.current_epoch}, batch {', '.join(map(str, batches))}"]
        if rows := [row for batch in batches for row in rows_of(trainer, batch)]:
            shown = ", ".join(map(str, rows[:32])) + (", ..." if len(rows) > 32 else "")
            clauses.append(f"rows {shown} of the training set, as its file counts them")
        layer = first_bad_layer(module, self._batch) if last in batches or trainer.world_size > 1 else None
        if layer:
            clauses.append(f"the first layer whose output is not finite is '{layer}'")
        elif bad:
            clauses.append(f"{len(bad)} gradients are not finite, the nearest to the loss is that of '{bad[-1]}'")
        saved = getattr(trainer.checkpoint_callback, "last_model_path", "")
        good = f"and '{saved}' is good" if saved else "and nothing is saved yet"
        clauses.append(f"nothing was updated, {good}: lower the learning rate, clip gradients, or look at these rows")
        return "; ".join(clauses)


def rows_of(trainer: Trainer, batch_idx: int) -> list[int]:
    """Row numbers, in their file, of this process's batch `batch_idx` of this epoch; empty where unknown."""
    from lora_lightning.data.io.tables import ROW

    data = table_of(trainer.datamodule)  # type: ignore[attr-defined]
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    if data is None or not isinstance(sampler, EpochSampler):
        return []
    table = data.tables["train"]
    if len(table) != sampler.count or ROW not in table.column_names:  # cut or packed: not the rows of the file
        return []
    size = sampler.block // sampler.num_replicas
    positions = sampler.order()[sampler.rank :: sampler.num_replicas][batch_idx * size : (batch_idx + 1) * size]
    numbers = table[ROW]
    return [numbers[i] for i in positions]


def first_bad_layer(module: LightningModule, batch: Any) -> str | None:
    """The first module, in the order of the forward, whose output is not finite on a batch that failed.

    The batch goes through once more, without gradients and with new dropout.
    """
    backbone, task = getattr(module, "backbone", None), getattr(module, "task", None)
    if not isinstance(backbone, nn.Module) or task is None or batch is None:
        return None
    if is_sharded(backbone):  # all processes would have to run it, and only some failed
        return None
    bad_layers: list[str] = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not bad_layers and any(not bool(torch.isfinite(t).all()) for t in tensors_in(output)):
                bad_layers.append(name)

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in backbone.named_modules() if name]
    try:
        with torch.no_grad(), module.trainer.precision_plugin.forward_context():
            task.step(backbone, batch)
    except Exception:  # the fit stops with its first error anyway
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return bad_layers[0] if bad_layers else None
