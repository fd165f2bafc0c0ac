"""Lightning's Trainer with `export`, `best` across processes, and a precision that suits the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from lora_lightning.export.export import parse_options
from lora_lightning.export.probe_batch import first_batch, loaders_of
from lora_lightning.export.verification import ExportReport
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.dtype import DType
from lora_lightning.training.callbacks.export_on_fit_end import export_module
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.checkpoints.file_io import WholeFiles
from lora_lightning.training.checkpoints.model_checkpoint import PreemptedError
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.precision import LightningsWord, Word, lightning_precision, narrow_base
from lora_lightning.training.preflight import refuse_arguments, refuse_unsupported, warn_of_few_cores
from lora_lightning.training.strategies import fsdp2 as _fsdp2  # noqa: F401  (which names it `fsdp2`)
from lora_lightning.training.strategies.endings import end_together, leave_on_sigterm, use_ending_launcher
from lora_lightning.training.tracking.wandb_callback import log_export


def single_process_options(accelerator: Any) -> dict[str, Any]:
    """Trainer options of an export: one device, however the run was trained."""
    device = "cpu" if str(accelerator) == "cpu" else "auto"
    return {"devices": 1, "num_nodes": 1, "strategy": "auto", "accelerator": device}


def logging_interval(steps: float) -> int:
    """Optimizer steps between two log rows of a fit of `steps` steps: at least 50 rows, at most 50 steps apart."""
    return 50 if steps >= 2500 else max(1, int(steps) // 50)


class LoRATrainer(Trainer):
    """Lightning's Trainer and the `export` command; checkpoint files are whole or absent (`checkpoint_io`).

    Args:
        precision: `bf16-base` holds W0 in bfloat16 under float32 adapters; `nf4-base` in 4 bit (QLoRA); `float32`;
            `auto`, bf16 autocast where the hardware has it, else float32; or one of Lightning's values, such as
            bf16-mixed and 16-mixed.
        log_every_n_steps: by default such that a fit logs at least 50 rows.

    Raises:
        LoRAError: a precision that would round the adapters too or that the strategy does not support; a strategy or
            a callback that is not supported.
    """

    def __init__(self, *args: Any, precision: Word | LightningsWord | None = None, **kwargs: Any) -> None:
        accelerator = kwargs.get("accelerator", "auto")
        refuse_arguments(kwargs.get("strategy"), precision, kwargs.get("devices"), accelerator)
        plugin_precision = lightning_precision(precision, str(accelerator))
        self._chooses_logging = kwargs.get("log_every_n_steps") is None
        super().__init__(*args, precision=plugin_precision, **kwargs)
        if self.accumulate_grad_batches < 1:
            raise LoRAError(
                f"trainer.accumulate_grad_batches must be at least 1, which adds up nothing, got"
                f" {self.accumulate_grad_batches}"
            )
        if self.val_check_interval == 0:
            raise LoRAError(
                "trainer.val_check_interval is 0, which is never: to leave validation out, set"
                " trainer.limit_val_batches to 0"
            )
        self.precision_asked = precision
        if precision in ("bf16-base", "nf4-base"):
            narrow_base(self, precision)
        refuse_unsupported(self.strategy, *self.callbacks)  # type: ignore[attr-defined]  # a connector of Lightning's
        warn_of_few_cores(self)
        use_ending_launcher(self)
        # A plugin that the user chose stays.
        if type(getattr(self.strategy, "_checkpoint_io", None)) in (type(None), TorchCheckpointIO):
            self.strategy._checkpoint_io = WholeFiles()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Run in each process; where one fails, all end."""
        is_fit = self.state.fn == TrainerFn.FITTING
        if is_fit and self._chooses_logging:
            self.log_every_n_steps = 1  # until steps are counted: Lightning warns of an interval longer than an epoch
        # `is_global_zero` is true everywhere until the strategy has set its ranks.
        cluster = getattr(self.strategy, "cluster_environment", None)
        is_first = cluster is None or (cluster.node_rank(), cluster.local_rank()) == (0, 0)
        folder = run.run_dir(self) if is_fit and is_first else None
        with end_together(self, unless=(PreemptedError,)), run.lock_run(folder):
            return super()._run(*args, **kwargs)

    def _run_stage(self) -> Any:
        """Set what needs Lightning's signal handlers or its number of steps."""
        leave_on_sigterm(self)
        if self.state.fn == TrainerFn.FITTING and self._chooses_logging:
            self.log_every_n_steps = logging_interval(self.estimated_stepping_batches)
        return super()._run_stage()

    def predict(self, *args: Any, columns: list[str] | str | None = None, **kwargs: Any) -> Any:
        """Predict as Lightning does, with columns of the data beside the predictions.

        Args:
            args: as Lightning's.
            columns: columns of the data to write beside each prediction, separated by commas, or `all`; by default
                `id` where there is one.
            kwargs: as Lightning's.
        """
        self.predict_columns = columns.split(",") if isinstance(columns, str) else columns
        return super().predict(*args, **kwargs)

    def export(
        self,
        model: LoRAModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str = "best",
        output_dir: str | None = None,
        formats: str | list[str] = "adapter,merged",
        dtype: DType = "auto",
        max_shard_size: int | str | None = None,
        serving: Literal["vllm"] | None = None,
        scale: float = 1.0,
    ) -> ExportReport:
        """Write a trained run as a PEFT adapter and as a merged model, each compared with the adapted model.

        Args:
            model: the module that the run's config describes.
            datamodule: has the probe batch, the tokenizer and the label names. Without one, or without batches,
                the probe is the module's example_input_array.
            ckpt_path: a checkpoint, a run folder, or `best` or `last` of the newest run with this config's name.
            output_dir: where to write; `export/` in the run folder by default. An older export there is replaced
                once the new one is verified.
            formats: `adapter`, `merged` or both, separated by commas.
            dtype: of the merged model; `auto` is the backbone's. Sums are taken in float32 in any case.
            max_shard_size: split a merged transformers model into files of at most this size, such as `5GB`.
            serving: `vllm` writes the adapter with one rank and one alpha for all modules, as vLLM reads them.
            scale: factor on the update, such as 0.5 for half of it; it is written into the adapter's alpha.
        """
        parse_options(formats, dtype, max_shard_size, serving, scale)  # before anything is loaded
        checkpoint = run.find_checkpoint(ckpt_path)
        model.load_trained(run.load_checkpoint(checkpoint), self)
        folder = run.run_of_checkpoint(checkpoint)
        target = Path(output_dir) if output_dir else folder / run.EXPORT
        model.to(self.strategy.root_device)
        if datamodule is not None:
            datamodule.prepare_data()
            datamodule.setup("fit")
        batch = None if datamodule is None else first_batch(loaders_of(datamodule), model)
        options = {"formats": formats, "dtype": dtype, "max_shard_size": max_shard_size, "serving": serving}
        result = export_module(model, datamodule, folder, target, batch, Console(), scale=scale, **options)
        log_export(self.loggers, folder, target)
        return result
