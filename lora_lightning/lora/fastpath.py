"""Which of torch's own attention modules must call what they hold, because an adapter is inside.

`nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` hand weights to fused kernels in eval
mode, past every adapter. Those with something adapted inside get a class that calls it; the others keep the kernels.
"""

from __future__ import annotations

from torch import nn

from lora_lightning.lora.layers import (
    AdaptedLayer,
    AttentionHost,
    EncoderHost,
    EncoderLayerHost,
    Grafted,
    SavedCopy,
    graft,
)
from lora_lightning.lora.layers.graft import own_forward_calls_super

HOSTS: tuple[type[Grafted], ...] = (AttentionHost, EncoderLayerHost, EncoderHost)


def open_hosts(modules: list[nn.Module], adapted: list[nn.Module]) -> None:
    """Let every one of them call the adapted or saved modules that it holds."""
    inside = set(adapted)
    for module in modules:
        if isinstance(module, nn.MultiheadAttention):
            if not isinstance(module, AttentionHost) and isinstance(module.out_proj, AdaptedLayer | SavedCopy):
                graft(module, AttentionHost)
        elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            is_layer = isinstance(module, nn.TransformerEncoderLayer)
            # One with a forward all its own takes none of torch's kernels.
            is_torchs = own_forward_calls_super(
                type(module), nn.TransformerEncoderLayer if is_layer else nn.TransformerEncoder
            )
            if is_torchs and inside.intersection(module.modules()) - {module}:
                graft(module, EncoderLayerHost if is_layer else EncoderHost)
