"""How far the adapter has moved the model, while it trains."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule, Trainer

from lora_lightning.analysis.drift import Batch, measure_drift
from lora_lightning.analysis.drift_inputs import choose_texts, run_batches, text_batches
from lora_lightning.export.probe_batch import loaders_of
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.callbacks.every_n_steps import EveryNSteps
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.strategies.collectives import gather


class DriftMonitor(EveryNSteps):
    """Logs how far the model has moved from its base, which is the model with its adapter switched off.

    For causal language models `drift/kl`, the mean KL(base || adapted) per token, `drift/perplexity_base`,
    `drift/perplexity` and `drift/changed`, the share of tokens whose top prediction changed; for others `drift/cosine`,
    one minus the cosine of the pooled output, and `drift/relative_l2`. Weights and random states do not change.
    docs/analyze.md says what each metric means.

    Args:
        every_n_steps: optimizer steps between two measurements; by default one at each epoch's end.
        texts: a file of texts, a set, `neutral` for this package's own text, or `run` for inputs of the validation
            set. Left out, `neutral` for a causal language model and `run` for others.
        text_column: the column with the texts.
        count: texts or inputs at most.

    Raises:
        LoRAError: a number below 1.
    """

    def __init__(
        self, every_n_steps: int | None = None, texts: str | None = None, text_column: str = "text", count: int = 32
    ) -> None:
        super().__init__(every_n_steps)
        if count < 1:
            raise LoRAError(f"DriftMonitor.count must be at least 1, got {count}")
        self.texts, self.text_column, self.count = texts, text_column, count
        self.last: dict[str, float] = {}
        """The last measurement."""
        self._texts: list[str] | None = None
        self._batches: list[Batch] = []
        self._names: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise before the fit where the drift cannot be measured.

        Raises:
            LoRAError: a module that is no LoRAModule; texts without a tokenizer, or a file that cannot be read.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and isinstance(pl_module, LoRAModule):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            _, self._texts = choose_texts(self.texts, pl_module.task, data, column=self.text_column, most=self.count)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the batches on the module's device, the same in every process."""
        assert isinstance(pl_module, LoRAModule)  # see setup
        super().on_train_start(trainer, pl_module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        task, backbone, tokenizer = pl_module.task, pl_module.backbone, getattr(data, "tokenizer", None)
        if self._texts is None:
            loader = next(loaders_of(data))
            first = loader[0] if isinstance(loader, list | tuple) else loader
            batches = [trainer.precision_plugin.convert_input(move_data_to_device(b, pl_module.device)) for b in first]
            self._batches, self._names = run_batches(batches, task, backbone, tokenizer, self.count)
            # A sharded model runs in all processes at once; one of them may have a batch less.
            self._batches = self._batches[: min(gather(len(self._batches)))]
        else:
            self._names = self._texts
            self._batches = text_batches(self._texts, tokenizer, task, backbone, getattr(data, "max_length", None))

    def look(self, trainer: Trainer, module: LoRAModule, step: int) -> None:
        """Measure in all processes, since a sharded model needs them all; loggers write in the first."""
        forward = trainer.precision_plugin.forward_context
        (drift,) = measure_drift(module.backbone, self._batches, self._names, forward=forward).values()
        self.last = {f"drift/{name}": mean.value for name, mean in drift.figures.items()}
        for logger in trainer.loggers:
            logger.log_metrics(self.last, step=step)
