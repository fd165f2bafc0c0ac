"""DeepSpeed's ZeRO-2 for `LoRAModule`: its sums, steps and parts, under Lightning's loop and our guards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, distributed, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.checkpoints.file_io import WholeFiles
from lora_lightning.training.distributed import processes
from lora_lightning.training.gradients import SharedStep
from lora_lightning.training.initialization import MEASURED
from lora_lightning.training.zero_checkpoints import ZeROCheckpoints
from lora_lightning.training.zero_engine import (
    checked,
    config_for,
    engine_for,
    need_deepspeed,
    prepare_deepspeed,
    refuse_numbers,
    refuse_optimizer,
)
from lora_lightning.training.zero_parts import Row, rows_of_stage_2


class ZeRO2Strategy(ZeROCheckpoints, SharedStep):
    """DDP whose optimizer's state, and whose sums of gradients, lie in parts, one for each process, by DeepSpeed.

    Args:
        zero_optimization: DeepSpeed's options of that name, of those that change how much is sent at once.
        process_group_backend: torch's; by default what suits the device.
        timeout: of collective calls.
        start_method: how Lightning starts the other processes.

    Raises:
        LoRAError: DeepSpeed is not installed; an option that is not there.
    """

    stage = 2

    def __init__(
        self,
        zero_optimization: dict[str, Any] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **kwargs: Any,
    ) -> None:
        need_deepspeed()
        self.options = checked(self.stage, zero_optimization)
        own: dict[str, Any] = {"process_group_backend": process_group_backend, "timeout": timeout}
        super().__init__(start_method=start_method, **own, **kwargs)
        self._checkpoint_io = WholeFiles()
        self._engine: Any = None
        self._window: ExitStack | None = None
        self._names: dict[int, str] = {}

    @property
    def _zero(self) -> Any:
        """DeepSpeed's wrapper of the optimizer."""
        return self._engine.optimizer

    def rows(self) -> list[Row]:
        """What each process's optimizer holds."""
        return rows_of_stage_2(self._zero)

    def setup_environment(self) -> None:
        """Find the other processes.

        Raises:
            LoRAError: DeepSpeed is set to another kind of device.
        """
        super().setup_environment()
        prepare_deepspeed(self.root_device)

    def configure_ddp(self) -> None:
        """DDP would wrap the module, and send process 0's values to all, which is what is left of it here."""
        same_everywhere((*self._module.parameters(), *self._module.buffers()))

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the optimizer, and let DeepSpeed put this process's part of what trains into it.

        Raises:
            LoRAError: it cannot step over parts; a start that would be measured after this.
        """
        if self._module.lora.init in MEASURED and not trainer.ckpt_path:
            raise LoRAError(
                f"lora.init={self._module.lora.init} is measured when training starts, and by then DeepSpeed has laid"
                " the adapter in rows: fit a step in one process, and start from its adapter by init_adapter and"
                " another lora.init"
            )
        super().setup_optimizers(trainer)
        if len(self.optimizers) != 1:
            raise LoRAError(f"DeepSpeed steps one optimizer, got {len(self.optimizers)}: train with ddp")
        refuse_optimizer(self.optimizers[0])
        trained = [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]
        refuse_numbers(self.precision_plugin, trained)
        self._names = {id(p): name for name, p in trained}
        self._local_rank()
        self._engine = engine_for(self._module, self.optimizers[0], self._config())

    def _local_rank(self) -> None:
        """Where DeepSpeed looks for it."""
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))

    def _config(self) -> dict[str, Any]:
        trained = sum(p.numel() for p in self._module.parameters() if p.requires_grad)
        return config_for(self.stage, self.root_device, trained, self.options)

    def on_train_start(self) -> None:
        """Step from what was put into the adapter since."""
        self._zero.refresh_fp32_params()

    def teardown(self) -> None:
        """Leave an ordinary module."""
        if self._engine is not None:
            self._engine.module_forward_pre_hook.remove()
            self._engine.module_forward_post_hook.remove()
            self._engine.destroy()
            self._engine = self._window = None
        super().teardown()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Gradients stay each process's own through the micro-batches of a step, and are then added up once.

        DeepSpeed would add them up in the order in which they come, which is not all processes' where a batch leaves
        something out, such as an expert.
        """
        if self._window is None:
            self._window = ExitStack()
            self._window.enter_context(self._engine.coalesce_grad_reduction())
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        self._engine.backward(closure_loss, scale_wrt_gas=False)
        closure_loss = self.precision_plugin.post_backward(closure_loss, self._module)
        if not self._module.trainer.fit_loop._should_accumulate():
            for parameter in self.stepped():
                if parameter.grad is None:
                    self._give_zeros(parameter)
            window, self._window = self._window, None
            window.close()
        return closure_loss

    def _give_zeros(self, parameter: nn.Parameter) -> None:
        """For what this process's batches have not reached."""
        parameter.grad = torch.zeros_like(parameter)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """The window's last micro-batch, the guards and the clipping, and DeepSpeed's step."""
        found = self.precision_plugin._wrap_closure(self._module, optimizer, closure)
        self._engine.step()
        return found

    def own_gradients(self) -> list[tuple[str, Tensor]]:
        """Of the last step's sums, this process's stretches, each of one parameter."""
        sums = self._zero.averaged_gradients
        return [
            (self._names[id(p)], part)
            for number, own in enumerate(self._zero.params_in_partition)
            for p, part in zip(own, sums.get(number) or (), strict=False)  # a row's end may be filled up
        ]

    def stepped(self) -> list[nn.Parameter]:
        """All that DeepSpeed has rows of."""
        return [p for group in self._zero.bit16_groups for p in group]

    def norm(self, own: Iterable[Tensor]) -> Tensor:
        """The 2-norm over all processes."""
        nothing = torch.zeros((), device=self.root_device)
        total = torch.stack([nothing, *(part.float().square().sum() for part in own)]).sum()
        if processes() > 1:
            distributed.all_reduce(total)
        return total.sqrt()


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values: each has drawn its own A."""
    for tensor in tensors if processes() > 1 else ():
        if tensor.numel() and not tensor.is_meta:
            sent = tensor.detach().contiguous()
            distributed.broadcast(sent.reshape(-1).view(torch.uint8), src=0)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.data.copy_(sent)


StrategyRegistry.register("zero2", ZeRO2Strategy, description="DDP with the optimizer in parts, by DeepSpeed")
