"""`LoRAModule`: any backbone, adapted, as a LightningModule whose checkpoints hold the adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.data import stage_of
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError, LoRAError, refuse_removed
from lora_lightning.lora.formats.provenance import refuse_other_base
from lora_lightning.lora.frozen.fingerprint import Fingerprint
from lora_lightning.lora.frozen.tensors import plain_name
from lora_lightning.lora.inject import adapted_layers, modules_of_kind
from lora_lightning.lora.layers import SavedCopy
from lora_lightning.lora.meta.empty_model import fill_from_files, inject_anywhere
from lora_lightning.tasks.base import Stage, StepOutput, Task
from lora_lightning.tasks.positions import refuse_long_rows, refuse_too_long
from lora_lightning.training import initialization
from lora_lightning.training.activations import TrainingForward
from lora_lightning.training.checkpoints import adapter_state
from lora_lightning.training.checkpoints.resume import Resume
from lora_lightning.training.loss_weighting import UnitMean, is_padding
from lora_lightning.training.optim import make_optimizer, schedule_entry
from lora_lightning.training.precision import BaseWord, convert, precision_of, trainer_of
from lora_lightning.training.strategies.base import ShardedStrategy, fingerprint, is_sharded


def lora_module(module: LightningModule, user: object) -> LoRAModule:
    """The module; raises where it is no LoRAModule, which `user`, such as a callback, takes alone."""
    if not isinstance(module, LoRAModule):
        raise LoRAError(f"{type(user).__name__} takes a LoRAModule, got {type(module).__name__}")
    return module


class LoRAModule(LightningModule):
    """Injects LoRA into `backbone` and trains it on `task`; W0 does not change.

    Args:
        backbone: any `nn.Module`. From YAML by `class_path`: a class, or a function that returns one such as
            `lora_lightning.huggingface`.
        task: computes loss, metrics and predictions.
        lora: what to adapt and how.
        optimizer: called with the trainable parameters alone, in groups; vectors such as biases get no weight decay.
        b_lr_ratio: B's learning rate over A's; LoRA+ takes about 16 (arXiv 2402.12354).
        lr_scheduler: `lora_lightning.WarmupDecay`, which gets the number of steps from the trainer, or one of torch's.
        lr_interval: whether other schedulers step once per optimizer `step` or once per `epoch`.
        backbone_mode: `eval` turns the backbone's dropout off while the adapter trains (LoRA's dropout stays on);
            `train` turns it on. Batch statistics belong to W0 and are frozen in both.
        allow_other_base: accept a checkpoint or an adapter that was trained on another W0.
        init_adapter: an earlier run whose adapter this one starts from: a PEFT directory, a run folder or a checkpoint.
            It is read when a fit starts, not when one is resumed. A head of `modules_to_save` that is missing there or
            has another shape keeps its fresh values; everything else must fit.
        activation_checkpointing: store only the inputs of the backbone's repeated blocks, and recompute their
            activations in backward: one more forward saves most of the activation memory.
        offload_activations: on a GPU, keep saved activations in CPU memory until backward.
        compile: `torch.compile` the backbone in training steps; or its options, such as `{mode: max-autotune}`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        task: Task,
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008  (frozen)
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["step", "epoch"] = "step",
        b_lr_ratio: float = 1.0,
        backbone_mode: Literal["eval", "train"] = "eval",
        allow_other_base: bool = False,
        init_adapter: str | None = None,
        activation_checkpointing: bool = False,
        offload_activations: bool = False,
        compile: bool | dict[str, Any] = False,
        **removed: Any,
    ) -> None:
        refuse_removed("LoRAModule", removed)
        super().__init__()
        self.backbone = backbone
        self.task = task
        self.lora = lora
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval
        self.b_lr_ratio = b_lr_ratio
        self.backbone_mode = backbone_mode
        self.allow_other_base, self.init_adapter = allow_other_base, init_adapter
        if init_adapter is not None and lora.init in initialization.MEASURED:
            raise LoRAError(f"init_adapter and lora.init={lora.init} are two starts: leave one of them out")
        # An init that is measured on data waits for `on_train_start`; a checkpoint brings its factors.
        self.report = inject_anywhere(backbone, lora, run_init=lora.init not in initialization.MEASURED)
        self.training_forward = TrainingForward(
            backbone, checkpointing=activation_checkpointing, offload=offload_activations, compile=compile
        )
        initialization.warn_of_frozen_new_head(backbone)
        self._w0: Fingerprint | None = None
        self._mean = UnitMean()
        self._checked_stages: set[Stage] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted backbone's output."""
        return self.backbone(*args, **kwargs)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        with self.training_forward.on():
            if is_padding(self.trainer, batch_idx):
                zero_loss = self.task.step(self.backbone, batch).loss * 0
                return self._mean.weigh(self.trainer, zero_loss, 0, batch_idx)
            out = self._step("train", batch)
        return self._mean.weigh(self.trainer, out.loss, out.weight, batch_idx)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """The task's outputs, for callbacks."""
        return self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """The task's outputs, for callbacks."""
        return self._evaluate("test", batch, dataloader_idx)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Mapping[str, Any]:
        refuse_too_long(self.backbone, batch)
        return self.task.predict(self.backbone, batch)

    def _evaluate(self, stage: Stage, batch: Mapping[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Each loader is counted by a stage of its own; the first of several is monitored."""
        stage = stage_of(self.trainer.datamodule, stage, dataloader_idx)  # type: ignore[attr-defined]
        if stage not in self.task.stages(stage):
            self.task.add_stage(stage)
            self._metric_attributes = None  # Lightning caches the metrics that it finds
        return vars(self._step(stage, batch))

    def _step(self, stage: Stage, batch: Mapping[str, Any]) -> StepOutput:
        if stage not in self._checked_stages:
            self._checked_stages.add(stage)
            self.task.check(batch)
        refuse_too_long(self.backbone, batch)
        out = (self.task.step if stage == "train" else self.task.evaluate)(self.backbone, batch)
        metrics = self.task.update(stage, out)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1, add_dataloader_idx=False)
        return out

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Law 9: turn the gradients into those of the mean over all units before anything else reads them."""

        def closure() -> Any:
            assert optimizer_closure is not None
            result = optimizer_closure()  # forward and backward of the step's last batch
            self._mean.finish(self.trainer, optimizer)
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the loss that this step lowers."""
        if self._mean.mean is not None:
            self.log("train/loss_step", self._mean.mean, on_step=True, on_epoch=False, prog_bar=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        """The optimizer over exactly the trainable parameters (law 10), and the schedule."""
        optimizer = make_optimizer(self, self.optimizer, self.b_lr_ratio)  # type: ignore[arg-type]
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        entry = schedule_entry(
            scheduler, self.lr_interval, self.task, lambda: self.trainer.estimated_stepping_batches, self.b_lr_ratio
        )
        return {"optimizer": optimizer, "lr_scheduler": entry}

    def configure_model(self) -> None:
        """Shard the backbone where the strategy does so, and fill one that was built on the meta device.

        Lightning calls this before each of its loops, and where a checkpoint is loaded without a trainer.
        """
        strategy = getattr(trainer_of(self), "strategy", None)
        if isinstance(strategy, ShardedStrategy) and not is_sharded(self.backbone):
            if self.trainer.state.fn == TrainerFn.FITTING:
                self._start_from_adapter()
            strategy.shard_module(self)
        fill_from_files(self.backbone, self.device)

    def _start_from_adapter(self) -> None:
        if self.init_adapter is not None and self.trainer.ckpt_path is None:
            warm_start = initialization.start_from_adapter(
                self.backbone, self.init_adapter, self.lora, allow_other_base=self.allow_other_base
            )
            rank_zero_info(f"init_adapter {self.init_adapter}: {warm_start}")

    def on_fit_start(self) -> None:
        if not is_sharded(self.backbone):
            self._start_from_adapter()
            initialization.share_subtracted_init(self.backbone, self.trainer)
        self.set_modes()

    def on_train_start(self) -> None:
        """Compute an init that is measured on data, unless this fit resumes from a checkpoint."""
        if self.lora.init in initialization.MEASURED and self.trainer.ckpt_path is None:
            initialization.start_from_batches(self.backbone, self.task, self.lora.init, self.trainer)
            self.set_modes()

    def on_train_epoch_start(self) -> None:
        self.task.reset("train")

    def on_validation_epoch_start(self) -> None:
        for stage in self.task.stages("val"):
            self.task.reset(stage)

    def on_test_epoch_start(self) -> None:
        for stage in self.task.stages("test"):
            self.task.reset(stage)

    def set_modes(self) -> None:
        """Put the backbone into `backbone_mode` and the adapter into train mode."""
        self.backbone.train(self.backbone_mode == "train")
        for _, layer in adapted_layers(self.backbone):
            if layer.lora_dropout is not None:
                layer.lora_dropout.train()
        for _, saved in modules_of_kind(self.backbone, SavedCopy):
            saved.lora_copy.train()

    def setup(self, stage: str) -> None:
        """Cast W0 to the precision's dtype, and forget its fingerprint from before."""
        self._w0 = None
        if (trainer := trainer_of(self)) is not None:
            refuse_long_rows(self.backbone, trainer.datamodule)  # type: ignore[attr-defined]
            convert(self, trainer.precision_plugin)

    def w0_fingerprint(self) -> Fingerprint:
        """The frozen backbone's fingerprint, computed on first use: law 2 says that it does not change in a fit."""
        if self._w0 is None:
            self._w0 = fingerprint(self.backbone)
        return self._w0

    def _in_fit(self) -> bool:
        """Whether a fit is running: then W0 is unchanged since its start (law 2)."""
        trainer = trainer_of(self)
        running = (TrainerFn.FITTING, TrainerStatus.RUNNING)
        return trainer is not None and (trainer.state.fn, trainer.state.status) == running

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter's tensors and plain settings; leave W0 out."""
        checkpoint["state_dict"] = adapter_state.adapter_only(self, checkpoint["state_dict"])
        base = self.w0_fingerprint() if self._in_fit() else fingerprint(self.backbone)
        fields = {"config": self.lora.to_dict(), "base": base.to_json(), "precision": precision_of(self)}
        checkpoint[adapter_state.CHECKPOINT_KEY] = fields

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another adapter or of another W0 before anything is loaded."""
        adapter_state.refuse_damaged_fields(checkpoint, resumes=self._in_fit())
        adapter_state.refuse_other_config(checkpoint, self.lora)
        if self._in_fit() and not any(isinstance(c, Resume) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_warn(
                "this fit has no callback Resume, so it goes on from the checkpoint, and not bit for bit as if it had"
                " not been interrupted: dropout and shuffling draw other numbers"
            )
        fields, self._w0 = checkpoint[adapter_state.CHECKPOINT_KEY], fingerprint(self.backbone)
        made_on = Fingerprint.from_json(fields["base"])
        try:
            refuse_other_base(made_on, self._w0, allow_other_base=self.allow_other_base)
        except AdapterError as error:
            then, now = fields.get("precision"), precision_of(self)
            if then == now or not {then, now} & set(get_args(BaseWord)):
                raise
            here = "" if now is None else f", and this run is in {now}"
            raise AdapterError(f"{error}. It was trained in precision {then}{here}") from error

    def load_trained(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Load a checkpoint outside of a fit, over W0 in the trainer's precision, which its fingerprint is of."""
        convert(self, trainer.precision_plugin)
        self.configure_model()
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint's tensors; only frozen keys may be missing.

        Raises:
            AdapterError: a list of keys that are missing, left over or wrongly shaped.
        """
        current = self.state_dict()
        if strict:
            adapter_state.refuse_other_tensors(self, current, state_dict)
        keys = {plain_name(self, key): key for key in current}
        renamed = {keys.get(plain_name(self, key), key): value for key, value in state_dict.items()}
        return super().load_state_dict(renamed, strict=False, assign=assign)
