"""Layers whose parent reads their weight instead of calling them: an adapter on such a layer would be ignored.

The table lists those of transformers, timm and torchvision. Others are found in training by the guard at the first
backward, since a bypassed adapter gets no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.layers import kind_of
from lora_lightning.lora.layers.attention import OutProj

# Package, the end of the parent's full class name (a regular expression), its children; from the forwards of
# transformers 5.24, timm 1.0.31 and torchvision 0.28. State space models pass weights to a fused kernel on a GPU, and
# to another function while they generate; attentions pass theirs to F.linear or to F.multi_head_attention_forward;
# learned queries and relative positions are tables that are read whole.
BYPASSES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("transformers", r"(Falcon)?MambaMixer", ("conv1d", "x_proj", "dt_proj", "out_proj")),
    ("transformers", r"(Bamba|FalconH1|Mamba2|NemotronHMamba2|Zamba2Mamba)Mixer", ("conv1d", "out_proj")),
    ("transformers", r"GraniteMoeHybridMambaLayer", ("conv1d", "out_proj")),
    ("transformers", r"JambaMambaMixer", ("conv1d", "dt_proj")),
    ("transformers", r"ZambaMambaMixer|\w+(GatedDeltaNet|DeltaAttention|ShortConvolution)", ("conv1d",)),
    ("transformers", r"Glm5NextTextLinearAttention", ("conv1d",)),
    ("transformers", r"Lfm\d\w*ShortConv", ("conv",)),
    ("transformers", r"WavLMAttention", ("q_proj", "k_proj", "v_proj", "out_proj")),
    ("transformers", r"\w+MHAttentionMap", ("k_proj", "k_linear")),
    ("transformers", r"Deberta(V2)?Encoder|SEWDTransformerEncoder", ("rel_embeddings",)),
    ("transformers", r"LayoutLMv2Encoder", ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")),
    ("transformers", r"MobileBertLMPredictionHead", ("dense", "decoder")),
    ("transformers", r"LongcatFlashTopkRouter", ("classifier",)),
    ("transformers", r"NeoMMEForMaskedLM", ("unembedding_projection",)),
    ("transformers", r"DiffusionGemmaDecoderModel", ("embed_tokens",)),
    ("transformers", r"TDNNLayer", ("kernel",)),
    ("transformers", r"(\w*Detr|\w*GroundingDino|TableTransformer)Model", ("query_position_embeddings",)),
    ("transformers", r"\w*GroundingDinoModel|Sam3\w*DetrDecoder", ("reference_points", "query_embed")),
    ("transformers", r"(Mask2|Mask|One)FormerTransformerModule", ("queries_embedder", "queries_features")),
    ("transformers", r"(EdgeTam|Sam)\w*PromptEncoder", ("not_a_point_embed", "no_mask_embed")),
    ("transformers", r"(EdgeTam|Sam)\w*MaskDecoder", ("mask_tokens", "iou_token", "obj_score_token", "hq_token")),
    ("transformers", r"\w+VQVAEVectorQuantizer", ("embedding",)),
    ("timm", r"beit\.Attention|EvaAttention|swin_transformer_v2\.WindowAttention", ("qkv",)),
    ("timm", r"NaFlexEmbeds", ("proj",)),
    ("timm", r"MLDecoder", ("query_embed",)),
    ("torchvision", r"ShiftedWindowAttention(V2|3d)?", ("qkv", "proj")),
)


def _children_read(parent: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weight the class reads."""
    read: set[str] = set()
    for package, pattern, children in BYPASSES:
        if _is_a(parent, package, pattern):
            read.update(children)
    return frozenset(read)


def _is_a(cls: type, package: str, pattern: str) -> bool:
    """Whether the class or one of its bases has such a full name."""
    full = re.compile(rf"{package}\.(?:.+\.)?(?:{pattern})")
    return any(full.fullmatch(f"{base.__module__}.{base.__qualname__}") for base in cls.__mro__)


def bypassed_modules(names: dict[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """Modules whose parent reads their weight, each with the reason not to adapt it."""
    bypassed: dict[nn.Module, str] = {}
    for module in names:
        children = _children_read(type(module))
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            children |= set() if isinstance(module.out_proj, OutProj) else {"out_proj"}  # of another class
        for name in children:
            child = module._modules.get(name)
            if child is not None and kind_of(child) is not None:
                reason = f"{type(module).__name__} reads its weight and may never call it, so an adapter there would be"
                bypassed.setdefault(
                    child, f"{reason} ignored: name '{name}.weight' in target_parameters, or leave it out"
                )
    return bypassed


def refuse_uncalled(names: dict[nn.Module, list[str]], chosen: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise a TargetError for the `shared` table of transformers' T5, BART and others, which call its twins alone.

    Rows of it can train (`trainable_token_indices`): they train in every module that has the weight.
    """
    parents = [module for module in names if _is_a(type(module), "transformers", r"\w+")]
    tables = [table for parent in parents if isinstance(table := parent._modules.get("shared"), nn.Embedding)]
    for name, module in chosen:
        if module in tables and all(place.rpartition(".")[2] == "shared" for place in names[module]):
            raise TargetError(
                f"cannot adapt '{name}': the model only calls the embed_tokens that share its weight, so an adapter"
                " there would be ignored: name one of those, such as 'encoder.embed_tokens'"
            )


def parametrized_modules(names: dict[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """Modules with a parametrization such as weight norm, and the reason not to adapt them."""
    reason = "its weight is computed from other parameters (a parametrization), so no update can be folded into it"
    weights = {m: "in_proj_weight" if isinstance(m, nn.MultiheadAttention) else "weight" for m in names if kind_of(m)}
    return {m: reason for m, weight in weights.items() if weight not in m._parameters}
