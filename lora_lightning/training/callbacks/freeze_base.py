"""Freezes W0, proves that it has not moved, and shows and logs what trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lora_lightning.lora.errors import LoRAError, first_few
from lora_lightning.lora.frozen.fingerprint import Fingerprint
from lora_lightning.lora.frozen.tensors import frozen_keys, plain_name
from lora_lightning.lora.inject import adapted_layers, grafted_modules
from lora_lightning.lora.layers import SavedCopy, TokenRows
from lora_lightning.lora.report import InjectionReport
from lora_lightning.reports.console import dtype_lines, first_lines, part_dtypes, show_data, show_injection, show_lines
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.module import lora_module
from lora_lightning.training.strategies.base import is_sharded, local_shard, moved_tensors, shard_fingerprint
from lora_lightning.training.strategies.collectives import gather


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
        self._own_before: Fingerprint | None = None
        """The fingerprint at the start of what this process has of W0."""
        self._first_backward_seen = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze before the optimizers are made."""
        if stage == "fit":
            freeze(lora_module(pl_module, self).backbone)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the adapter is whole, take the fingerprint, show what trains."""
        module = lora_module(pl_module, self)
        refuse_lost(module.report, module.backbone)
        self.before = module.w0_fingerprint()
        self._own_before = shard_fingerprint(module.backbone) if is_sharded(module.backbone) else self.before
        self._first_backward_seen = False
        report = module.report
        if self.show_table and trainer.is_global_zero:
            show_lines(first_lines(trainer, module.backbone, report, run.run_dir(trainer)), Console())
            show_data(getattr(trainer.datamodule, "data_summary", None), Console())  # type: ignore[attr-defined]
            show_injection(report, Console())
            show_lines(dtype_lines(part_dtypes(module.backbone, module.backbone_mode, trainer)), Console())
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
            # A loss scaler starts too high on purpose, and lowers its scale with each step that overflows.
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            check_gradients(pl_module, finite=not scaled)

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
        assert self._own_before is not None
        changed = moved_tensors(self._own_before, shard_fingerprint(lora_module(pl_module, self).backbone))
        self.after = None if changed else self.before
        if changed:
            raise W0MovedError(
                f"W0 moved during fit: {len(changed)} frozen tensors changed, first '{changed[0]}';"
                " something wrote into the backbone, so merging would not give the trained model"
            )


def freeze(backbone: nn.Module) -> None:
    """Let A, B and the copies of `modules_to_save` train, and nothing else."""
    frozen = frozen_keys(backbone)
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        if plain_name(backbone, name) in frozen:
            parameter.requires_grad_(False)


def refuse_lost(report: InjectionReport, backbone: nn.Module) -> None:
    """Raise where an injected adapter is gone, or token rows no longer train."""
    present = {layer.lora_name(path) for path, layer in adapted_layers(backbone)}
    present |= {name for name, _ in grafted_modules(backbone, SavedCopy)}
    present |= {name for name, rows in grafted_modules(backbone, TokenRows) if rows.lora_tokens.requires_grad}
    lost = [n for n in (*[row.module for row in report.modules], *report.saved, *report.tokens) if n not in present]
    if lost:
        raise LoRAError(
            f"what was to train of {first_few([repr(name) for name in lost])} is gone: the model was changed after it"
            " was adapted, as resize_token_embeddings does; change it first, then make the LoRAModule"
        )


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
    """Raise where a trainable parameter got no gradient or one that is not finite.

    Args:
        finite: also require finite gradients.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    without = [name for name, p in trainable if p.grad is None] or _missed_shards(trainable)
    if without:
        raise LoRAError(
            f"{len(without)} of {len(trainable)} trainable tensors got no gradient in the first backward: the model's"
            f" forward goes past them. {', '.join(without[:6])}: exclude these modules"
        )
    infinite = [name for name, p in trainable if p.grad is not None and not torch.isfinite(local_shard(p.grad)).all()]
    if finite and infinite:
        raise LoRAError(f"the first gradient of {len(infinite)} tensors is not finite: {', '.join(infinite[:6])}")


def _missed_shards(trainable: list[tuple[str, nn.Parameter]]) -> list[str]:
    """Sharded tensors that no process's backward reached: FSDP2 gives them zeros.

    A is left out: while B is zero its gradient is zero too.
    """
    sharded = [(name, p) for name, p in trainable if isinstance(p.grad, DTensor) and not name.endswith("lora_A")]
    if not sharded:
        return []
    zero = {name for name, p in sharded if p.grad is not None and not local_shard(p.grad).any()}
    everywhere = set.intersection(*gather(zero))
    return [] if len(everywhere) == len(sharded) else sorted(everywhere)  # a batch of no units gives zeros to all
