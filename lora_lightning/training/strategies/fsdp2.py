"""FSDP2 for `LoRAModule`: W0 and the adapter lie in parts, one for each process, and checkpoints hold the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor

from lora_lightning.lora.errors import LoRAError, some
from lora_lightning.training.checkpoints.file_io import WholeFiles
from lora_lightning.training.initialization import refuse_measured
from lora_lightning.training.strategies.checkpointing import AdapterCheckpoints
from lora_lightning.training.strategies.steps_together import StepsTogether
from lora_lightning.training.strategies.wrapping import as_stored, is_sharded, shard
from lora_lightning.training.tensor_group import join
from lora_lightning.training.tensor_parallel import TensorParallel
from lora_lightning.training.tensor_plan import plan_of
from lora_lightning.training.tensor_refusals import refuse, refuse_run

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


class FSDP2Strategy(StepsTogether, AdapterCheckpoints):
    """Lightning's `ModelParallelStrategy`, with the sharding, the checkpoints and the guards that LoRA needs.

    Args:
        data_parallel_size: processes over which W0, the adapter and the optimizer's state are sharded; `auto` is all.
        tensor_parallel_size: neighbouring processes over which layers are split within themselves, by a plan. They
            read the same batches. On several machines, keep a group within one.
        tensor_parallel_plan: which layers, and how, by names of modules with `*` for anything, such as
            `{"*.up": "colwise", "*.down": "rowwise"}`: over the backbone's own plan, where transformers has one.
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
        tensor_parallel_plan: Mapping[str, str] | None = None,
        save_distributed_checkpoint: bool = False,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        blocks: Sequence[str] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if tensor_parallel_size < 1:
            raise LoRAError(f"tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
        if tensor_parallel_plan and tensor_parallel_size == 1:
            raise LoRAError("tensor_parallel_plan splits nothing over one process: give tensor_parallel_size too")
        if cpu_offload and process_group_backend is None:
            process_group_backend = "cuda:nccl,cpu:gloo"  # norms of the offloaded gradients are added up on the CPU
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward, self.cpu_offload, self.blocks = reshard_after_forward, cpu_offload, blocks
        self.tensor_parallel_plan = tensor_parallel_plan
        self._checkpoint_io = WholeFiles()

    @property
    def tensor_parallel_size(self) -> int:
        """Processes over which a layer is split."""
        return int(self._tensor_parallel_size)

    def setup_environment(self) -> None:
        """Lay the mesh over all processes.

        Raises:
            LoRAError: the processes are not as many as the sizes say.
        """
        every, split = self.num_nodes * self.num_processes, self.tensor_parallel_size
        count, left = divmod(every, split)
        there = f"there are {every} processes ({self.num_nodes} nodes with {self.num_processes} devices)"
        if left or not count:
            raise LoRAError(f"tensor_parallel_size={split}, and {there}: give a multiple of it as trainer.devices")
        if self._data_parallel_size not in ("auto", count):
            of = f" for {count} groups of tensor_parallel_size={split}" if split > 1 else ""
            raise LoRAError(f"data_parallel_size={self._data_parallel_size}, and {there}{of}: leave it at auto")
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
            split=self._splitting(module),
        )

    def _splitting(self, module: LoRAModule) -> Callable[[nn.Module], None] | None:
        """What splits the backbone's layers within themselves, where that is asked for."""
        if self.tensor_parallel_size == 1:
            return None
        refuse_run(module, self)
        plan = plan_of(module.backbone, self.tensor_parallel_plan)
        refuse(module.backbone, plan, self.tensor_parallel_size)
        rank_zero_info(
            f"tensor parallelism: {len(plan.styles)} layers are split over {self.tensor_parallel_size} processes"
        )
        return TensorParallel(module.backbone, plan, self.device_mesh["tensor_parallel"]).split

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
        with as_stored(self._root):
            # The first module that runs would be taken for the root, and a step may begin with a part of the backbone.
            self._root._get_fsdp_state()._lazy_init()
        if self.tensor_parallel_size > 1:
            join(self._module, self.device_mesh)
        if trainer.state.fn == TrainerFn.FITTING:
            self._module.w0_fingerprint()  # by all: later one process may ask alone

    def model_to_device(self) -> None:
        """Offloaded shards stay where they are."""
        if not self.cpu_offload:
            with as_stored(self._root):
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
