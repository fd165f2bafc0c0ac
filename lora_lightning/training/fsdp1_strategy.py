"""FSDP1 for `LoRAModule`: W0 lies in parts; the adapter, its optimizer and its checkpoints are as under DDP."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.meta.fill import fill_from_files
from lora_lightning.training.fsdp1_units import shard_w0, units_of
from lora_lightning.training.initialization import PREFIX, refuse_measured
from lora_lightning.training.strategies.evaluation import EvaluatesTogether

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


class FSDP1Strategy(EvaluatesTogether, DDPStrategy):
    """Lightning's `DDPStrategy` on a backbone whose W0 is sharded by torch's `FullyShardedDataParallel`.

    (Lightning's own `FSDPStrategy` works on GPUs only, shards the adapter too, and gathers all of W0 into checkpoints.)

    Args:
        reshard_after_forward: let a block's gathered weights go between forward and backward. `False` needs the memory
            of W0 for a step, and gathers once in place of twice.
        blocks: names of the modules that are gathered one by one, with `*` for anything; by default the backbone's
            repeated blocks.
        process_group_backend: torch's; by default what suits the device.
        timeout: of collective calls.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        blocks: Sequence[str] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        # As configs/strategy/ddp.yaml says, why. Buffers belong to W0.
        fixed = {"broadcast_buffers": False, "find_unused_parameters": True}
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, **fixed)  # type: ignore[arg-type]
        self.reshard_after_forward, self.blocks = reshard_after_forward, blocks

    def shard_module(self, module: LoRAModule) -> None:
        """Called by `LoRAModule.configure_model`, more than once.

        Raises:
            LoRAError: something cannot be sharded.
        """
        if units_of(module.backbone) is not None:
            return
        refuse_measured(module, "FSDP1")
        if module.training_forward.compilation is not None:
            raise LoRAError(
                "FSDP1 gathers W0 in hooks that torch.compile does not see: leave compile out, or take fsdp2"
            )
        fill_from_files(module.backbone)
        shard_w0(
            module.backbone, self.root_device, blocks=self.blocks, reshard_after_forward=self.reshard_after_forward
        )

    def setup(self, trainer: Trainer) -> None:
        """DDP leaves alone what lies in parts."""
        module: Any = self.lightning_module
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad and name.startswith(PREFIX)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)  # type: ignore[no-untyped-call]
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            module.w0_fingerprint()  # by all: later one process may ask alone

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        units, step = units_of(self._module.backbone), super().training_step
        return step(*args, **kwargs) if units is None else units.run(lambda: step(*args, **kwargs))

    def _evaluated(self, *args: Any) -> Any:
        units, step = units_of(self._module.backbone), super()._evaluated
        return step(*args) if units is None else units.run(lambda: step(*args))

    def teardown(self) -> None:
        """What lies in parts stays on its device: torch's flat parameters do not follow to another."""
        _optimizers_to_device(self.optimizers, torch.device("cpu"))
        module = self.lightning_module
        if module is None or units_of(self._module.backbone) is None:
            super().teardown()
            return
        self.model = module  # out of DDP
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


StrategyRegistry.register("fsdp1", FSDP1Strategy, description="W0 in parts, one for each process; the adapter in each")
