"""Guards of a fit: of W0 and of what trains (`FreezeBase`), and of losses and gradients that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lora_lightning.data import table_of
from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.lora.errors import LoRAError, first_few
from lora_lightning.lora.frozen.fingerprint import Fingerprint
from lora_lightning.lora.frozen.tensors import frozen_keys, plain_name
from lora_lightning.lora.inject import adapted_layers, modules_of_kind
from lora_lightning.lora.layers import SavedCopy, TokenRows
from lora_lightning.reports.console import dtype_lines, first_lines, part_dtypes, show_data, show_injection, show_lines
from lora_lightning.tasks.base import tensors_in
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.module import lora_module
from lora_lightning.training.strategies.base import is_sharded, local_shard, moved_tensors, shard_fingerprint
from lora_lightning.training.strategies.collectives import gather, reduce_number


class W0MovedError(LoRAError):
    """A frozen tensor changed in training (law 2)."""


class FreezeBase(Callback):
    """Guards laws 2, 4 and 10 over a fit, prints the injection table, and logs the counts to every logger.

    Args:
        show_table: print at the start the table of adapted modules, the dtype of each part and the backbone's mode.
        proves_at: when W0's fingerprint is compared with that of the start, which takes about 0.5 s per GiB of W0:
            at the fit's end only (`end`), also before a checkpoint is written that is the best so far (`best`), or
            before each (`checkpoint`).
    """

    def __init__(self, show_table: bool = True, proves_at: Literal["end", "best", "checkpoint"] = "best") -> None:
        self.show_table = show_table
        self.proves_at = proves_at
        self._best: object = None
        self.before: Fingerprint | None = None
        self.after: Fingerprint | None = None
        self._before_here: Fingerprint | None = None
        """Of what this process has of W0."""
        self._first_backward_seen = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the optimizers are made, let A, B and the copies of `modules_to_save` train, and nothing else."""
        if stage != "fit":
            return
        backbone = lora_module(pl_module, self).backbone
        frozen = frozen_keys(backbone)
        for name, parameter in backbone.named_parameters(remove_duplicate=False):
            if plain_name(backbone, name) in frozen:
                parameter.requires_grad_(False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the adapter is whole, take the fingerprint, show what trains."""
        module = lora_module(pl_module, self)
        backbone, report = module.backbone, module.report
        present = {layer.lora_name(path) for path, layer in adapted_layers(backbone)}
        present |= {name for name, _ in modules_of_kind(backbone, SavedCopy)}
        present |= {name for name, rows in modules_of_kind(backbone, TokenRows) if rows.lora_tokens.requires_grad}
        wanted = (*[row.module for row in report.modules], *report.saved, *report.tokens)
        if lost := [repr(name) for name in wanted if name not in present]:
            raise LoRAError(
                f"what was to train of {first_few(lost)} is gone: the model was changed after it was adapted, as"
                " resize_token_embeddings does; change it first, then make the LoRAModule"
            )
        self.before = module.w0_fingerprint()
        self._before_here = shard_fingerprint(backbone) if is_sharded(backbone) else self.before
        self._first_backward_seen = False
        if self.show_table and trainer.is_global_zero:
            show_lines(first_lines(trainer, backbone, report, run.run_dir(trainer)), Console())
            show_data(getattr(trainer.datamodule, "data_summary", None), Console())  # type: ignore[attr-defined]
            show_injection(report, Console())
            show_lines(dtype_lines(part_dtypes(backbone, module.backbone_mode, trainer)), Console())
        counts = {"params/trainable": report.trainable, "params/frozen": report.frozen, "params/share": report.share}
        for logger in trainer.loggers:
            logger.log_hyperparams({"lora": module.lora.to_dict(), "w0": self.before.digest, **counts})
            logger.log_metrics({name: float(value) for name, value in counts.items()}, step=0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Law 10: the optimizers hold exactly what trains."""
        check_optimizers(trainer.optimizers, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Law 4: after the first backward every adapter has a finite gradient."""
        if not self._first_backward_seen:
            self._first_backward_seen = True
            check_gradients(pl_module, finite=not _has_scaler(trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Law 2 before a checkpoint is written: where W0 has moved, the earlier file stays."""
        if trainer.state.fn != TrainerFn.FITTING or self.before is None or self.proves_at == "end":
            return
        monitors = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
        scores = [(c.best_model_path, c.best_model_score) for c in monitors]
        best, self._best = self._best, scores
        if self.proves_at == "checkpoint" or best != scores:
            self._prove(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Law 2: W0 has the fingerprint that it started with, in every process."""
        self._prove(pl_module)

    def _prove(self, pl_module: LightningModule) -> None:
        """W0 is unchanged if every process's part of it is."""
        assert self._before_here is not None
        changed = moved_tensors(self._before_here, shard_fingerprint(lora_module(pl_module, self).backbone))
        self.after = None if changed else self.before
        if changed:
            raise W0MovedError(
                f"W0 moved during fit: {len(changed)} frozen tensors changed, first '{changed[0]}';"
                " something wrote into the backbone, so merging would not give the trained model"
            )


def _has_scaler(trainer: Trainer) -> bool:
    """Whether gradients may overflow: a loss scaler starts too high on purpose, and skips the steps that do."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def check_optimizers(optimizers: Sequence[Optimizer], module: nn.Module) -> None:
    """Raise unless the optimizers have all trainable parameters and no others."""
    optimized = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in optimized]
    surplus = [name for name, p in module.named_parameters() if not p.requires_grad and id(p) in optimized]
    if missing:
        raise LoRAError(f"the optimizer lacks {len(missing)} parameters that train, first '{missing[0]}'")
    if surplus:
        raise LoRAError(f"the optimizer holds {len(surplus)} frozen parameters, first '{surplus[0]}'")


def check_gradients(module: nn.Module, *, finite: bool = True) -> None:
    """Raise where a trainable parameter got no gradient, or with `finite` one that is not finite."""
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    without = [name for name, grad in gradients.items() if grad is None]
    reached = {name: local_shard(grad) for name, grad in gradients.items() if grad is not None}
    # FSDP2 gives zeros to what no process's backward reached. A is left out: its gradient is zero while B is.
    sharded = [n for n, grad in gradients.items() if isinstance(grad, DTensor) and not n.endswith("lora_A")]
    if sharded and not without:
        zero = set.intersection(*gather({name for name in sharded if not reached[name].any()}))
        without = sorted(zero) if len(zero) < len(sharded) else []  # a batch of no units gives zeros to all
    if without:
        raise LoRAError(
            f"{len(without)} of {len(gradients)} trainable tensors got no gradient in the first backward: the model's"
            f" forward goes past them. {', '.join(without[:6])}: exclude these modules"
        )
    infinite = [name for name, grad in reached.items() if not torch.isfinite(grad).all()]
    if finite and infinite:
        raise LoRAError(f"the first gradient of {len(infinite)} tensors is not finite: {', '.join(infinite[:6])}")


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

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._batch = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check with one transfer from the device; the error names step, batches, rows and the first bad layer."""
        named = [(name, local_shard(p.grad)) for name, p in pl_module.named_parameters() if p.grad is not None]
        if _has_scaler(trainer):
            named = []
        norm = nn.utils.get_total_norm([grad for _, grad in named])
        values = torch.stack([x.float().to(pl_module.device) for x in (*self._losses, norm)])
        finite = values.isfinite().tolist()
        losses_are_bad, is_bad = not all(finite[:-1]), not all(finite)
        if not reduce_number(trainer, is_bad, "max"):  # all stop at the same step, also where gradients are sharded
            return
        last = trainer.fit_loop.epoch_loop.batch_idx
        first = last - len(self._losses) + 1
        batches = [first + i for i, is_fine in enumerate(finite[:-1]) if not is_fine] or list(range(first, last + 1))
        what = f"{'loss' if losses_are_bad else 'gradient'} of optimizer step {trainer.global_step + 1}"
        clauses = [f"the {what} is not finite: epoch {trainer.current_epoch}, batch {', '.join(map(str, batches))}"]
        if rows := [row for batch in batches for row in rows_of(trainer, batch)]:
            shown = ", ".join(map(str, rows[:32])) + (", ..." if len(rows) > 32 else "")
            clauses.append(f"rows {shown} of the training set, as its file counts them")
        wrong = [name for name, grad in named if not torch.isfinite(torch.linalg.vector_norm(grad))]
        # In every process: a forward may need them all.
        layer = first_bad_layer(pl_module, self._batch) if last in batches or trainer.world_size > 1 else None
        if layer:
            clauses.append(f"the first layer whose output is not finite is '{layer}'")
        elif wrong:
            clauses.append(f"{len(wrong)} gradients are not finite, the nearest to the loss is that of '{wrong[-1]}'")
        saved = getattr(trainer.checkpoint_callback, "last_model_path", "")
        good = f"and '{saved}' is good" if saved else "and nothing is saved yet"
        clauses.append(f"nothing was updated, {good}: lower the learning rate, clip gradients, or look at these rows")
        # The process with the bad loss knows its rows.
        raise NotFiniteError(max(gather((losses_are_bad, is_bad, "; ".join(clauses))))[-1])


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

    The batch goes through once more, without gradients and with new dropout. None for a sharded backbone: all
    processes would have to run it, and only some failed.
    """
    backbone, task = getattr(module, "backbone", None), getattr(module, "task", None)
    if not isinstance(backbone, nn.Module) or task is None or batch is None or is_sharded(backbone):
        return None
    names = {layer: name for name, layer in backbone.named_modules() if name}
    bad_layers: list[str] = []

    def look(layer: nn.Module, _: Any, output: Any) -> None:
        if not all(bool(torch.isfinite(t).all()) for t in tensors_in(output)):
            bad_layers.append(names[layer])

    hooks = [layer.register_forward_hook(look) for layer in names]
    with suppress(Exception), torch.no_grad(), module.trainer.precision_plugin.forward_context():
        task.step(backbone, batch)  # the fit stops with its first error anyway
    for hook in hooks:
        hook.remove()
    return bad_layers[0] if bad_layers else None
