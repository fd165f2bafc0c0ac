"""Presets of target modules for the common transformers architectures: `query-value`, `attention`, `mlp`.

`query-value` is what the paper adapts, and PEFT by default. A preset is a regular expression on the dotted end of a
module's full name, chosen by the model's `config.model_type`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from lora_lightning.lora.errors import TargetError, did_you_mean
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a

PRESETS = ("query-value", "attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A family's patterns for its projections; None where they are no separate linear layers."""

    query_value: str | None
    query_value_of: str | None = None
    """The fused projection that holds query and value as parts, where `slices` knows its layout."""
    attention: str | None
    mlp: str | None


_LLAMA = Layout(
    query_value=r"self_attn\.[qv]_proj", attention=r"self_attn\.[qkvo]_proj", mlp=r"mlp\.(gate|up|down)_proj"
)
_MOE = Layout(query_value=_LLAMA.query_value, attention=_LLAMA.attention, mlp=None)
_BART = Layout(
    query_value=r"(self|encoder)_attn\.[qv]_proj",
    attention=r"(self|encoder)_attn\.(q|k|v|out)_proj",
    mlp=r"(layers\.\d+|mlp)\.fc[12]",
)
_BERT = Layout(
    query_value=r"attention\.self\.(query|value)",
    attention=r"attention\.self\.(query|key|value)|attention\.output\.dense",
    mlp=r"intermediate\.dense|\d+\.output\.dense",
)
_VIT = Layout(query_value=r"attention\.[qv]_proj", attention=r"attention\.[qkvo]_proj", mlp=r"mlp\.fc[12]")
_T5 = Layout(
    query_value=r"(SelfAttention|EncDecAttention)\.[qv]",
    attention=r"(SelfAttention|EncDecAttention)\.[qkvo]",
    mlp=r"DenseReluDense\.(wi|wi_0|wi_1|wo)",
)
_GPT2 = Layout(query_value=None, attention=r"attn\.c_(attn|proj)", mlp=r"mlp\.c_(fc|proj)")
_NEOX = Layout(
    query_value=None,
    attention=r"(attention|self_attention)\.(query_key_value|dense)",
    mlp=r"mlp\.dense_(h_to_4h|4h_to_h)",
)
_IN_NEOX = replace(_NEOX, query_value_of=r"(attention|self_attention)\.query_key_value")

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    **dict.fromkeys(("stablelm", "olmo2", "smollm3", "cohere", "granite"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _MOE),
    **dict.fromkeys(("bart", "whisper", "opt", "clip"), _BART),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    **dict.fromkeys(("vit", "dinov2", "beit"), _VIT),
    **dict.fromkeys(("t5", "mt5"), _T5),
    "gpt2": replace(_GPT2, query_value_of=r"attn\.c_attn"),
    "gpt_bigcode": _GPT2,
    **dict.fromkeys(("gpt_neox", "bloom"), _IN_NEOX),
    "falcon": _NEOX,
    "starcoder2": Layout(query_value=_LLAMA.query_value, attention=_LLAMA.attention, mlp=r"mlp\.c_(fc|proj)"),
    "phi": Layout(query_value=_LLAMA.query_value, attention=r"self_attn\.([qkv]_proj|dense)", mlp=r"mlp\.fc[12]"),
    "phi3": Layout(
        query_value=None,
        query_value_of=r"self_attn\.qkv_proj",
        attention=r"self_attn\.(qkv|o)_proj",
        mlp=r"mlp\.(gate_up|down)_proj",
    ),
    "gptj": Layout(query_value=r"attn\.[qv]_proj", attention=r"attn\.(q|k|v|out)_proj", mlp=r"mlp\.fc_(in|out)"),
    "gpt_neo": Layout(
        query_value=r"attention\.[qv]_proj", attention=r"attention\.(q|k|v|out)_proj", mlp=r"mlp\.c_(fc|proj)"
    ),
    "mpt": Layout(query_value=None, attention=r"attn\.(Wqkv|out_proj)", mlp=r"ffn\.(up|down)_proj"),
    "modernbert": Layout(query_value=None, attention=r"attn\.(Wqkv|Wo)", mlp=r"mlp\.(Wi|Wo)"),
    "distilbert": Layout(
        query_value=r"attention\.[qv]_lin", attention=r"attention\.(q|k|v|out)_lin", mlp=r"ffn\.lin[12]"
    ),
    "deberta-v2": Layout(
        query_value=r"attention\.self\.(query|value)_proj",
        attention=r"attention\.self\.(query|key|value)_proj|attention\.output\.dense",
        mlp=_BERT.mlp,
    ),
    "convnext": Layout(query_value=None, attention=None, mlp=r"pwconv[12]"),
}


def preset_pattern(model: nn.Module, target_modules: str | list[str]) -> str | None:
    """A preset's regular expression on full names for this model; None where `target_modules` is no preset.

    Raises:
        TargetError: the architecture is unknown, or has no such layers.
    """
    if not isinstance(target_modules, str) or target_modules not in PRESETS:
        return None
    model_type = _model_type(model, target_modules)
    layout = LAYOUTS.get(model_type)
    if layout is None:
        raise TargetError(
            f"no preset '{target_modules}' for model_type '{model_type}'{did_you_mean(model_type, LAYOUTS)};"
            f" name the modules, or use 'all-linear'"
        )
    query_value = layout.query_value or layout.query_value_of
    choices = {"query-value": query_value, "attention": layout.attention, "mlp": layout.mlp}
    pattern = choices[target_modules]
    if pattern is None:
        there = ", ".join(f"'{name}'" for name, choice in choices.items() if choice)
        raise TargetError(
            f"preset '{target_modules}': '{model_type}' has no linear layers that are just that (fused, or bare"
            f" parameters); it has {there}, or name the modules yourself"
        )
    return rf"(?:.*\.)?(?:{pattern})"


def preset_parts(model: nn.Module, target_modules: str | list[str]) -> list[str]:
    """The parts of each selected layer that a preset adapts: query and value of a fused one; empty for whole layers."""
    if target_modules != "query-value":
        return []
    layout = LAYOUTS[_model_type(model, "query-value")]
    return ["q", "v"] if layout.query_value is None else []


def _model_type(model: nn.Module, preset: str) -> str:
    for module in model.modules():
        if is_a(module, HF_MODEL):
            return str(module.config.model_type)  # type: ignore[union-attr]
    raise TargetError(
        f"preset '{preset}' goes by a transformers model's config.model_type, and {type(model).__name__} has none:"
        f" name the modules, or use 'all-linear'"
    )
