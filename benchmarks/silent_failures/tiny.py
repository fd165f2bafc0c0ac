"""Tiny models from random weights, and the shortest fit that a user of each library would write."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning
import peft
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from lora_lightning import CausalLM, FreezeBase, LoRAConfig, LoRAModule, LoRATrainer, StopOnNonFinite, Task

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TARGETS = ["q_proj", "v_proj"]


def llama(seed: int = 0, cls: type[PreTrainedModel] = LlamaForCausalLM, **settings: Any) -> Any:
    """A Llama of two blocks; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return cls(LlamaConfig(**{**SIZES, **settings}))


def texts(count: int = 8, length: int = 12) -> list[dict[str, Tensor]]:
    """Rows of random tokens; the first token of each is its number."""
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(1, SIZES["vocab_size"], (count, length), generator=draw)
    rows[:, 0] = torch.arange(count)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def peft_config(**settings: Any) -> peft.LoraConfig:
    """r = 4 and alpha = 8 on query and value, as `our_config`."""
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})


def our_config(**settings: Any) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "alpha": 8, "target_modules": TARGETS, **settings})


def fit_ours(
    model: nn.Module,
    rows: Any,
    config: LoRAConfig,
    *,
    task: Task | None = None,
    steps: int = 3,
    batch_size: int = 4,
    lr: float = 1e-2,
    callbacks: Iterable[lightning.Callback] = (),
    trainer: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    **settings: Any,
) -> LoRAModule:
    """`LoRAModule` with the guards that `lora-lightning fit` has by default."""
    settings = {"optimizer": lambda params: torch.optim.AdamW(params, lr=lr), **settings}
    module = LoRAModule(model, task or CausalLM(), config, **settings)
    guards = [FreezeBase(show_table=False), StopOnNonFinite(), *callbacks]
    data = DataLoader(rows, batch_size=batch_size) if isinstance(rows, list) else rows
    fitting = LoRATrainer(**{"max_steps": steps, "callbacks": guards, **QUIET, **(trainer or {})})
    fitting.fit(module, data, ckpt_path=ckpt_path)
    return module


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit_trainer(
    model: Any, rows: Any, folder: Path, *, steps: int = 3, batch_size: int = 4, lr: float = 1e-2, **settings: Any
) -> Trainer:
    """transformers' Trainer; settings that are not its arguments' go to the Trainer."""
    resume_from = settings.pop("resume_from", None)
    own = {key: settings.pop(key) for key in ("optimizers", "callbacks", "data_collator") if key in settings}
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder / "trainer"),
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": lr,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            **settings,
        }
    )
    trainer = Trainer(model, arguments, train_dataset=rows, **own)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


class Plain(lightning.LightningModule):
    """What Lightning's documentation shows: a model with a loss of its own, an optimizer over all parameters."""

    def __init__(self, model: nn.Module, lr: float = 1e-2, optimizer: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.make = optimizer or (lambda params: torch.optim.AdamW(params, lr=lr))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch)["loss"]
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def fit_lightning(
    module: Plain, rows: Any, *, steps: int = 3, batch_size: int = 4, shuffle: bool = False, **settings: Any
) -> lightning.Trainer:
    """Lightning's Trainer over a plain DataLoader."""
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = lightning.Trainer(**{"max_steps": steps, **QUIET, **settings})
    trainer.fit(module, DataLoader(rows, batch_size=batch_size, shuffle=shuffle), ckpt_path=ckpt_path)
    return trainer


def b_matrices(model: nn.Module) -> list[Tensor]:
    """Every B, whichever library made it."""
    return [p.detach() for name, p in model.named_parameters() if "lora_B" in name]


def trained(model: nn.Module) -> str:
    """How many B have moved from zero."""
    matrices = b_matrices(model)
    return f"{sum(bool(b.count_nonzero()) for b in matrices)} of {len(matrices)} adapters trained"


def moved(model: nn.Module, w0: dict[str, Tensor]) -> int:
    """How many tensors of W0, given under their own names, are no longer the same in an adapted model."""
    here = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items() if "lora_" not in key}
    count = 0
    for name, tensor in w0.items():
        (found,) = (value for key, value in here.items() if key == name or key.endswith(f".{name}"))
        count += not torch.equal(found, tensor)
    return count


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of `b`."""
    return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max())
