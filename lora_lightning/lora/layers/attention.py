"""`nn.MultiheadAttention`: its projections are weights that it reads, not layers that it calls.

Grafted, it computes the same with its projections called, so that in_proj's update is added to what in_proj gives
and `out_proj`, adapted as the `nn.Linear` that it is, counts once. W0 is only read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.layers import kernel
from lora_lightning.lora.layers.attention_kernel import attend, float_mask, length_first
from lora_lightning.lora.layers.base import WHOLE, AdaptedLayer, LayerSettings
from lora_lightning.lora.layers.class_swap import Grafted
from lora_lightning.lora.layers.functional import block_rows, lora_delta, lora_update, unblock_rows
from lora_lightning.lora.targets.fused_projections import Slices

PARTS = ("q", "k", "v")


class AttentionHost(Grafted, nn.MultiheadAttention):
    """`nn.MultiheadAttention` that calls its projections, also where torch would take its fused kernel."""

    as_kernel: ClassVar[bool] = True
    """Whether it then rounds as that kernel does, with one product for q, k and v."""

    def forward(  # torch's signature
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if not self.lora_enabled:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if self.as_kernel and kernel.takes(self, (query, key, value), attn_mask, key_padding_mask):
            return self._as_kernel(query, attn_mask, key_padding_mask, need_weights, average_attn_weights)
        if query.is_nested:
            raise TypeError("adapted attention takes nested tensors on the CPU in eval without gradients: pad them")
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        inputs, batched = length_first((query, key, value), self.batch_first)
        padding = float_mask(key_padding_mask, query.dtype)
        if padding is not None and not batched:
            padding = padding.unsqueeze(0)
        hint = is_causal and padding is None and not need_weights  # then SDPA makes the mask itself, as in torch
        out, weights = attend(
            *self.project(*inputs),
            self.out_proj,
            num_heads=self.num_heads,
            attn_mask=None if hint else float_mask(attn_mask, query.dtype),
            key_padding_mask=padding,
            bias_k=self.bias_k,
            bias_v=self.bias_v,
            add_zero_attn=self.add_zero_attn,
            dropout=self.dropout if self.training else 0.0,
            is_causal=hint,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
        )
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out.transpose(0, 1) if self.batch_first else out, weights

    def _as_kernel(
        self, x: Tensor, attn_mask: Tensor | None, padding: Tensor | None, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of x (n, length, width) with the roundings of torch's fused kernel."""
        mask: Tensor | None = None
        mask_type: int | None = None
        if not x.is_nested:
            mask, mask_type = self.merge_masks(attn_mask, padding, x)
        return kernel.attend(
            x,
            self.project_as_one,
            self.in_proj_bias,
            self.out_proj,
            num_heads=self.num_heads,
            mask=mask,
            mask_type=mask_type,
            need_weights=need_weights,
            average_attn_weights=average,
        )

    def project_as_one(self, x: Tensor) -> Tensor:
        """`x W0^T` of q, k and v side by side, (..., 3 width), without the bias."""
        return F.linear(x, self.in_proj_weight)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x W0^T + b` of each input, (length, n, width), with as few products as torch takes."""
        bias = self.in_proj_bias
        if self.in_proj_weight is None:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            q, k, v = (F.linear(*parts) for parts in zip((query, key, value), weights, biases, strict=True))
        elif query is key and key is value:
            q, k, v = _parted(F.linear(query, self.in_proj_weight, bias), 3)
        else:
            sizes = [self.embed_dim, 2 * self.embed_dim] if key is value else [self.embed_dim] * 3
            inputs = (query, key) if key is value else (query, key, value)
            biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
            outs = [F.linear(*p) for p in zip(inputs, torch.split(self.in_proj_weight, sizes), biases, strict=True)]
            q, k, v = [outs[0], *_parted(outs[1], 2)] if key is value else outs
        return q, k, v


class LoRAMultiheadAttention(AdaptedLayer, AttentionHost):
    """`nn.MultiheadAttention` with in_proj adapted.

    As one (PEFT's way): A (r, width) is shared by q, k and v, B is (3 width, r). With chosen parts, or with `kdim` or
    `vdim`: each part has its own, A being (r, the parts' inputs side by side) and B (the parts' rows, r).
    """

    kind = "MultiheadAttention"
    linear_like = True

    @classmethod
    def output_rows(cls, module: nn.Module) -> int:
        """Outputs of the in-projection, for the layout of its parts."""
        return 3 * int(_attention(module).embed_dim)

    @classmethod
    def factor_shapes(cls, module: nn.Module, settings: LayerSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
        width, taken = _attention(module).embed_dim, _taken(module, settings)
        if taken is None:
            return (settings.r, width), (3 * width, settings.r)
        inputs = sum(_inputs(module)[part] for part in taken)
        return (settings.r, inputs), (len(taken) * width, settings.r)

    @classmethod
    def largest_rank(cls, module: nn.Module, settings: LayerSettings) -> int:
        taken = _taken(module, settings) or PARTS
        return min(int(_attention(module).embed_dim), *(_inputs(module)[part] for part in taken))

    @classmethod
    def refusal(cls, module: nn.Module, settings: LayerSettings) -> str | None:
        return host_refusal(module)

    @classmethod
    def adapted_parameters(cls, module: nn.Module, settings: LayerSettings) -> dict[str, nn.Parameter]:
        if _attention(module).in_proj_weight is not None:
            return {"in_proj_weight": _attention(module).in_proj_weight}
        names = [f"{part}_proj_weight" for part in _taken(module, settings) or PARTS]
        return {name: module.get_parameter(name) for name in names}

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x W0^T + b + s (x A^T) B^T` of each input."""
        out = dict(zip(PARTS, super().project(query, key, value), strict=True))
        inputs = dict(zip(PARTS, (query, key, value), strict=True))
        for part, (A, B) in self._pairs().items():
            out[part] = out[part] + lora_update(self.lora_input(inputs[part]), A, B, self.lora_settings.scale)
        return out["q"], out["k"], out["v"]

    def project_as_one(self, x: Tensor) -> Tensor:
        """`x W0^T + s (x A^T) B^T`, the update in the columns of each adapted part."""
        out = dict(zip(PARTS, super().project_as_one(x).chunk(3, dim=-1), strict=True))
        for part, (A, B) in self._pairs().items():
            out[part] = out[part] + lora_update(self.lora_input(x), A, B, self.lora_settings.scale)
        return torch.cat([out[part] for part in PARTS], dim=-1)

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (width, r) of each adapted part."""
        taken = _taken(self, self.lora_settings)
        if taken is None:
            return dict(zip(PARTS, ((self.lora_A, B) for B in self.lora_B.chunk(3)), strict=True))
        own = torch.split(self.lora_A, [_inputs(self)[part] for part in taken], dim=1)
        return dict(zip(taken, zip(own, torch.split(self.lora_B, self.embed_dim), strict=True), strict=True))

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        return super().factor_pairs() if _taken(self, self.lora_settings) is None else list(self._pairs().values())

    def updates(self) -> Iterator[tuple[str, tuple[slice, ...], Tensor, Tensor]]:
        weights = self.adapted_parameters(self, self.lora_settings)
        for name, delta in self.weight_deltas().items():
            yield name, (), weights[name].to(delta.dtype), delta

    def weight_deltas(self) -> dict[str, Tensor]:
        """The update of each weight, by its name."""
        dtype, scale = self._lora_dtype(), self.lora_settings.scale
        if self.in_proj_weight is not None:
            factors = self.to_peft()
            return {"in_proj_weight": lora_delta(factors["lora_A"], factors["lora_B"], scale, dtype)}
        return {f"{part}_proj_weight": lora_delta(A, B, scale, dtype) for part, (A, B) in self._pairs().items()}

    def delta_weight(self, part: slice = WHOLE) -> Tensor:
        """Of q, k and v, one above the other, where the weight is one."""
        return self.weight_deltas()["in_proj_weight"]

    def reset_parameters(self) -> None:
        """Called for modules from the meta device; torch names its own differently here."""
        self._reset_parameters()
        self.reset_lora_parameters()

    def peft_rank(self) -> int:
        return self.lora_settings.r * (len(self._pairs()) if self._slices() else 1)

    def _slices(self) -> Slices | None:
        """The layout, where the parts of one weight are adapted apart. PEFT has no form for three weights."""
        return self.lora_settings.slices if self.in_proj_weight is not None else None

    def to_peft(self) -> dict[str, Tensor]:
        slices = self._slices()
        if slices is None:
            return super().to_peft()
        A = torch.cat(torch.split(self.lora_A, self.embed_dim, dim=1))
        return {**super().to_peft(), "lora_A": A, "lora_B": block_rows(self.lora_B, slices)}

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        slices = self._slices()
        if slices is None:
            return dict(tensors)
        A = torch.cat(torch.split(tensors["lora_A"], self.lora_settings.r), dim=1)
        return {**tensors, "lora_A": A, "lora_B": unblock_rows(tensors["lora_B"], slices)}


def host_refusal(module: nn.Module) -> str | None:
    """Why this attention's projections cannot be adapted; None where they can."""
    if type(module).forward not in (nn.MultiheadAttention.forward, AttentionHost.forward):
        return (
            f"{type(module).__name__} has a forward of its own that reads the projections' weights, so the adapter"
            f" would be ignored: exclude it"
        )
    return None


def _parted(projected: Tensor, count: int) -> list[Tensor]:
    """Equal parts of the last dimension, each in one piece of memory as in torch: products then round alike."""
    return [part.contiguous() for part in projected.chunk(count, dim=-1)]


def _taken(module: nn.Module, settings: LayerSettings) -> tuple[str, ...] | None:
    """The parts with an A of their own; None where all of them share one."""
    if settings.slices is not None:
        return settings.slices.taken
    return None if _attention(module).in_proj_weight is not None else PARTS


def _inputs(module: nn.Module) -> dict[str, int]:
    attention = _attention(module)
    return {"q": attention.embed_dim, "k": attention.kdim, "v": attention.vdim}


def _attention(module: nn.Module) -> nn.MultiheadAttention:
    assert isinstance(module, nn.MultiheadAttention)
    return module
