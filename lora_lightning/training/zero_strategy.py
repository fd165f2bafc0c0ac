"""DeepSpeed's ZeRO for `LoRAModule`: its gradients, optimizer steps and parts, under Lightning's loop and our guards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, distributed, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.agree import processes
from lora_lightning.training.checkpoint_io import WholeFiles
from lora_lightning.training.gradients import SharedStep
from lora_lightning.training.zero_engine import checked, config_for, engine_for, need_deepspeed, refuse_optimizer

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


class ZeROStrategy(DDPStrategy, SharedStep):
    """What DDP does, with the sum of the gradients and the optimizer's state in parts, one for each process.

    Args:
        stage: 2.
        zero_optimization: options of DeepSpeed's that change how much is sent at once, and no result.
        process_group_backend: torch's; by default what suits the device.
        timeout: of collective calls.
        start_method: how Lightning starts the other processes.

    Raises:
        LoRAError: an option that means nothing here.
    """

    def __init__(
        self,
        stage: Literal[2, 3] = 2,
        zero_optimization: dict[str, Any] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **kwargs: Any,
    ) -> None:
        if stage not in (2, 3):
            raise LoRAError(f"stage={stage}: ZeRO has stage 2 here, and 3")
        super().__init__(
            process_group_backend=process_group_backend, timeout=timeout, start_method=start_method, **kwargs
        )
        self.stage, self.options = stage, checked(zero_optimization)
        self._checkpoint_io = WholeFiles()
        self._engine: Any = None
        self._window = ExitStack()
        self._open = False

    @property
    def _module(self) -> LoRAModule:
        module: Any = self.lightning_module
        return module  # type: ignore[no-any-return]

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    # Setting up.

    def setup_environment(self) -> None:
        super().setup_environment()
        need_deepspeed(self.root_device)

    def configure_ddp(self) -> None:
        """Nothing is wrapped; the optimizer comes first."""
        _same_everywhere(self._module)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if len(self.optimizers) != 1:
            raise LoRAError(f"DeepSpeed steps one optimizer, and there are {len(self.optimizers)}")
        refuse_optimizer(self.optimizers[0])
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))  # DeepSpeed reads no other
        trained = sum(p.numel() for p in self._module.parameters() if p.requires_grad)
        config = config_for(self.stage, self.root_device, trained, self.options)
        self._names = {id(p): name for name, p in self._module.named_parameters() if p.requires_grad}
        self._trained = [p for p in self._module.parameters() if p.requires_grad]
        self._engine = engine_for(self._module, self.optimizers[0], config, self.root_device)

    def on_train_start(self) -> None:
        """What was put into the adapter since, as a checkpoint's, is what the optimizer goes on from."""
        self._zero.refresh_fp32_params()

    def teardown(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
        super().teardown()

    # A step.

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Gradients stay each process's own until the window's last micro-batch, and are then added up once."""
        last = not self._module.trainer.fit_loop._should_accumulate()
        if not self._open:
            self._window.enter_context(self._engine.coalesce_grad_reduction())
            self._open = True
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        self._engine.backward(closure_loss, scale_wrt_gas=False)
        closure_loss = self.precision_plugin.post_backward(closure_loss, self._module)
        if last:
            self._fill()
            self._open = False
            self._window.close()
        return closure_loss

    def _fill(self) -> None:
        """Zeros for what this process's batches did not reach: all must add up the same tensors in the same order."""
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        found = self.precision_plugin._wrap_closure(self._module, optimizer, closure)
        self._engine.step()
        return found

    # What each process holds.

    def own_gradients(self) -> list[tuple[str, Tensor]]:
        zero = self._zero
        return [
            (self._names[id(p)], part)
            for number, own in enumerate(zero.params_in_partition)
            for p, part in zip(own, zero.averaged_gradients.get(number) or (), strict=False)
        ]

    def stepped(self) -> list[nn.Parameter]:
        return [p for group in self._zero.bit16_groups for p in group]

    def norm(self, own: Iterable[Tensor]) -> Tensor:
        squares = torch.stack(
            [part.float().square().sum() for part in own] or [torch.zeros((), device=self.root_device)]
        )
        total = squares.sum()
        if processes() > 1:
            distributed.all_reduce(total)
        return total.sqrt()


def _same_everywhere(module: nn.Module) -> None:
    """All start from process 0's values: each process drew its own A."""
    if processes() == 1:
        return
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.numel() and not tensor.is_meta:
                sent = tensor.detach().contiguous()
                distributed.broadcast(sent.reshape(-1).view(torch.uint8), src=0)
                if sent.data_ptr() != tensor.data_ptr():
                    tensor.copy_(sent)


StrategyRegistry.register("zero2", ZeROStrategy, description="DeepSpeed's ZeRO-2", stage=2)
