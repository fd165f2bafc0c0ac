"""Plain layers of which every row of the batch gets the update of its own adapter: `with bank.rows([...]):`.

The base computes once, for all rows. Each group of rows adds its adapter's update, by the adapted layer's own
arithmetic, on a layer that stands beside the plain one. These are grafted for as long as the block runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.bank.grouped import Group, add_by_group, put_by_group
from lora_lightning.lora.bank.mixed_batch import LayerRows
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.attention import AttentionHost
from lora_lightning.lora.layers.class_swap import Grafted
from lora_lightning.lora.layers.conv import CONVS
from lora_lightning.lora.layers.embedding import LoRAEmbedding
from lora_lightning.lora.layers.encoder import EncoderHost
from lora_lightning.lora.layers.functional import lora_update


class _Rows(Grafted):
    """`h_i = W0 x_i + update_g(x_i)` for row i of adapter g."""

    lora_rows: LayerRows

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The plain layer's, and the rows' updates. A factor of DoRA needs the rows' outputs as well."""
        out: Tensor = super().forward(*args, **kwargs)
        rows = self.lora_rows
        _refuse_training(self, rows)
        x = args[0] if args else next(iter(kwargs.values()))
        if rows.batch.proving is not None:
            if rows.host is None:
                rows.batch.tell(rows.name, x, _dims(self, x))
            return out
        dim, found = rows.entries(x)
        for entries, layer in found:
            if layer.lora_magnitude_vector is not None:
                update = _update(layer, x.index_select(dim, entries), out.dtype)
                out.index_copy_(dim, entries, layer.lora_finish(out.index_select(dim, entries) + update))
        plain = [(e, layer) for e, layer in found if layer.lora_magnitude_vector is None]
        return add_by_group(out, x, [(e, _updater(layer, out.dtype)) for e, layer in plain], dim)


class LinearRows(_Rows, nn.Linear):  # type: ignore[misc]  # a wider forward
    """`nn.Linear`, below a subclass's own forward as the adapted layer is."""


class EmbeddingRows(_Rows, nn.Embedding):  # type: ignore[misc]  # a wider forward
    """`nn.Embedding`."""


class Conv1dRows(_Rows, nn.Conv1d):  # type: ignore[misc]  # a wider forward
    """`nn.Conv1d`."""


class Conv2dRows(_Rows, nn.Conv2d):  # type: ignore[misc]  # a wider forward
    """`nn.Conv2d`."""


class Conv3dRows(_Rows, nn.Conv3d):  # type: ignore[misc]  # a wider forward
    """`nn.Conv3d`."""


class SavedRows(Grafted):
    """A module of `modules_to_save`: row i has the output of its adapter's own copy."""

    lora_saved_rows: LayerRows

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The plain module's, and the copies' where a row has one."""
        out = super().forward(*args, **kwargs)
        rows = self.lora_saved_rows
        _refuse_training(self, rows)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not isinstance(out, Tensor):
            raise LoRAError(
                f"rows: '{rows.name}', saved in full, takes or gives more than one tensor: activate one adapter at"
                f" a time"
            )
        if rows.batch.proving is not None:
            rows.batch.tell(rows.name, args[0], range(args[0].dim()), out)
            return out
        dim, found = rows.entries(args[0])
        return put_by_group(out.clone(), args[0], found, dim)


class AttentionRows(AttentionHost):
    """`nn.MultiheadAttention`, whose projections see (length, rows, width) and whose `out_proj` sees it flattened."""

    lora_rows: LayerRows
    lora_count: int
    as_kernel = False

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x W0^T + b` of each input, and the rows' updates."""
        rows = self.lora_rows
        _refuse_training(self, rows)
        outs = dict(zip("qkv", super().project(query, key, value), strict=True))
        if rows.batch.proving is not None:
            rows.batch.tell(rows.name, query, [1])
            return outs["q"], outs["k"], outs["v"]
        self.__dict__["lora_count"] = count = self._count(query)
        for part, x in zip("qkv", (query, key, value), strict=True):
            groups: list[Group] = []
            for entries, layer in rows.grouped(x, 1, count, inner=False):
                if part in (own := layer._pairs()):
                    A, B = own[part]
                    groups.append((entries, _product(A, B, layer.lora_settings.scale)))
            outs[part] = add_by_group(outs[part], x, groups, dim=1)
        return outs["q"], outs["k"], outs["v"]

    def _count(self, query: Tensor) -> int:
        """How many rows query (length, rows, width) has."""
        rows = self.lora_rows
        if rows.batch.is_one:
            return 1
        _, count = rows.batch.layout(rows.name, query)
        if query.shape[1] != count:
            raise LoRAError(
                f"rows: '{rows.name}' attends in {query.shape[1]} parts of {count} rows: activate one adapter at a time"
            )
        return count


class EncoderRows(EncoderHost):
    """`nn.TransformerEncoder` whose batches keep their rows: a nested tensor has none to tell apart."""

    def _can_nest(self) -> bool:
        return False


KINDS: dict[type[nn.Module], type[Grafted]] = {
    nn.Linear: LinearRows,
    nn.Embedding: EmbeddingRows,
    nn.Conv1d: Conv1dRows,
    nn.Conv2d: Conv2dRows,
    nn.Conv3d: Conv3dRows,
}
ROWS = (_Rows, SavedRows, AttentionRows)


def rows_kind(module: nn.Module) -> type[Grafted]:
    """The class to graft onto a module with adapted rows."""
    return next((rows for kind, rows in KINDS.items() if isinstance(module, kind)), _Rows)


def _update(layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the adapted layer adds to the base's output, before any factor of DoRA."""
    update: Tensor = layer.lora_update(x, dtype) if isinstance(layer, LoRAEmbedding) else layer.lora_update(x)
    if layer.lora_B_bias is not None:
        update = update + layer._along_output(layer.lora_B_bias * layer.lora_settings.scale).to(update.dtype)
    return update


def _updater(layer: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: _update(layer, x, dtype)


def _product(A: Tensor, B: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    return lambda x: lora_update(x, A, B, scale)


def _refuse_training(module: nn.Module, rows: LayerRows) -> None:
    if module.training:
        raise LoRAError(f"rows: '{rows.name}' is in train mode, and rows are for eval: call model.eval()")


def _dims(module: nn.Module, x: Tensor) -> range:
    """The dimensions of x that may hold the rows: not the one that the layer's weight is multiplied along."""
    if isinstance(module, CONVS):
        return range(x.dim() == module.weight.dim())
    return range(x.dim() - (not isinstance(module, nn.Embedding)))
