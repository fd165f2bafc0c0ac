"""What tensor parallelism cannot split, by name and before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from lora_lightning.lora.errors import LoRAError, some
from lora_lightning.lora.layers import AdaptedLayer, LoRALinear
from lora_lightning.lora.layers.trained.module_copy import COPY
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.tasks.contrastive import ContrastiveEmbedding
from lora_lightning.training.tensor_parallel import BY_INPUT, BY_OUTPUT
from lora_lightning.training.tensor_plan import Plan, Style

if TYPE_CHECKING:
    from lora_lightning.training.module import LoRAModule
    from lora_lightning.training.strategies.fsdp2 import FSDP2Strategy

WAY_OUT = "leave it out of what lora trains (target_modules, target_parameters, bias), or tensor_parallel_size at 1"


def refuse_run(module: LoRAModule, strategy: FSDP2Strategy) -> None:
    """Raise where the run asks for what has no form under tensor parallelism.

    Raises:
        LoRAError: by the option's name.
    """
    task = module.task
    asked = {
        "FSDP2Strategy.cpu_offload": strategy.cpu_offload,
        "model.compile": module.training_forward.compilation is not None,
        f"the candidates of all processes (gather) of {type(task).__name__}": isinstance(task, ContrastiveEmbedding)
        and task.gather,
    }
    if wrong := [name for name, is_asked in asked.items() if is_asked]:
        raise LoRAError(
            f"tensor parallelism does not go with {some(wrong)}: leave it out, or tensor_parallel_size at 1"
        )


def refuse(backbone: nn.Module, plan: Plan, count: int) -> None:
    """Raise unless every layer of the plan, and all that trains beside it, can be laid over `count` processes.

    Raises:
        LoRAError: with the first layers that cannot, and what to do.
    """
    for told in _reasons(backbone, plan, count):
        raise LoRAError(f"tensor parallelism: {told}")


def _reasons(backbone: nn.Module, plan: Plan, count: int) -> Iterator[str]:
    modules = dict(backbone.named_modules())
    holders = Counter(id(p) for module in set(modules.values()) for p in module._parameters.values() if p is not None)
    for name, style in plan.styles.items():
        yield from _of_layer(name, modules[name], style, count, holders)
    if any(not style.is_whole for style in plan.styles.values()):
        yield from _of_heads(backbone, count)
    split = {id(modules[name]) for name in plan.styles}
    for name, module in modules.items():
        if id(module) not in split:
            yield from _of_others(name, module, plan)


def _of_layer(name: str, module: nn.Module, style: Style, count: int, holders: Counter[int]) -> Iterator[str]:
    if not isinstance(module, nn.Linear) or COPY in module._modules:
        kind = "a copy of modules_to_save" if COPY in module._modules else type(module).__name__
        yield f"'{name}' is {kind}, and only linear layers are split: name it as `replicate` in tensor_parallel_plan"
        return
    yield from _of_options(name, module)
    sides = BY_OUTPUT if style.by_output else BY_INPUT
    left = [key for key, p in module._parameters.items() if p is not None and key not in sides]
    if left or any(b is not None for b in module._buffers.values()):
        yield f"'{name}' holds {some([*left, *module._buffers])}, which cannot be split: {WAY_OUT}"
    if any(p is not None and holders[id(p)] > 1 for p in module._parameters.values()):
        yield f"'{name}' shares a tensor with another module: name it as `replicate` in tensor_parallel_plan"
    size = module.out_features if style.by_output else module.in_features
    if size % count:
        what = "outputs" if style.by_output else "inputs"
        yield f"the {size} {what} of '{name}' cannot be split over {count} processes: take another tensor_parallel_size"


def _of_options(name: str, module: nn.Module) -> Iterator[str]:
    if not isinstance(module, AdaptedLayer):
        return
    settings = module.lora_settings
    if settings.use_dora:
        yield f"DoRA's norms of '{name}' are those of whole rows and columns: set lora.use_dora to false"
    if settings.slices is not None:
        yield f"the chosen parts of '{name}' (lora slices) are not split: adapt the layer as a whole"
    if module.lora_tensors().keys() & {"lora_A0", "lora_B0"}:
        yield f"lora.init={settings.init} of '{name}' keeps its start beside A and B: take init gaussian"


def _of_heads(backbone: nn.Module, count: int) -> Iterator[str]:
    """Attention finds its heads by their size, and each process needs whole ones."""
    if not is_a(backbone, HF_MODEL):
        return
    config = backbone.config.get_text_config()  # type: ignore[operator,union-attr]
    for name in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(config, name, None)  # not every architecture has both
        if isinstance(number, int) and number % count:
            yield f"{name}={number} of {type(backbone).__name__} is no multiple of tensor_parallel_size={count}"


def _of_others(name: str, module: nn.Module, plan: Plan) -> Iterator[str]:
    """What trains outside of the split layers is held whole: linear layers, and copies of `modules_to_save`."""
    if not any(p is not None and p.requires_grad for p in module._parameters.values()):
        return
    if any(name == one or name.startswith(f"{one}.") for one in plan.per_head):
        yield f"'{name}' trains, and each process calls it with its own heads: {WAY_OUT}"
    # (A bare parameter's update, of `target_parameters`, is a module that was never another.)
    if COPY not in name.split(".") and not isinstance(module, LoRALinear):
        yield f"'{name}' trains, and is no linear layer: {WAY_OUT}"
