"""FSDP2 for `LoRAModule`: W0 and the adapter are sharded over the processes; checkpoints hold the adapter.

Each block is gathered for its forward and its backward, and is sharded in between; every process keeps its rows of W0
and of the adapter. The rest (embeddings, the head, modules between blocks) is gathered from a step's beginning until
after its backward, so that a task may read a head's weight beside the forward. All processes make the same calls of the
sharded model, equally often.

The fused arithmetic saves a weight's gathered tensor for backward, which FSDP2 fills again before a block's backward.
An input is not recomputed from another block's norm, whose weight is sharded then; and no process times products for
itself, so that all processes, and a resumed fit, round alike.
"""

from __future__ import annotations

import fnmatch
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, distributed, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer

from lora_lightning.lora.errors import LoRAError, did_you_mean, first_few
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.inject import disabled
from lora_lightning.lora.targets.blocks import repeated_blocks
from lora_lightning.training.checkpoints.adapter_state import adapter_only, refuse_other_tensors
from lora_lightning.training.checkpoints.file_io import WholeFiles, is_remote, whole_file
from lora_lightning.training.initialization import MEASURED
from lora_lightning.training.strategies.base import ShardedStrategy, is_sharded
from lora_lightning.training.strategies.collectives import gather, rank, run_in_all, run_in_first, world_size

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


def shard(
    backbone: nn.Module,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    blocks: Sequence[str] | None = None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shard a backbone over a mesh of one dimension in place, with process 0's values; options as FSDP2Strategy's."""
    if quantized := [name for name, module in backbone.named_modules() if scheme(module) is not None]:
        raise LoRAError(
            f"FSDP2 shards plain weights, and {first_few(quantized)} are quantized: load the backbone in bfloat16, or"
            " train it with --trainer.strategy ddp"
        )
    chosen = groups_of(backbone) if blocks is None else named_blocks(backbone, blocks)
    whole = parameters_left_whole(backbone, chosen)
    if chosen:
        kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in chosen.values()))
        beside = f"; whole in each process, as scalars or shared by blocks: {first_few(list(whole))}" if whole else ""
        lie = f"FSDP2: W0 and the adapter lie in {mesh.size()} parts"
        rank_zero_info(f"{lie}; gathered one by one: {len(chosen)} x {kinds}{beside}")
    else:
        rank_zero_warn(
            f"FSDP2: no repeated blocks were found in {type(backbone).__name__}, so it is gathered as one, all of W0 at"
            " a time; FSDP2Strategy.blocks names modules to gather one by one"
        )
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": set(whole.values())}
    options["offload_policy"] = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    done: set[int] = set()
    for module in chosen.values():
        broadcast_unsharded(module, device, done)
        fully_shard(module, reshard_after_forward=reshard_after_forward, **options)
    broadcast_unsharded(backbone, device, done)
    root: Any = fully_shard(backbone, reshard_after_forward=False, **options)
    # Parameters that one process's batch does not reach, such as an expert's, get zero gradients: else shapes differ.
    root.set_reduce_scatter_unused_params(True)
    if callable(generate := getattr(root, "generate", None)):

        @functools.wraps(generate)
        def unshard_and_generate(*args: Any, **kwargs: Any) -> Any:
            root.unshard()  # what it calls outside of the blocks
            return generate(*args, **kwargs)

        root.generate = unshard_and_generate


def parameters_left_whole(backbone: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Frozen parameters that cannot be sharded: scalars, and those that several blocks share."""
    inside = {id(module) for block in blocks.values() for module in block.modules()}
    outside = [module for module in backbone.modules() if id(module) not in inside]
    places = Counter(id(p) for block in blocks.values() for p in block.parameters())
    places.update({id(p) for module in outside for p in module.parameters(recurse=False)})
    whole = {name: p for name, p in backbone.named_parameters() if not p.dim() or places[id(p)] > 1}
    if trained := [name for name, parameter in whole.items() if parameter.requires_grad]:
        raise LoRAError(
            f"FSDP2 cannot train what has no rows or stands in several blocks: {first_few(trained)}; exclude it from"
            " lora.target_modules or lora.modules_to_save, or train with --trainer.strategy ddp"
        )
    return whole


def broadcast_unsharded(module: nn.Module, device: torch.device, done: set[int]) -> None:
    """Put what is not yet sharded on the device, with process 0's values: each process has another random A."""
    for tensor in (*module.parameters(), *module.buffers()):
        if isinstance(tensor, DTensor) or tensor.is_meta or id(tensor) in done:
            continue
        done.add(id(tensor))
        tensor.data = tensor.data.to(device).contiguous()  # FSDP2 takes no other
        if world_size() > 1 and tensor.numel():
            distributed.broadcast(tensor.data.reshape(-1).view(torch.uint8), src=0)


def groups_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks that have a forward; FSDP2 gathers a block before its forward."""
    lists = (nn.ModuleList, nn.ModuleDict)
    return {name: block for name, block in repeated_blocks(model).items() if not isinstance(block, lists)}


def named_blocks(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules whose names match a pattern, which must fit one with parameters; `*` stands for anything."""
    modules = {name: m for name, m in model.named_modules() if name and next(m.parameters(), None) is not None}
    for pattern in patterns:
        if not fnmatch.filter(modules, pattern):
            near = did_you_mean(pattern, modules)
            raise LoRAError(f"FSDP2Strategy.blocks: '{pattern}' fits no module with parameters{near}")
    return {name: m for name, m in modules.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="W0 and the adapter in parts, one for each process")
