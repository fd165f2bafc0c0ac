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
from lora_lightning.lora.layers.class_swap import own_forward_calls_super

HOSTS: tuple[type[Grafted], ...] = (AttentionHost, EncoderLayerHost, EncoderHost)


def open_hosts(modules: list[nn.Module], adapted: list[nn.Module]) -> None:
    """Let every one of them call the adapted or saved modules that it holds."""
    for module in modules:
        is_torchs = isinstance(module, nn.MultiheadAttention) and not isinstance(module, AttentionHost)
        if is_torchs and isinstance(module.out_proj, AdaptedLayer | SavedCopy):
            graft(module, AttentionHost)
    open_encoders(modules, adapted)


def open_encoders(
    modules: list[nn.Module], adapted: list[nn.Module], encoder_host: type[EncoderHost] = EncoderHost
) -> None:
    """The same for torch's encoders and their layers alone."""
    inside = set(adapted)
    for module in modules:
        for kind, host in ((nn.TransformerEncoderLayer, EncoderLayerHost), (nn.TransformerEncoder, encoder_host)):
            # One with a forward all its own takes none of torch's kernels.
            is_torchs = isinstance(module, kind) and own_forward_calls_super(type(module), kind)
            if is_torchs and inside.intersection(module.modules()) - {module}:
                graft(module, host)
