"""Steps and evaluation of a sharded model: all processes make the same calls, equally often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_lightning.lora.errors import LoRAError, first_few
from lora_lightning.training.strategies.base import is_sharded
from lora_lightning.training.strategies.collectives import gather

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


class EvaluatesTogether(ParallelStrategy):
    """Lets all processes evaluate equally many batches, also where one has more than another."""

    _most: Sequence[int] = ()
    """The largest number of batches of any process, for each loader of the running evaluation."""

    @property
    def _module(self) -> LoRAModule:
        module: Any = self.lightning_module
        return module  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._evaluate("validation_step", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._evaluate("test_step", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._evaluate("predict_step", batch, batch_idx, dataloader_idx)

    def _evaluate(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """Run the step; after its last batch a process runs the model uncounted while others have more."""
        output = self._call(step, batch, batch_idx, *((dataloader_idx,) if dataloader_idx else ()))
        count = self._batches()[dataloader_idx]
        if self._most and batch_idx + 1 == count:
            for _ in range(self._most[dataloader_idx] - int(count)):
                self._call("uncounted_step", batch, step == "predict_step")
        return output

    def _call(self, step: str, *args: Any) -> Any:
        """Call a method of the module as Lightning does."""
        with self.precision_plugin.forward_context():
            return getattr(self._module, step)(*args)

    def _batches(self) -> list[int | float]:
        """This process's number of batches for each loader of the running loop."""
        trainer = self._module.trainer
        if trainer.state.fn == TrainerFn.PREDICTING:
            return trainer.num_predict_batches
        if trainer.state.fn == TrainerFn.TESTING:
            return trainer.num_test_batches
        return trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches

    def on_validation_start(self) -> None:
        self._count_batches()

    def on_test_start(self) -> None:
        self._count_batches()

    def on_predict_start(self) -> None:
        self._count_batches()

    def _count_batches(self) -> None:
        if not is_sharded(self._module.backbone):
            return
        every = gather(self._batches())
        loaders = list(zip(*every, strict=True))
        if any(float("inf") in counts or (0 in counts and any(counts)) for counts in loaders):
            raise LoRAError(
                "where W0 lies in parts, it must be known how many batches each process evaluates, at least one: take a"
                " set that is not streamed, or fewer devices, or --trainer.limit_val_batches 0"
            )
        self._most = [int(max(loader)) for loader in loaders]


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
        """Raise unless all gradients were summed over the processes.

        Raises:
            LoRAError: the task's loss did not come through the backbone's own call.
        """
        super().post_backward(closure_loss)
        left = [n for n, p in self._module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if left:
            raise LoRAError(
                f"FSDP2 saw no backward of {first_few(left)}: the task's loss must come from a call of the backbone or"
                " of its blocks; or train with ddp"
            )

    def _call(self, step: str, *args: Any) -> Any:
        self._root.unshard()
        return super()._call(step, *args)

    def on_validation_end(self) -> None:
        self._root.reshard()

    def on_test_end(self) -> None:
        self._root.reshard()

    def on_predict_end(self) -> None:
        self._root.reshard()
