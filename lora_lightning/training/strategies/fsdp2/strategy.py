"""FSDP2 for `LoRAModule`: W0 and the adapter are sharded over the processes; checkpoints hold the adapter.

All processes make the same calls of the sharded model, equally often. What lies outside of the blocks is gathered
before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_lightning.lora.errors import LoRAError, first_few
from lora_lightning.training.checkpoints.file_io import WholeFiles
from lora_lightning.training.initialization import MEASURED
from lora_lightning.training.strategies.base import ShardedStrategy, is_sharded
from lora_lightning.training.strategies.collectives import gather
from lora_lightning.training.strategies.fsdp2.checkpointing import AdapterCheckpoints
from lora_lightning.training.strategies.fsdp2.wrapping import read_as_stored, shard

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


class FSDP2Strategy(AdapterCheckpoints, ShardedStrategy):
    """Lightning's `ModelParallelStrategy`, with the sharding, the checkpoints and the guards that LoRA needs.

    Args:
        reshard_after_forward: free a block's gathered weights between forward and backward. `False` needs memory for
            all of W0 during a step, and gathers once in place of twice.
        cpu_offload: keep the shards in CPU memory, and only what is gathered on the GPU.
        blocks: names of the modules that are gathered one by one, with `*` for anything, such as
            `encoder.layer.*.attention`; by default the backbone's repeated blocks.
        process_group_backend: torch's; by default what suits the device.
        timeout: of collective calls.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        blocks: Sequence[str] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if cpu_offload and process_group_backend is None:
            process_group_backend = "cuda:nccl,cpu:gloo"  # norms of the offloaded gradients are added up on the CPU
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward, self.cpu_offload, self.blocks = reshard_after_forward, cpu_offload, blocks
        self._checkpoint_io = WholeFiles()
        self._most: Sequence[int] = ()
        """The largest number of batches of any process, for each loader of the running evaluation."""

    @property
    def _root(self) -> Any:
        root: nn.Module = self._module.backbone
        assert isinstance(root, FSDPModule)
        return root

    def setup_environment(self) -> None:
        """Lay the mesh over all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard_module(self, module: LoRAModule) -> None:
        """Shard the module's backbone; `LoRAModule.configure_model` calls this more than once."""
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
        starts = module.trainer.state.fn == TrainerFn.FITTING and not module.trainer.ckpt_path
        if starts and module.lora.init in MEASURED:
            raise LoRAError(
                f"lora.init={module.lora.init} is measured on a whole model, and FSDP2 shards it: fit a step in one"
                " process, and start from its adapter by init_adapter and another lora.init"
            )
        parameters = module.named_parameters()
        beside = [name for name, p in parameters if p.requires_grad and not name.startswith("backbone.")]
        if beside:
            raise LoRAError(
                f"FSDP2 shards the backbone alone, and {first_few(beside)} trains beside it: train with ddp"
            )

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        with read_as_stored(self._root):
            # The first module that runs would be taken for the root, and a step may begin with a part of the backbone.
            self._root._get_fsdp_state()._lazy_init()
        if trainer.state.fn == TrainerFn.FITTING:
            self._module.w0_fingerprint()  # in all processes: later one may read it alone

    def model_to_device(self) -> None:
        """Move the module to its device; offloaded shards stay on the CPU."""
        if not self.cpu_offload:
            with read_as_stored(self._root):
                super().model_to_device()
            return
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.root_device)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._root.unshard()
        return super().training_step(*args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Raise unless all gradients were summed over the processes."""
        super().post_backward(closure_loss)
        left = [n for n, p in self._module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if left:
            raise LoRAError(
                f"FSDP2 saw no backward of {first_few(left)}: the task's loss must come from a call of the backbone or"
                " of its blocks; or train with ddp"
            )

    def on_validation_start(self) -> None:
        """Agree on the number of batches.

        Raises:
            LoRAError: a process has none, or does not know how many.
        """
        loaders = list(zip(*gather(self._batches()), strict=True))
        if any(float("inf") in counts or (0 in counts and any(counts)) for counts in loaders):
            raise LoRAError(
                "where W0 lies in parts, it must be known how many batches each process evaluates, at least one: take a"
                " set that is not streamed, or fewer devices, or --trainer.limit_val_batches 0"
            )
        self._most = [int(max(counts)) for counts in loaders]

    on_test_start = on_predict_start = on_validation_start

    def _batches(self) -> list[int | float]:
        """This process's number of batches for each loader of the running loop."""
        trainer = self._module.trainer
        if trainer.state.fn == TrainerFn.PREDICTING:
            return trainer.num_predict_batches
        if trainer.state.fn == TrainerFn.TESTING:
            return trainer.num_test_batches
        return trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches

    def validation_step(self, *args: Any) -> Any:
        return self._evaluate(super().validation_step, *args)

    def test_step(self, *args: Any) -> Any:
        return self._evaluate(super().test_step, *args)

    def predict_step(self, *args: Any) -> Any:
        return self._evaluate(super().predict_step, *args)

    def _evaluate(self, step: Callable[..., Any], batch: Any, batch_idx: int, loader: int = 0) -> Any:
        """Run the step; after its last batch a process runs the model uncounted while others have more."""
        self._root.unshard()
        output = step(batch, batch_idx, *((loader,) if loader else ()))
        count = int(self._batches()[loader])
        if batch_idx + 1 == count:
            predicts = self._module.trainer.state.fn == TrainerFn.PREDICTING
            for _ in range(self._most[loader] - count):
                self._root.unshard()
                with self.precision_plugin.forward_context():
                    self._module.uncounted_step(batch, predicts)
        return output

    def on_validation_end(self) -> None:
        self._root.reshard()

    on_test_end = on_predict_end = on_validation_end


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="W0 and the adapter in parts, one for each process")
