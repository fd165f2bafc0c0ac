"""FSDP2 for `LoRAModule`: W0 and the adapter lie in parts, one for each process, and checkpoints hold the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lora_lightning.lora.errors import LoRAError, some
from lora_lightning.training import checkpoint_folder as folders
from lora_lightning.training.agree import by_first, gathered, together
from lora_lightning.training.checkpoint_io import WholeFiles, is_remote, whole_file
from lora_lightning.training.sharded_state import as_held, trained_state, whole_state
from lora_lightning.training.sharding import is_sharded, shard
from lora_lightning.training.start import MEASURED

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule


class FSDP2Strategy(ModelParallelStrategy):
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
        self._most: list[int] = []
        """Batches of each loader of the running evaluation, in the process that has most."""
        self._folder: Path | None = None
        """That the checkpoint which is being loaded lies in."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        """After the module has looked at the checkpoint, as with other strategies."""
        return True

    @property
    def _module(self) -> LoRAModule:
        module: Any = self.lightning_module
        return module  # type: ignore[no-any-return]

    # Set-up.

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
        if self.cpu_offload and self.root_device.type == "cpu":
            raise LoRAError("cpu_offload keeps shards off the GPU, and this run is on the CPU: leave it out")
        if (
            module.lora.init in MEASURED
            and module.trainer.state.fn == TrainerFn.FITTING
            and not module.trainer.ckpt_path
        ):
            raise LoRAError(
                f"lora.init={module.lora.init} is measured on a whole model, and FSDP2 shards it: fit a step in one"
                " process, and start from its adapter by init_adapter and another lora.init"
            )
        named = module.named_parameters()
        beside = [name for name, p in named if p.requires_grad and not name.startswith("backbone.")]
        if beside:
            raise LoRAError(f"FSDP2 shards the backbone alone, and {some(beside)} trains beside it: train with ddp")
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

    # Steps: what lies outside the blocks is there for all of them.

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
        left = [name for name, p in self._module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if left:
            raise LoRAError(
                f"FSDP2 saw no backward of {some(left)}: the task's loss must come from a call of the backbone or of"
                " its blocks; or train with ddp"
            )

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._evaluated("validation_step", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._evaluated("test_step", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._evaluated("predict_step", batch, batch_idx, dataloader_idx)

    def _evaluated(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """The step; after a process's last batch it runs the model on, unheard, for those that have one more."""
        self._root.unshard()
        found = getattr(super(), step)(batch, batch_idx, *((dataloader_idx,) if dataloader_idx else ()))
        own = self._batches()[dataloader_idx]
        if batch_idx + 1 == own:
            task, backbone = self._module.task, self._module.backbone
            run = task.predict if step == "predict_step" else task.evaluate
            with self.precision_plugin.forward_context():
                for _ in range(self._most[dataloader_idx] - int(own)):
                    run(backbone, batch)
        return found

    def _batches(self) -> list[int | float]:
        """How many batches this process has of each loader of the running loop."""
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
        every = gathered(self._batches())
        if any(
            count == float("inf") or (not count and any(loader))
            for loader in zip(*every, strict=True)
            for count in loader
        ):
            raise LoRAError(
                "FSDP2 needs to know how many batches each process evaluates, at least one: take a set that is not"
                " streamed, or fewer devices, or --trainer.limit_val_batches 0"
            )
        self._most = [int(max(loader)) for loader in zip(*every, strict=True)]

    def on_validation_end(self) -> None:
        self._root.reshard()

    def on_test_end(self) -> None:
        self._root.reshard()

    def on_predict_end(self) -> None:
        self._root.reshard()

    # Checkpoints.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains, whole and in process 0 only, or in parts where each writes its own."""
        state = trained_state(self._module)
        return state if self._save_distributed_checkpoint else whole_state(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The same of an optimizer, in the form of a single process."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = plain.state_dict()
        return state if self._save_distributed_checkpoint else whole_state(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Whole or not at all.

        Raises:
            LoRAError: in all processes, where one could not write.
        """
        path = by_first(lambda: str(filepath))
        if self._save_distributed_checkpoint:
            if is_remote(path) or storage_options is not None:
                raise LoRAError(f"'{path}': checkpoints in parts are written to a file system of this machine only")
            folders.write(checkpoint, Path(path))
            return
        together(lambda: self._write(checkpoint, path, storage_options))

    def _write(self, checkpoint: dict[str, Any], path: str, options: Any) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=options)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read all but what lies in parts, which is read when it is known where it goes.

        Raises:
            DamagedCheckpointError: there is no whole one; in all processes.
        """
        self._folder = None
        path = by_first(lambda: str(checkpoint_path))
        if is_remote(path):
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        found = Path(by_first(lambda: str(whole_file(Path(path)))))
        if not found.is_dir():
            return together(lambda: self.checkpoint_io.load_checkpoint(str(found), weights_only=weights_only))
        self._folder = found
        return together(lambda: folders.read_rest(found))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put the adapter into the shards.

        Raises:
            AdapterError: keys are missing, left over or wrongly shaped; nothing was changed.
        """
        module, state = self._module, dict(checkpoint["state_dict"])
        if self._folder is not None:
            state |= folders.shapes(self._folder, folders.STATE)
        if strict:
            module.refuse_misfits(state)
        own = trained_state(module)
        if self._folder is not None:
            state |= folders.read_parts(self._folder, folders.STATE, {k: own[k] for k in state if k in own})
        module.load_state_dict({k: as_held(v, own[k]) for k, v in state.items() if k in own}, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put each optimizer's state where its parameters' shards are."""
        for number, (optimizer, state) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
            here = [p for group in plain.param_groups for p in group["params"]]
            there = [i for group in state["param_groups"] for i in group["params"]]
            held = dict(zip(there, here, strict=False))
            values = {i: dict(state["state"].get(i, {})) for i in there}
            if self._folder is not None:
                folders.add_parts(self._folder, number, values, held)
            moved = {
                i: {name: as_held(v, held[i]) for name, v in own.items()}
                for i, own in values.items()
                if own and i in held
            }
            plain.load_state_dict({"state": moved, "param_groups": state["param_groups"]})


def refuse_other_parallelism(module: LightningModule) -> None:
    """Lightning's own strategy leaves the sharding to the module, and one that is not sharded adds up no gradients.

    Raises:
        LoRAError: this is that strategy.
    """
    strategy = module.trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        raise LoRAError("ModelParallelStrategy leaves the sharding to us: name lora_lightning.FSDP2Strategy instead")
