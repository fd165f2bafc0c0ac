"""Checkpoints of a module that DeepSpeed trains: the file that any other strategy writes, and reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from lora_lightning.training.distributed import by_first, together
from lora_lightning.training.strategies.sharded_state import trained_state
from lora_lightning.training.zero_parts import Row, load_state, whole_state

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


class ZeROCheckpoints(DDPStrategy):
    """Gathers the optimizer's state, which lies in rows, and puts it back into any number of them."""

    @property
    def _module(self) -> LoRAModule:
        module: Any = self.lightning_module
        return module  # type: ignore[no-any-return]

    def rows(self) -> Sequence[Row]:
        """What each process's optimizer holds."""
        raise NotImplementedError

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains, in tensors of its own: DeepSpeed's lie in one, of which a file would hold all."""
        state = trained_state(self._module)
        return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole, in process 0."""
        return whole_state(_plain(optimizer), self.rows())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_state(_plain(optimizer), self.rows(), state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Whole or not at all.

        Raises:
            LoRAError: in all processes, where the first could not write.
        """
        path = by_first(lambda: str(filepath))
        together(lambda: self._write(checkpoint, path, storage_options))

    def _write(self, checkpoint: dict[str, Any], path: str, options: Any) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=options)


def _plain(optimizer: Optimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
