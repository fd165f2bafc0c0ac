"""FSDP2 for `LoRAModule`: W0 and the adapter lie in parts, one for each process, and checkpoints hold the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor

from lora_lightning.lora.errors import LoRAError, some
from lora_lightning.training.adapter_checkpoints import AdapterCheckpoints
from lora_lightning.training.checkpoint_io import WholeFiles
from lora_lightning.training.sharding import is_sharded, shard
from lora_lightning.training.start import refuse_measured
from lora_lightning.training.steps_together import StepsTogether

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


class FSDP2Strategy(StepsTogether, AdapterCheckpoints):
    """Lightning's `ModelParallelStrategy`, with the sharding, the checkpoints and the guards that LoRA needs.

    Args:
        data_parallel_size: processes over which W0, the adapter and the optimizer's state are sharded; `auto` is all.
        tensor_parallel_size: only 1 is there.
        save_distributed_checkpoint: write a checkpoint as a folder to which each process adds its part, in place of
            one file. Both hold the adapter and its optimizer, neither W0, and any number of processes goes on from
            either.
        reshard_after_forward: let a block's gathered weights go between forward and backward. `False` needs the memory
            of W0 for a step, and gathers once in place of twice.
        cpu_offload: keep the shards in the memory of the CPU, and on the GPU only what is gathered.
        blocks: names of the modules that are gathered one by one, with `*` for anything, such as
            `encoder.layer.*.attention`; by default the backbone's repeated blocks.
        process_group_backend: torch's; by default what suits the device.
        timeout: of collective calls.

    Raises:
        LoRAError: a size that means nothing.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = False,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        blocks: Sequence[str] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if tensor_parallel_size != 1:
            raise LoRAError(
                f"tensor_parallel_size={tensor_parallel_size}: no layer is split within itself here; leave it at 1, and"
                " FSDP2 shards every layer over all processes"
            )
        if cpu_offload and process_group_backend is None:
            process_group_backend = "cuda:nccl,cpu:gloo"  # norms of the offloaded gradients are added up on the CPU
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward, self.cpu_offload, self.blocks = reshard_after_forward, cpu_offload, blocks
        self._checkpoint_io = WholeFiles()

    def setup_environment(self) -> None:
        """Lay the mesh over all processes.

        Raises:
            LoRAError: the processes are not as many as `data_parallel_size` says.
        """
        count = self.num_nodes * self.num_processes
        if self._data_parallel_size not in ("auto", count):
            raise LoRAError(
                f"data_parallel_size={self._data_parallel_size}, and there are {count} processes"
                f" ({self.num_nodes} nodes with {self.num_processes} devices): leave it at auto"
            )
        self._data_parallel_size = count
        super().setup_environment()

    def shard_module(self, module: LoRAModule) -> None:
        """Called by `LoRAModule.configure_model`, more than once.

        Raises:
            LoRAError: something cannot be sharded.
        """
        if is_sharded(module.backbone):
            return
        self._refuse(module)
        shard(
            module.backbone,
            self.device_mesh["data_parallel"],
            self.root_device,
            blocks=self.blocks,
            reshard_after_forward=self.reshard_after_forward,
            cpu_offload=self.cpu_offload,
        )

    def _refuse(self, module: LoRAModule) -> None:
        if self.cpu_offload and self.root_device.type == "cpu":
            raise LoRAError("cpu_offload keeps shards off the GPU, and this run is on the CPU: leave it out")
        refuse_measured(module, "FSDP2")
        named = module.named_parameters()
        beside = [name for name, p in named if p.requires_grad and not name.startswith("backbone.")]
        if beside:
            raise LoRAError(f"FSDP2 shards the backbone alone, and {some(beside)} trains beside it: train with ddp")

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        # The first module that runs would be taken for the root, and a step may begin with a part of the backbone.
        self._root._get_fsdp_state()._lazy_init()
        if trainer.state.fn == TrainerFn.FITTING:
            self._module.w0_fingerprint()  # by all: later one process may ask alone

    def model_to_device(self) -> None:
        """Offloaded shards stay where they are."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.root_device)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="W0 and the adapter in parts, one for each process")


def refuse_other_parallelism(module: LightningModule) -> None:
    """Lightning's own strategy leaves the sharding to the module, and one that is not sharded adds up no gradients.

    Raises:
        LoRAError: this is that strategy.
    """
    strategy = module.trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        raise LoRAError("ModelParallelStrategy leaves the sharding to us: name lora_lightning.FSDP2Strategy instead")
