"""Presets of target modules for the common transformers architectures: `query-value`, `attention`, `mlp`.

`query-value` is what the paper adapts, and PEFT by default. A preset is a regular expression on the dotted end of a
module's full name, chosen by the model's `config.model_type`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lora_lightning.lora.errors import TargetError, did_you_mean
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a

PRESETS = ("query-value", "attention", "mlp")


class Layout(NamedTuple):
    """A family's patterns for its projections; None where they are no separate linear layers."""

    query_value: str | None
    attention: str | None
    mlp: str | None
    fused: bool = False
    """Whether query and value are parts of one projection, whose layout `slices` knows."""


_LLAMA = Layout(r"self_attn\.[qv]_proj", r"self_attn\.[qkvo]_proj", r"mlp\.(gate|up|down)_proj")
_BART = Layout(
    r"(self|encoder)_attn\.[qv]_proj", r"(self|encoder)_attn\.(q|k|v|out)_proj", r"(layers\.\d+|mlp)\.fc[12]"
)
_BERT = Layout(
    r"attention\.self\.(query|value)",
    r"attention\.self\.(query|key|value)|attention\.output\.dense",
    r"intermediate\.dense|\d+\.output\.dense",
)
_VIT = Layout(r"attention\.[qv]_proj", r"attention\.[qkvo]_proj", r"mlp\.fc[12]")
_ENCODER_DECODER = r"(SelfAttention|EncDecAttention)"
_T5 = Layout(rf"{_ENCODER_DECODER}\.[qv]", rf"{_ENCODER_DECODER}\.[qkvo]", r"DenseReluDense\.(wi|wi_0|wi_1|wo)")
_GPT2 = Layout(None, r"attn\.c_(attn|proj)", r"mlp\.c_(fc|proj)")
_NEOX = Layout(None, r"(attention|self_attention)\.(query_key_value|dense)", r"mlp\.dense_(h_to_4h|4h_to_h)")
_FUSED_NEOX = _NEOX._replace(query_value=r"(attention|self_attention)\.query_key_value", fused=True)
_DEBERTA_ATTENTION = r"attention\.self\.(query|key|value)_proj|attention\.output\.dense"

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    **dict.fromkeys(("stablelm", "olmo2", "smollm3", "cohere", "granite"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _LLAMA._replace(mlp=None)),
    **dict.fromkeys(("bart", "whisper", "opt", "clip"), _BART),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    **dict.fromkeys(("vit", "dinov2", "beit"), _VIT),
    **dict.fromkeys(("t5", "mt5"), _T5),
    "gpt2": _GPT2._replace(query_value=r"attn\.c_attn", fused=True),
    "gpt_bigcode": _GPT2,
    **dict.fromkeys(("gpt_neox", "bloom"), _FUSED_NEOX),
    "falcon": _NEOX,
    "starcoder2": _LLAMA._replace(mlp=_GPT2.mlp),
    "phi": Layout(_LLAMA.query_value, r"self_attn\.([qkv]_proj|dense)", _VIT.mlp),
    "phi3": Layout(r"self_attn\.qkv_proj", r"self_attn\.(qkv|o)_proj", r"mlp\.(gate_up|down)_proj", fused=True),
    "gptj": Layout(r"attn\.[qv]_proj", r"attn\.(q|k|v|out)_proj", r"mlp\.fc_(in|out)"),
    "gpt_neo": Layout(r"attention\.[qv]_proj", r"attention\.(q|k|v|out)_proj", _GPT2.mlp),
    "mpt": Layout(None, r"attn\.(Wqkv|out_proj)", r"ffn\.(up|down)_proj"),
    "modernbert": Layout(None, r"attn\.(Wqkv|Wo)", r"mlp\.(Wi|Wo)"),
    "distilbert": Layout(r"attention\.[qv]_lin", r"attention\.(q|k|v|out)_lin", r"ffn\.lin[12]"),
    "deberta-v2": Layout(r"attention\.self\.(query|value)_proj", _DEBERTA_ATTENTION, _BERT.mlp),
    "convnext": Layout(None, None, r"pwconv[12]"),
}


def preset_pattern(model: nn.Module, target_modules: str | list[str]) -> str | None:
    """A preset's regular expression for this model, None for no preset; a TargetError where the model has none."""
    if not isinstance(target_modules, str) or target_modules not in PRESETS:
        return None
    model_type = _model_type(model, target_modules)
    layout = LAYOUTS.get(model_type)
    if layout is None:
        raise TargetError(
            f"no preset '{target_modules}' for model_type '{model_type}'{did_you_mean(model_type, LAYOUTS)};"
            f" name the modules, or use 'all-linear'"
        )
    choices = {"query-value": layout.query_value, "attention": layout.attention, "mlp": layout.mlp}
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
    return ["q", "v"] if LAYOUTS[_model_type(model, "query-value")].fused else []


def _model_type(model: nn.Module, preset: str) -> str:
    for module in model.modules():
        if is_a(module, HF_MODEL):
            return str(module.config.model_type)  # type: ignore[union-attr]
    raise TargetError(
        f"preset '{preset}' goes by a transformers model's config.model_type, and {type(model).__name__} has none:"
        f" name the modules, or use 'all-linear'"
    )
