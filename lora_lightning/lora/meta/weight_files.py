"""Where the weights lie of a model that was built on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.meta.checkpoint import Checkpoint
from lora_lightning.lora.meta.key_mapping import Base, Group, alone

ATTRIBUTE = "weight_files"
"""Under this name the model keeps them until it is filled."""

GroupsOf = Callable[..., list[Group]]
"""A function of (model, checkpoint), by its import path so that a model can be pickled."""


def by_name(model: nn.Module, checkpoint: Checkpoint) -> list[Group]:
    """The files' tensors have the model's own names."""
    state = model.state_dict()
    return [alone(key, key) for key in checkpoint.stored if key in state]


class WeightFiles:
    """Safetensors files beside each other, and how their tensors make up a model's.

    Args:
        files: of one folder.
        groups_of: what says which tensors of the files make up which of the model's.

    Raises:
        LoRAError: a file is missing, torn or no safetensors file.
    """

    def __init__(self, files: Sequence[Path], groups_of: GroupsOf = by_name) -> None:
        wrong = next((file for file in files if file.suffix != ".safetensors"), None)
        if wrong is not None:
            raise LoRAError(
                f"a model on the meta device is filled from safetensors files, got {wrong.name}: load it the ordinary"
                " way and save it as safetensors, or leave on_meta out"
            )
        self.checkpoint = Checkpoint(files[0].parent, [file.name for file in files])
        self.groups_of = groups_of

    def base(self, model: nn.Module) -> Base:
        """The model's W0, read on demand."""
        return Base(self.checkpoint, self.groups_of(model, self.checkpoint), model)

    def reader(self, model: nn.Module) -> Callable[[str], Tensor | None]:
        """What gives W0's tensor of a name, in the dtype that it has in the model; None where the files have none."""
        base, state = self.base(model), model.state_dict()

        def read(name: str) -> Tensor | None:
            found = base(name)
            base.forget()
            return None if found is None else found.to(state[name].dtype)

        return read


def keep_files(model: nn.Module, files: WeightFiles) -> None:
    """Note where the model's weights lie."""
    model.__dict__[ATTRIBUTE] = files


def files_of(model: nn.Module) -> WeightFiles | None:
    """Where the model's weights lie; None for a model that has them, or that came from elsewhere."""
    found = model.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, WeightFiles) else None
