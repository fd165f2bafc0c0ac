"""Which biases `bias: all` and `bias: lora_only` train, and how they are put in."""

from __future__ import annotations

from torch import nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.layers import TrainedBias
from lora_lightning.lora.layers.class_swap import graft
from lora_lightning.lora.targets.select import Selection


def biases_to_train(
    model: nn.Module, config: LoRAConfig, selection: Selection, *, required: bool = True
) -> list[nn.Module]:
    """The modules whose parameter `bias` trains, in the model's order; those in `modules_to_save` train theirs anyway.

    Raises:
        TargetError: biases are asked for and there are none, where they are `required`.
    """
    if config.bias == "none":
        return []
    if config.bias == "all":
        inside_saved = {module for _, saved in selection.saved for module in saved.modules()}
        candidates = [module for module in model.modules() if module not in inside_saved]
    else:
        candidates = list(dict.fromkeys(target.module for target in selection.targets))
    biased = [module for module in candidates if has_bias(module)]
    if not biased and required:
        whose = "no module" if config.bias == "all" else "none of the selected modules"
        raise TargetError(f"bias '{config.bias}': {whose} has a bias to train: use bias 'none'")
    return biased


def has_bias(module: nn.Module) -> bool:
    """True for a module with a floating-point parameter of that name."""
    bias = module._parameters.get("bias")
    return bias is not None and bias.is_floating_point()


def train_biases(modules: list[nn.Module]) -> None:
    """Graft a trained copy of its bias onto each module, outside whatever else was grafted."""
    copies: dict[int, nn.Parameter] = {}
    for module in modules:
        graft(module, TrainedBias)
        assert isinstance(module, TrainedBias)
        module.add_bias(copies)
