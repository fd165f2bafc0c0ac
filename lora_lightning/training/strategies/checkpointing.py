"""Checkpoints of a sharded module: the adapter and its optimizer, as one file or in parts; W0 is never gathered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.checkpoints import checkpoint_folder as folders
from lora_lightning.training.checkpoints.file_io import is_remote, whole_file
from lora_lightning.training.distributed import by_first, together
from lora_lightning.training.strategies.sharded_state import as_held, trained_state, whole_state
from lora_lightning.training.strategies.wrapping import as_stored

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


class AdapterCheckpoints(ModelParallelStrategy):
    """Saves and loads what trains, in place of Lightning's way, which drops frozen keys and then misses them."""

    _folder: Path | None = None
    """That the checkpoint which is being loaded lies in."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        """After the module has looked at the checkpoint, as with other strategies."""
        return True

    @property
    def _saved(self) -> LoRAModule:
        module: Any = self.lightning_module
        return module  # type: ignore[no-any-return]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains, whole and in process 0 only, or in parts where each writes its own."""
        state = trained_state(self._saved)
        return state if self._save_distributed_checkpoint else whole_state(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The same of an optimizer, in the form of a single process."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = plain.state_dict()
        return state if self._save_distributed_checkpoint else whole_state(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Whole or not at all.

        Raises:
            LoRAError: in all processes, where one could not write.
        """
        path = by_first(lambda: str(filepath))
        if self._save_distributed_checkpoint:
            if is_remote(path) or storage_options is not None:
                raise LoRAError(f"'{path}': checkpoints in parts are written to a file system of this machine only")
            folders.write(checkpoint, Path(path))
            return
        together(lambda: self._write(checkpoint, path, storage_options))

    def _write(self, checkpoint: dict[str, Any], path: str, options: Any) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=options)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read all but what lies in parts, which is read when it is known where it goes.

        Raises:
            DamagedCheckpointError: there is no whole one; in all processes.
        """
        self._folder = None
        path = by_first(lambda: str(checkpoint_path))
        if is_remote(path):
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        found = Path(by_first(lambda: str(whole_file(Path(path)))))
        if not found.is_dir():
            return together(lambda: self.checkpoint_io.load_checkpoint(str(found), weights_only=weights_only))
        self._folder = found
        return together(lambda: folders.read_rest(found))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put the adapter into the shards.

        Raises:
            AdapterError: keys are missing, left over or wrongly shaped; nothing was changed.
        """
        module, state = self._saved, dict(checkpoint["state_dict"])
        if self._folder is not None:
            state |= folders.shapes(self._folder, folders.STATE)
        if strict:
            module.refuse_misfits(state)
        own = trained_state(module)
        if self._folder is not None:
            state |= folders.read_parts(self._folder, folders.STATE, {k: own[k] for k in state if k in own})
        held = {k: as_held(v, own[k]) for k, v in state.items() if k in own}
        with as_stored(module.backbone):
            module.load_state_dict(held, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put each optimizer's state where its parameters' shards are."""
        for number, (optimizer, state) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
            here = [p for group in plain.param_groups for p in group["params"]]
            there = [i for group in state["param_groups"] for i in group["params"]]
            held = dict(zip(there, here, strict=False))
            values = {i: dict(state["state"].get(i, {})) for i in there}
            if self._folder is not None:
                folders.add_parts(self._folder, number, values, held)
            moved = {
                i: {name: as_held(v, held[i]) for name, v in own.items()}
                for i, own in values.items()
                if own and i in held
            }
            plain.load_state_dict({"state": moved, "param_groups": state["param_groups"]})
