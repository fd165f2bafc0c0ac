"""DeepSpeed's engine over an adapted model: what of ZeRO is switched on, and what is refused by name.

DeepSpeed keeps float32 sums of what trains, adds gradients up over the processes and steps an ordinary optimizer of
torch over each process's part. Loss scales, clipping, schedules, precision and files are Lightning's and ours, so all
that DeepSpeed has of these stays off.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from torch.optim import ASGD, SGD, Adadelta, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from lora_lightning.lora.errors import LoRAError, did_you_mean, some

INSTALL = (
    "DeepSpeed is not installed: pip install 'lora_lightning[deepspeed]', or take configs/strategy/ddp.yaml or"
    " fsdp2.yaml"
)

BOTH = {"overlap_comm", "reduce_bucket_size"}
THIRD = ("max_live_parameters", "max_reuse_distance", "param_persistence_threshold", "prefetch_bucket_size")
OPTIONS: dict[int, set[str]] = {2: BOTH | {"allgather_bucket_size"}, 3: BOTH | {f"stage3_{name}" for name in THIRD}}
"""By stage, of DeepSpeed's `zero_optimization`: what changes how much is held and sent at once, and no result."""

ELEMENTWISE: tuple[type[Optimizer], ...] = (*(AdamW, Adam, SGD, RMSprop, Adadelta, Adamax, NAdam, RAdam, ASGD, Rprop),)
"""Optimizers that treat each number by itself, so that it does not matter that DeepSpeed lays them in a row."""


def need_deepspeed() -> None:
    """Raise unless it is installed.

    Raises:
        LoRAError: with what to install.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise LoRAError(INSTALL)


def prepare_deepspeed(device: torch.device) -> None:
    """Import it for this kind of device.

    Raises:
        LoRAError: it was imported for another.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator

    old = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"  # and DeepSpeed calls them
    warnings.filterwarnings("ignore", old, FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # what it warns of is looked at here
    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles what only its inference uses on CPUs

    kind = get_accelerator().device_name().partition(":")[0]
    if kind != device.type:
        raise LoRAError(
            f"DeepSpeed computes on {kind} here and this run on {device.type}: set DS_ACCELERATOR={device.type} in the"
            " environment"
        )


def checked(stage: int, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What may be set of `zero_optimization`.

    Raises:
        LoRAError: something else is.
    """
    options = dict(options or {})
    for name in options.keys() - OPTIONS[stage]:
        if name.startswith(("offload", "cpu_offload")):
            raise LoRAError(
                f"zero_optimization.{name}: nothing is offloaded here. The optimizer's state of an adapter is small; W0"
                " goes to the CPU's memory with lora_lightning.FSDP2Strategy and its cpu_offload"
            )
        known = sorted(OPTIONS[stage])
        raise LoRAError(
            f"zero_optimization.{name} is none of what may be set in stage {stage}{did_you_mean(name, known)}"
            f" ({', '.join(known)})"
        )
    return options


def refuse_optimizer(optimizer: Optimizer) -> None:
    """Raise unless it may step over numbers in a row.

    Raises:
        LoRAError: it needs whole matrices, or may need them.
    """
    if type(optimizer) not in ELEMENTWISE:
        names = ", ".join(kind.__name__ for kind in ELEMENTWISE)
        raise LoRAError(
            f"DeepSpeed lays all parameters in one row, and {type(optimizer).__name__} may need them whole: take one of"
            f" torch.optim's {names}, or another strategy"
        )


def refuse_numbers(plugin: Precision, trained: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise unless all that trains is float32 and its gradients are not scaled.

    Raises:
        LoRAError: with what to take.
    """
    if getattr(plugin, "scaler", None) is not None:
        raise LoRAError(
            "precision 16-mixed scales losses and skips steps, which DeepSpeed would do in a way of its own: take"
            " bf16-mixed or bf16-base"
        )
    other = [f"{name} ({p.dtype})" for name, p in trained if p.dtype != torch.float32]
    if other:
        raise LoRAError(
            f"DeepSpeed steps over float32 alone, and there is {some(other)}: take precision float32, bf16-mixed or"
            " bf16-base, or another strategy"
        )


def config_for(stage: int, device: torch.device, trained: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own config.

    Args:
        trained: how many numbers train; buffers need not be larger than that.
    """
    bucket = max(1 << 10, min(trained + trained % 2, 200_000_000))
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": device.type != "cpu",
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,  # `rows_of_stage_2` takes them in order
        "compute_grad_norm": stage == 3,  # norms are taken here; DeepSpeed can leave it out in stage 2 alone
    }
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its own throughput figures, which are off
        "gradient_accumulation_steps": 1,  # Lightning counts
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "zero_optimization": zero | dict(options),
    }


def engine_for(module: nn.Module, optimizer: Optimizer | None, config: dict[str, Any]) -> Any:
    """The engine, which has put each process's part into the optimizer. All processes must have the same values.

    Without an optimizer, as in evaluation, it holds the parts of a model in stage 3.
    """
    from deepspeed import comm
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    class Engine(DeepSpeedEngine):  # type: ignore[misc]
        """That does not send all of W0 around, where scalars would fail."""

        def _broadcast_model(self) -> None:
            """Done by the strategy."""

    comm.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    torchs_own = nn.functional.linear
    try:
        return Engine(
            args=None,
            model=module,
            optimizer=optimizer,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            dist_init_required=False,
            config=config,
            config_class=DeepSpeedConfig(config),
            dont_change_device=True,
        )
    finally:
        # Stage 3 puts its own there, in all of the process, which rounds the bias by itself.
        nn.functional.linear = torchs_own
