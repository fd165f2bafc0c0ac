"""`nn.TransformerEncoderLayer` and `nn.TransformerEncoder`: their fused kernel reads weights and calls no module.

Grafted, they call what they hold, so that adapters inside count, in the kernel's own arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.lora.layers import kernel
from lora_lightning.lora.layers.class_swap import Grafted


class EncoderLayerHost(Grafted, nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` with something adapted inside: never computed by the kernel that ignores it."""

    @property
    def activation_relu_or_gelu(self) -> int:  # type: ignore[override]
        """0 while adapters are on: by torch's own rule the kernel is then not taken, whatever else is true."""
        return 0 if self.lora_enabled else self._own_activation()

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value

    def _own_activation(self) -> int:
        return int(self.__dict__["activation_relu_or_gelu"])

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As `nn.TransformerEncoderLayer.forward`; (n, l, e), or nested where the kernel takes that."""
        if self.lora_enabled and src.is_nested:
            return self._on_rows(src)
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        """The masks have become floats on the way; the kernel knows boolean ones, and so does attention's own."""
        if self.lora_enabled and kernel.takes_layer(self, self._own_activation(), x):
            attn_mask, key_padding_mask = kernel.as_bool(attn_mask), kernel.as_bool(key_padding_mask)
        return super()._sa_block(x, attn_mask, key_padding_mask, is_causal)

    def _on_rows(self, src: Tensor) -> Tensor:
        """The layer on a nested tensor: all but attention sees one matrix of rows, in which is no padding."""

        def attend(x: Tensor) -> Tensor:
            nested = kernel.nested_like(src, x)
            return kernel.rows(self.self_attn(nested, nested, nested, need_weights=False)[0])

        x = kernel.rows(src)
        if self.norm_first:
            x = x + attend(self.norm1(x))
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + attend(x))
            x = self.norm2(x + self._ff_block(x))
        return kernel.nested_like(src, x)


class EncoderHost(Grafted, nn.TransformerEncoder):
    """`nn.TransformerEncoder` that packs padded batches into nested tensors only where its layers can compute them."""

    @property
    def use_nested_tensor(self) -> bool:  # type: ignore[override]
        """False while gradients are recorded: attention has no backward for nested tensors outside of the kernel."""
        own = bool(self.__dict__["use_nested_tensor"])
        return own and (not self.lora_enabled or self._can_nest())

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value

    def _can_nest(self) -> bool:
        return kernel.possible(next(self.parameters()).device) and not torch.is_autocast_enabled()
