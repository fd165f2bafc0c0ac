"""Inits that are applied when a fit begins: measured on its data, or taken from an earlier run's adapter."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.backbones.locate import resolve
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.peft.config import CONFIG
from lora_lightning.lora.frozen.fingerprint import Fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.init.from_adapter import WarmStart, start_from_directory, start_from_state
from lora_lightning.lora.init.from_data import init_from_data
from lora_lightning.lora.inject import adapted_layers, modules_of_kind
from lora_lightning.lora.layers import SavedCopy
from lora_lightning.tasks.base import Task
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.checkpoints.adapter_state import CHECKPOINT_KEY, PREFIX, refuse_damaged_fields

MEASURED = ("eva", "lora_ga")
"""Inits that need batches. (`loftq` needs the model before quantization, which no DataModule has.)"""
BATCHES = 8
"""Training batches to measure on; lora_ga's paper (2407.05000) uses about as many, eva's (2410.07170) more."""


def warn_of_frozen_new_head(backbone: nn.Module) -> None:
    """Warn of a head without pretrained values that does not train: it stays random."""
    trained = tuple(f"{name}." for name, _ in (*modules_of_kind(backbone, SavedCopy), *adapted_layers(backbone)))
    new: list[str] = getattr(backbone, "new_keys", [])  # keys without values in the files that `huggingface` read
    names = sorted({key.rpartition(".")[0] for key in new if not (trained and key.startswith(trained))})
    if names:
        rank_zero_warn(f"{', '.join(names)}: new, with random weights, and frozen; to train: lora.modules_to_save")


def start_from_adapter(backbone: nn.Module, path: str, config: LoRAConfig, *, allow_other_base: bool) -> WarmStart:
    """Put the adapter of an earlier run into a freshly injected backbone.

    Args:
        path: a PEFT directory, an export that holds one, a run folder (its best checkpoint) or a checkpoint.
        config: what `backbone` was injected with.
    """
    if any(p.is_meta for p in backbone.parameters()):
        raise LoRAError(
            "init_adapter compares its W0 with this one's before it is sharded, and on_meta fills it after: leave"
            " on_meta out for this fit"
        )
    folder = Path(resolve(path))
    for directory in (folder, folder / "adapter"):
        if (directory / CONFIG).is_file():
            return start_from_directory(backbone, directory, allow_other_base=allow_other_base)
    file = run.find_checkpoint(folder)
    content = run.load_checkpoint(file)
    refuse_damaged_fields(content, resumes=False)
    fields, state = content[CHECKPOINT_KEY], content["state_dict"]
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    trained, base = LoRAConfig.from_dict(fields["config"]), Fingerprint.from_json(fields["base"])
    return start_from_state(backbone, tensors, trained, config, base, allow_other_base=allow_other_base)


def start_from_batches(backbone: nn.Module, task: Task, init: str, trainer: Trainer) -> None:
    """Compute the init of a freshly injected backbone from the first training batches; all processes take rank 0's."""
    device = next(backbone.parameters()).device
    loaders: Any = trainer.train_dataloader
    batches = [trainer.strategy.batch_to_device(batch, device) for batch in islice(iter(loaders), BATCHES)]

    def summed_loss(model: nn.Module, batch: Any) -> Tensor:
        """Over a batch's units, so that each unit weighs the same in the gradient (law 9)."""
        out = task.step(model, batch)
        return out.loss * out.weight

    inputs = [task.inputs(backbone, batch) for batch in batches] if init == "eva" else batches
    init_from_data(backbone, adapted_layers(backbone), init, inputs, summed_loss)
    broadcast_from_first(adapter_tensors(backbone).values(), trainer)


def share_subtracted_init(backbone: nn.Module, trainer: Trainer) -> None:
    """Give all processes rank 0's A0 and B0, which may be random; DDP sends buffers with `broadcast_buffers` alone."""
    factors = (tensor for _, layer in adapted_layers(backbone) for tensor in (layer.lora_A0, layer.lora_B0))
    broadcast_from_first((tensor for tensor in factors if tensor is not None), trainer)


def broadcast_from_first(tensors: Iterable[Tensor], trainer: Trainer) -> None:
    """Give all processes rank 0's values."""
    for tensor in tensors:
        tensor.data.copy_(trainer.strategy.broadcast(tensor.detach().cpu()))
