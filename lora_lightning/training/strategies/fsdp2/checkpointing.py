"""Checkpoints of a sharded module: the adapter and its optimizer, as one file; W0 is never gathered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer

from lora_lightning.training.checkpoints.adapter_state import adapter_only, refuse_other_tensors
from lora_lightning.training.checkpoints.file_io import is_remote, whole_file
from lora_lightning.training.strategies.collectives import rank, run_in_all, run_in_first
from lora_lightning.training.strategies.fsdp2.wrapping import read_as_stored

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


class AdapterCheckpoints(ModelParallelStrategy):
    """Saves and loads what trains; Lightning's code drops frozen keys and then misses them."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Restore the optimizer after the module has checked the checkpoint, as with other strategies."""
        return True

    @property
    def _module(self) -> LoRAModule:
        module: Any = self.lightning_module
        return module  # type: ignore[no-any-return]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The tensors that train, whole, in process 0 only."""
        return _gather(adapter_only(self._module, self._module.state_dict()))  # type: ignore[no-any-return]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state, whole, in process 0 only."""
        return _gather(_plain_optimizer(optimizer).state_dict())  # type: ignore[no-any-return]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the file in process 0.

        Raises:
            LoRAError: the file could not be written; in all processes.
        """
        run_in_first(lambda: self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the same file in every process.

        Raises:
            DamagedCheckpointError: there is no whole file; in all processes.
        """
        path = run_in_first(
            lambda: checkpoint_path if is_remote(checkpoint_path) else whole_file(Path(checkpoint_path))
        )
        return run_in_all(lambda: self.checkpoint_io.load_checkpoint(path, weights_only=weights_only))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the adapter into the shards, unless keys are missing, left over or wrongly shaped."""
        module, state = self._module, checkpoint["state_dict"]
        if strict:
            refuse_other_tensors(module, module.state_dict(), state)
        current = adapter_only(module, module.state_dict())
        shards = {key: _shard_like(value, current[key]) for key, value in state.items() if key in current}
        with read_as_stored(module.backbone):
            module.load_state_dict(shards, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Shard each optimizer's state like its parameters, and load it."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            plain = _plain_optimizer(optimizer)
            in_order = [p for group in plain.param_groups for p in group["params"]]
            numbers = [i for group in state["param_groups"] for i in group["params"]]
            parameters = dict(zip(numbers, in_order, strict=False))
            shards = {
                i: {name: _shard_like(value, parameters[i]) for name, value in values.items()}
                for i, values in state["state"].items()
                if values and i in parameters
            }
            plain.load_state_dict({"state": shards, "param_groups": state["param_groups"]})


def _plain_optimizer(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _gather(state: Any) -> Any:
    """A nested state with its tensors gathered one by one, on the CPU, in process 0, and without them in the others."""
    if isinstance(state, dict):
        return {key: _gather(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_gather(value) for value in state]
    if not isinstance(state, Tensor):
        return state
    whole = state.full_tensor() if isinstance(state, DTensor) else state
    return whole.detach().cpu() if rank() == 0 else None


def _shard_like(value: Any, like: Any) -> Any:
    """A whole tensor sharded like the parameter that it belongs to; scalars and other values unchanged.

    A state of another shape, such as a row of a factored second moment, is replicated. Nothing is communicated.
    """
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or not value.dim():
        return value
    placements = like.placements if value.shape == like.shape else [Replicate()]
    with torch.no_grad():
        return distribute_tensor(value.to(like.device), like.device_mesh, placements, src_data_rank=None)
