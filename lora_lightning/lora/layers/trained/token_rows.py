"""Chosen rows of an embedding that train in full while the others are frozen: for new or special tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.layers.class_swap import Grafted, graft, own_forward_calls_super
from lora_lightning.lora.layers.functional import wide_dtype


class TokenRows(Grafted, nn.Embedding):
    """`h = rows[x]` for the chosen tokens, `W0[x]` for the others. W0 does not change.

    `lora_tokens` (number of tokens, width) are the rows, by rising token number, in float32 or wider. They start as
    W0's. A padding row that is chosen by its number trains as well.
    """

    lora_tokens: nn.Parameter
    lora_token_ids: Tensor
    """The numbers of the chosen tokens; no buffer, since they are in no state dict."""

    @classmethod
    def attach(cls, module: nn.Module, token_ids: list[int], tied: list[nn.Module]) -> None:
        """Train these rows of `module`, in place, for it and for the `tied` modules that share its weight."""
        graft(module, cls)
        assert isinstance(module, cls)
        shape, dtype = (len(token_ids), module.embedding_dim), wide_dtype(module.weight)
        module.lora_tokens = nn.Parameter(torch.empty(shape, dtype=dtype, device=module.weight.device))
        module.lora_token_ids = torch.tensor(sorted(token_ids), device="cpu")
        module.reset_lora_parameters()
        for follower in tied:
            graft(follower, TokenTwin if isinstance(follower, nn.Embedding) else TokenHead)
            follower.__dict__["lora_followed"] = (module,)  # a tuple, so that it is no child of this one

    def trained_tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The rows, and W0's; both without values on the meta device."""
        yield "weight", self.lora_tokens, self.weight[self.token_ids()]

    def forward(self, input: Tensor) -> Tensor:
        """Whole numbers (...) to (..., width)."""
        out = super().forward(input)
        return self.put_in(out, input) if self.lora_enabled else out

    def put_in(self, out: Tensor, ids: Tensor) -> Tensor:
        """`out` (..., width), looked up for `ids` (...), with the trained rows at the chosen tokens."""
        numbers = self.token_ids()
        place = torch.searchsorted(numbers, ids).clamp(max=len(numbers) - 1)
        chosen = (numbers[place] == ids).unsqueeze(-1)
        return torch.where(chosen, F.embedding(place, self.lora_tokens).to(out.dtype), out)

    def token_ids(self) -> Tensor:
        """The chosen token numbers, moved to W0's device."""
        if self.weight.is_meta:  # a copy, since the meta device would lose the numbers
            return self.lora_token_ids.to("meta")
        if self.lora_token_ids.device != self.weight.device:
            self.lora_token_ids = self.lora_token_ids.to(self.weight.device)
        return self.lora_token_ids

    @torch.no_grad()
    def fold(self, folded: dict[int, Tensor]) -> None:
        """Write the rows into the weight, for it and for every module that is tied to it."""
        self.weight[self.token_ids()] = self.lora_tokens.to(self.weight.dtype)


class TokenFollower(Grafted):
    """A module that shares the weight of a `TokenRows`, whose trained rows it uses."""

    lora_followed: tuple[TokenRows]


class TokenHead(TokenFollower, nn.Linear):
    """A tied output head: the logits of the chosen tokens are computed with the trained rows."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., width) to (..., number of tokens)."""
        out: Tensor = super().forward(input, *args, **kwargs)
        if not self.lora_enabled:
            return out
        rows = self.lora_followed[0]
        ids = rows.token_ids()
        update = F.linear(input, (rows.lora_tokens - rows.weight[ids]).to(input.dtype))
        return out.index_add(-1, ids, update.to(out.dtype))


class TokenTwin(TokenFollower, nn.Embedding):
    """A second embedding with the same weight, such as a decoder's."""

    def forward(self, input: Tensor) -> Tensor:
        """Whole numbers (...) to (..., width)."""
        out = super().forward(input)
        return self.lora_followed[0].put_in(out, input) if self.lora_enabled else out


def token_refusal(module: nn.Module, token_ids: list[int]) -> str | None:
    """Why these rows of this module cannot be trained; None where they can."""
    if not isinstance(module, nn.Embedding):
        return f"is a {type(module).__name__}, not an nn.Embedding"
    if not own_forward_calls_super(type(module), nn.Embedding):
        return f"({type(module).__name__}) has a forward of its own that reads its weight, so the rows would be ignored"
    if module.max_norm is not None:
        return "has max_norm, which rewrites its rows on every forward"
    beyond = [number for number in token_ids if not 0 <= number < module.num_embeddings]
    if beyond:
        return f"has rows 0 to {module.num_embeddings - 1}, got {beyond[0]}: resize the embedding first"
    return None
