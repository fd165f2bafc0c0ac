"""What PEFT reads otherwise than it is meant, or not at all, in a directory that `load_adapter` opens without loss.

Seen with PEFT 0.21.2 and transformers 5.24; the tests would notice when one of these limits goes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from lora_lightning.lora.errors import AdapterWarning, some
from lora_lightning.lora.formats.peft.packing import Packed
from lora_lightning.lora.formats.peft.write import common_dropout, other_dropouts
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import LoRALinear, SavedCopy
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a

# Model types whose experts PEFT fuses as it reads a config: there it takes a target whose name ends in one of an
# expert's old layers for the experts themselves, though it is a dense or a shared layer.
QWEN2_MOE_LIKE = {
    *{"Dots3NoteTextModel", "UnlimitedOcrTextModel", "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3"},
    *{"deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe"},
    *{"glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next"},
    *{"qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open"},
}
MIXTRAL_LIKE = {"mixtral", "minimax", "minimax_m2"}
EXPERT_LAYERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(QWEN2_MOE_LIKE, ("gate", "gate_proj", "up_proj", "down_proj")),
    **dict.fromkeys(MIXTRAL_LIKE, ("gate", "w1", "w2", "w3")),
}


def warn_of_peft_limits(model: nn.Module, packed: list[Packed]) -> None:
    """One AdapterWarning for each limit that this adapter meets, with the modules' names."""
    for what, names in _limits(model, packed):
        named = some([f"'{name}'" for name in names])
        warnings.warn(f"PEFT {what}: {named}; load_adapter reads all of it", AdapterWarning, stacklevel=3)


def _limits(model: nn.Module, packed: list[Packed]) -> Iterator[tuple[str, list[str]]]:
    found = [
        ("matches modules_to_save by the ends of names, within a word too, and misses tensors for", _caught(model)),
        ("adapts one place of a module that stands in several", _in_two_places(model, packed)),
        (f"knows one dropout, {common_dropout(packed):g}, and would train on with it in", list(other_dropouts(packed))),
        ("counts the update of an attention's out_proj twice (its issue 3774)", _out_projs(packed)),
        ("refuses an attention with kdim or vdim", _odd_attentions(packed)),
        ("cannot run an adapted convolution with dilation", _dilated(packed)),
        ("pads an adapted convolution's update with zeros, whatever its padding_mode", _padded(packed)),
        (
            "takes these for fused experts as it reads the config, and drops their update",
            _taken_for_experts(model, packed),
        ),
    ]
    yield from ((what, names) for what, names in found if names)


def _caught(model: nn.Module) -> list[str]:
    saved = [name for name, _ in grafted_modules(model, SavedCopy)]
    inside = tuple(f"{name}." for name in saved)
    others = [n for n, _ in model.named_modules() if n not in saved and not n.startswith(inside)]
    return [other for other in others if any(other.endswith(name) for name in saved)]


def _in_two_places(model: nn.Module, packed: list[Packed]) -> list[str]:
    places: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[module] = places.get(module, 0) + 1
    return [p.name for p in packed if places[p.layer.lora_owner] > 1]


def _out_projs(packed: list[Packed]) -> list[str]:
    return [p.name for p in packed if isinstance(p.layer, LoRALinear) and p.name != p.peft_name]


def _odd_attentions(packed: list[Packed]) -> list[str]:
    owners = {p.name: p.layer.lora_owner for p in packed}
    return [n for n, m in owners.items() if isinstance(m, nn.MultiheadAttention) and not m._qkv_same_embed_dim]


def _dilated(packed: list[Packed]) -> list[str]:
    return [p.name for p in packed if isinstance(m := p.layer, nn.modules.conv._ConvNd) and set(m.dilation) != {1}]


def _padded(packed: list[Packed]) -> list[str]:
    return [p.name for p in packed if isinstance(m := p.layer, nn.modules.conv._ConvNd) and m.padding_mode != "zeros"]


def _taken_for_experts(model: nn.Module, packed: list[Packed]) -> list[str]:
    if not is_a(model, HF_MODEL):
        return []
    layers = EXPERT_LAYERS.get(str(model.config.model_type), ())  # type: ignore[union-attr]
    return [p.name for p in packed if isinstance(p.layer, nn.Linear) and p.name.rpartition(".")[2] in layers]
