"""`nn.Embedding` and its subclasses, such as Gemma's, which scales its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LayerSettings
from lora_lightning.lora.init.random import init_random_
from lora_lightning.lora.layers.base import WHOLE, AdaptedLayer
from lora_lightning.lora.layers.class_swap import own_forward_calls_super
from lora_lightning.lora.layers.functional import clip_norms, embedding_update, lora_delta


class LoRAEmbedding(AdaptedLayer, nn.Embedding):
    """`h = W0[x] + s B A[:, x]`: A is (r, number of rows), B is (width, r).

    A starts at zero and B is random, as in loralib and PEFT: a row that is never looked up, and the padding row, whose
    gradient is zero, keep W0's value. `max_norm` bounds the norm of the adapted row; W0 is not rewritten.
    """

    kind = "Embedding"
    dora_dim = 1
    part_dim = 0

    @classmethod
    def factor_shapes(cls, module: nn.Module, settings: LayerSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert isinstance(module, nn.Embedding)
        return (settings.r, module.num_embeddings), (module.embedding_dim, settings.r)

    @classmethod
    def largest_rank(cls, module: nn.Module, settings: LayerSettings) -> int:
        assert isinstance(module, nn.Embedding)
        return min(module.num_embeddings, module.embedding_dim)

    @classmethod
    def refusal(cls, module: nn.Module, settings: LayerSettings) -> str | None:
        if not own_forward_calls_super(type(module), nn.Embedding):
            return (
                f"{type(module).__name__} has a forward of its own that reads its weight, so the adapter would be"
                f" ignored: exclude it, or name its weight in target_parameters"
            )
        assert isinstance(module, nn.Embedding)
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
        """`s B A[:, ids]`, (..., width)."""
        update = embedding_update(
            ids,
            self.lora_A,
            self.lora_B,
            self.lora_settings.scale,
            dtype=dtype,
            padding_idx=self.padding_idx,
            by_count=self.scale_grad_by_freq,
        )
        if self.lora_dropout is None:
            return update
        # A's input is one-hot: dropping its entry drops the whole update.
        return update * self.lora_input(torch.ones_like(ids, dtype=dtype)).unsqueeze(-1)

    def _forward_with_max_norm(self, ids: Tensor) -> Tensor:
        """Clip norms as `nn.Embedding` does, without a gradient through the clipping; but W0 does not change."""
        assert self.max_norm is not None
        rows = self.weight[ids]
        if not self.lora_enabled:
            return clip_norms(rows, self.max_norm, self.norm_type)
        update = self.lora_update(ids, rows.dtype)
        return clip_norms(rows + update, self.max_norm, self.norm_type) + (update - update.detach())

    def draw_factors(self) -> None:
        """Set A to zero and draw B."""
        init_random_(self.lora_B.t(), self.lora_A, self.lora_settings.init)

    def delta_weight(self, part: slice = WHOLE) -> Tensor:
        """Parts are along the rows."""
        return lora_delta(self.lora_A[:, part], self.lora_B, self.lora_settings.scale, self._lora_dtype()).mT

    @staticmethod
    def peft_keys(name: str) -> dict[str, str]:
        keys = AdaptedLayer.peft_keys(name)
        return {**keys, "lora_A": f"{name}.lora_embedding_A", "lora_B": f"{name}.lora_embedding_B"}
