"""A language model's answers to held-out prompts, before and during training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationMixin

from lora_lightning.data.text import GivesPrompts, Prompt
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.lora.inject import disabled
from lora_lightning.reports.table import Table
from lora_lightning.tasks.generation import generate_texts
from lora_lightning.tasks.positions import in_evaluation
from lora_lightning.training.callbacks.prediction_writer import json_lines
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.module import LoRAModule

FILE, PAGE = "samples.jsonl", "samples.md"
COLUMNS = ("step", "prompt", "reference", "before", "after")
"""Of a sample: optimizer steps before it, the prompt, the data's answer, and the model's without and with adapter."""


class Samples(Callback):
    """Writes the adapted model's answers beside the plain one's, after each validation and at the end of training.

    They go to `samples.jsonl` (all) and `samples.md` (the newest) in the run's folder, and as a table to W&B and to
    TensorBoard where these are logged to; the first of them is shown when fit ends. Decoding is greedy.

    Args:
        count: prompts, from the data's held-out rows.
        max_new_tokens: of each answer.

    Raises:
        LoRAError: numbers below 1.
    """

    def __init__(self, count: int = 4, max_new_tokens: int = 64) -> None:
        for name, number in (("count", count), ("max_new_tokens", max_new_tokens)):
            if number < 1:
                raise LoRAError(f"Samples.{name} must be at least 1, got {number}")
        self.count, self.max_new_tokens = count, max_new_tokens
        self.samples: list[dict[str, Any]] = []
        self._before: list[str] | None = None
        self._prompts: list[Prompt] | None = None

    def state_dict(self) -> dict[str, Any]:
        """All answers so far: a resumed fit writes the whole file again."""
        return {"samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples = list(state_dict["samples"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise before the fit where no samples can be made."""
        if stage != "fit":
            return
        if not isinstance(pl_module, LoRAModule) or not isinstance(pl_module.backbone, GenerationMixin):
            raise LoRAError(
                "Samples needs a transformers model that generates, such as AutoModelForCausalLM:"
                " drop it from trainer.callbacks"
            )
        if not isinstance(trainer.datamodule, GivesPrompts):  # type: ignore[attr-defined]
            raise LoRAError("Samples takes its prompts from ChatData or LanguageModellingData: drop it from callbacks")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample the last step, unless its validation did."""
        if not self.samples or self.samples[-1]["step"] != trainer.global_step:
            self._sample(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show one of the newest."""
        if self.samples and run.dir_to_write(trainer) is not None:
            sample = next(sample for sample in self.samples if sample["step"] == self.samples[-1]["step"])
            titles = {"prompt": "prompt", "before": "before", f"after {sample['step']} steps": "after"}
            rows = [(title, sample[name]) for title, name in titles.items()]
            Console().print(Table(title="An answer", rows=rows))

    def _sample(self, trainer: Trainer, module: LightningModule) -> None:
        """All processes generate, since a sharded model needs them all; the first one writes."""
        if run.run_dir(trainer) is None:
            return
        assert isinstance(module, LoRAModule)  # see setup
        data: GivesPrompts = trainer.datamodule  # type: ignore[attr-defined]
        prompts = self._prompts = data.prompts(self.count) if self._prompts is None else self._prompts
        with in_evaluation(module.backbone), trainer.precision_plugin.forward_context():
            if self._before is None:
                with disabled(module.backbone):
                    self._before = generate_answers(module.backbone, data, prompts, self.max_new_tokens, "before")
            after = generate_answers(module.backbone, data, prompts, self.max_new_tokens, "after")
        self.samples += [
            dict(zip(COLUMNS, (trainer.global_step, p.text, p.reference, *answers), strict=True))
            for p, *answers in zip(prompts, self._before, after, strict=True)
        ]
        if (folder := run.dir_to_write(trainer)) is None:
            return
        cells = [[sample[name] for name in COLUMNS[1:]] for sample in self.samples[-len(prompts) :]]
        rows = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in cells]
        table = "".join(f"| {' | '.join(row)} |\n" for row in (COLUMNS[1:], ["---"] * 4, *rows))
        page = f"After {trainer.global_step} steps:\n\n{table}"
        write_bytes(folder / FILE, json_lines(self.samples))
        write_bytes(folder / PAGE, page.encode())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                # The whole table each time: W&B shows the newest only.
                logger.log_table("samples", columns=list(COLUMNS), data=[list(s.values()) for s in self.samples])
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", page, trainer.global_step)


@torch.no_grad()
def generate_answers(
    backbone: nn.Module, data: GivesPrompts, prompts: list[Prompt], max_new_tokens: int, what: str = "samples"
) -> list[str]:
    """A transformers model's greedy answer to each prompt, one by one, so that padding changes nothing."""
    device = next(backbone.parameters()).device
    options = {"max_new_tokens": max_new_tokens, "use_cache": True, "eos_token_id": stop_tokens(backbone, data) or None}
    texts = []
    for prompt in tqdm(prompts, desc=f"answers {what}", leave=False):
        ids = torch.tensor([prompt.input_ids], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        texts += generate_texts(backbone, inputs, data.tokenizer, options)
    return texts


def stop_tokens(backbone: nn.Module, data: GivesPrompts) -> list[int]:
    """Tokens that end an answer: the data's ends of turns, and the model's end tokens."""
    end_tokens: Any = backbone.generation_config.eos_token_id  # type: ignore[union-attr]
    return sorted({*data.stop_token_ids, *([end_tokens] if isinstance(end_tokens, int) else end_tokens or [])})
