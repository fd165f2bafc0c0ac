"""FSDP2 for `LoRAModule`: W0 and the adapter are sharded over the processes; checkpoints hold the adapter.

All processes make the same calls of the sharded model, equally often. What lies outside of the blocks is gathered
before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer

from lora_lightning.lora.errors import LoRAError, first_few
from lora_lightning.lora.inject import disabled
from lora_lightning.training.checkpoints.adapter_state import adapter_only, refuse_other_tensors
from lora_lightning.training.checkpoints.file_io import WholeFiles, is_remote, whole_file
from lora_lightning.training.initialization import MEASURED
from lora_lightning.training.strategies.base import ShardedStrategy, is_sharded
from lora_lightning.training.strategies.collectives import gather, rank, run_in_all, run_in_first
from lora_lightning.training.strategies.fsdp2.wrapping import shard

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


class FSDP2Strategy(ModelParallelStrategy, ShardedStrategy):
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
    def _module(self) -> LoRAModule:
        module: Any = self.lightning_module
        return module  # type: ignore[no-any-return]

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
        if self.cpu_offload and self.root_device.type == "cpu":
            raise LoRAError("cpu_offload keeps shards off the GPU, and this run is on the CPU: leave it out")
        starts = module.trainer.state.fn == TrainerFn.FITTING and not module.trainer.ckpt_path
        if starts and module.lora.init in MEASURED:
            raise LoRAError(
                f"lora.init={module.lora.init} is measured on a whole model, and FSDP2 shards it: fit a step in one"
                " process, and start from its adapter by init_adapter and another lora.init"
            )
        trained = [name for name, p in module.named_parameters() if p.requires_grad]
        if beside := [name for name in trained if not name.startswith("backbone.")]:
            raise LoRAError(
                f"FSDP2 shards the backbone alone, and {first_few(beside)} trains beside it: train with ddp"
            )
        shard(
            module.backbone,
            self.device_mesh["data_parallel"],
            self.root_device,
            blocks=self.blocks,
            reshard_after_forward=self.reshard_after_forward,
            cpu_offload=self.cpu_offload,
        )

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        # FSDP2 reads parameters as attributes: switched off, a bias is that, and not its trained copy.
        with disabled(self._root):
            # The first module that runs would be taken for the root, and a step may begin with a part of the backbone.
            self._root._get_fsdp_state()._lazy_init()
        if trainer.state.fn == TrainerFn.FITTING:
            self._module.w0_fingerprint()  # in all processes: later one may read it alone

    def model_to_device(self) -> None:
        """Move the module to its device; offloaded shards stay on the CPU."""
        if not self.cpu_offload:
            with disabled(self._root):
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
        """Agree on the number of batches, of which each process must have some."""
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
            module = self._module
            predicts = module.trainer.state.fn == TrainerFn.PREDICTING
            run = module.task.predict if predicts else module.task.evaluate
            for _ in range(self._most[loader] - count):
                self._root.unshard()
                with self.precision_plugin.forward_context():
                    run(module.backbone, batch)
        return output

    def on_validation_end(self) -> None:
        self._root.reshard()

    on_test_end = on_predict_end = on_validation_end

    # ---- checkpoints: Lightning's code drops frozen keys, and then misses them

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Restore the optimizer after the module has checked the checkpoint, as with other strategies."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The tensors that train, whole, in process 0 only."""
        return _gather(adapter_only(self._module, self._module.state_dict()))  # type: ignore[no-any-return]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state, whole, in process 0 only."""
        return _gather(optimizer.state_dict())  # type: ignore[no-any-return]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the file in process 0; an error is raised in all."""
        run_in_first(lambda: self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the same file in every process; an error is raised in all."""
        remote, file = is_remote(checkpoint_path), Path(checkpoint_path)
        path = run_in_first(lambda: checkpoint_path if remote else whole_file(file))
        return run_in_all(lambda: self.checkpoint_io.load_checkpoint(path, weights_only=weights_only))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the adapter into the shards, unless keys are missing, left over or wrongly shaped."""
        module, state = self._module, checkpoint["state_dict"]
        if strict:
            refuse_other_tensors(module, module.state_dict(), state)
        current = adapter_only(module, module.state_dict())
        shards = {key: _shard_like(value, current[key]) for key, value in state.items() if key in current}
        with disabled(module.backbone):
            module.load_state_dict(shards, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Shard each optimizer's state like its parameters, and load it."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            in_order = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [i for group in state["param_groups"] for i in group["params"]]
            parameters = dict(zip(numbers, in_order, strict=False))
            shards = {
                i: {name: _shard_like(value, parameters[i]) for name, value in values.items()}
                for i, values in state["state"].items()
                if values and i in parameters
            }
            optimizer.load_state_dict({"state": shards, "param_groups": state["param_groups"]})


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


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="W0 and the adapter in parts, one for each process")
