"""`nn.Embedding` and its subclasses, such as Gemma's, which scales its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.config import LayerSettings
from lora_lightning.lora.init.random import init_random_
from lora_lightning.lora.layers.base import WHOLE, AdaptedLayer, Layout
from lora_lightning.lora.layers.class_swap import own_forward_calls_super
from lora_lightning.lora.layers.functional import lora_delta


class LoRAEmbedding(AdaptedLayer, nn.Embedding):
    """`h = W0[x] + s B A[:, x]`: A is (r, number of rows), B is (width, r).

    A starts at zero and B is random, as in loralib and PEFT: a row that is never looked up, and the padding row, whose
    gradient is zero, keep W0's value. `max_norm` bounds the norm of the adapted row; W0 is not rewritten.
    """

    kind = "Embedding"
    dora_dim = 1
    part_dim = 0
    peft_ends = AdaptedLayer.peft_ends | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}

    @classmethod
    def layout(cls, module: Any, settings: LayerSettings) -> Layout:
        rows, width, r = module.num_embeddings, module.embedding_dim, settings.r
        return Layout((r, rows), (width, r), min(rows, width))

    @classmethod
    def refusal(cls, module: Any, settings: LayerSettings) -> str | None:
        if not own_forward_calls_super(type(module), nn.Embedding):
            return (
                f"{type(module).__name__} has a forward of its own that reads its weight, so the adapter would be"
                f" ignored: exclude it, or name its weight in target_parameters"
            )
        if settings.use_dora and module.max_norm is not None:
            return "it has max_norm, which bounds each row, and DoRA rescales each column: switch one of them off"
        return super().refusal(module, settings)

    def forward(self, input: Tensor) -> Tensor:
        """Whole numbers (...) to (..., width)."""
        if self.max_norm is not None:
            return self._forward_with_max_norm(input)
        out = super().forward(input)
        return self.lora_finish(out + self.lora_update(input, out.dtype)) if self.lora_enabled else out

    def lora_update(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """`s B A[:, ids]`, (..., width); as in `nn.Embedding`, the padding row gets no gradient."""
        A, s = self.lora_A.t(), self.lora_settings
        z = F.embedding(ids, A, padding_idx=self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        update = F.linear(z.to(dtype) * s.scale, self.lora_B.to(dtype))
        if self.lora_dropout is None:
            return update
        # A's input is one-hot: dropping its entry drops the whole update.
        return update * self.lora_input(torch.ones_like(ids, dtype=dtype)).unsqueeze(-1)

    def _forward_with_max_norm(self, ids: Tensor) -> Tensor:
        """Clip norms as `nn.Embedding` does, without a gradient through the clipping; but W0 does not change."""
        rows = self.weight[ids]
        if not self.lora_enabled:
            return self._clip_norms(rows)
        update = self.lora_update(ids, rows.dtype)
        return self._clip_norms(rows + update) + (update - update.detach())

    @torch.no_grad()
    def _clip_norms(self, rows: Tensor) -> Tensor:
        """Clip by the kernel with which `nn.Embedding` rewrites W0."""
        assert self.max_norm is not None
        flat = rows.detach().reshape(-1, rows.shape[-1]).clone()
        index = torch.arange(flat.shape[0], device=flat.device)
        return torch.embedding_renorm_(flat, index, self.max_norm, self.norm_type).view_as(rows)

    def draw_factors(self) -> None:
        """Set A to zero and draw B."""
        init_random_(self.lora_B.t(), self.lora_A, self.lora_settings.init)

    def delta_weight(self, part: slice = WHOLE, name: str = "weight") -> Tensor:
        """Parts are along the rows."""
        return lora_delta(self.lora_A[:, part], self.lora_B, self.lora_settings.scale, self._lora_dtype()).mT
