"""Steps of a sharded model: whatever one process calls, all call, and as often."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_lightning.lora.errors import LoRAError, some
from lora_lightning.training.strategies.evaluation import EvaluatesTogether


class StepsTogether(EvaluatesTogether, ModelParallelStrategy):
    """Gathers what lies outside of the blocks before each step."""

    @property
    def _root(self) -> Any:
        root: nn.Module = self._module.backbone
        assert isinstance(root, FSDPModule)
        return root

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._root.unshard()
        return super().training_step(*args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        """All gradients are added up over the processes, or an optimizer would step over those that are not.

        Raises:
            LoRAError: the task's loss did not come through the backbone's own call.
        """
        super().post_backward(closure_loss)
        left = [n for n, p in self._module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if left:
            raise LoRAError(
                f"FSDP2 saw no backward of {some(left)}: the task's loss must come from a call of the backbone or of"
                " its blocks; or train with ddp"
            )

    def _called(self, step: str, *args: Any) -> Any:
        self._root.unshard()
        return super()._called(step, *args)

    def on_validation_end(self) -> None:
        self._root.reshard()

    def on_test_end(self) -> None:
        self._root.reshard()

    def on_predict_end(self) -> None:
        self._root.reshard()
