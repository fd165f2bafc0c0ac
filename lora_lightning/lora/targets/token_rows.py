"""Which embeddings have rows that train in full (`trainable_token_indices`). This does not change the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_lightning.lora.errors import TargetError, did_you_mean
from lora_lightning.lora.layers.trained.token_rows import token_refusal
from lora_lightning.lora.targets.output_heads import input_embedding
from lora_lightning.lora.targets.patterns import find_module

FIELD = "trainable_token_indices"


@dataclass(frozen=True)
class TokenTarget:
    """Rows of one embedding."""

    name: str
    module: nn.Embedding
    token_ids: list[int]
    tied: list[nn.Module]
    """Output heads and other embeddings that share its weight."""


def token_targets(
    model: nn.Module, names: dict[nn.Module, list[str]], wanted: list[int | str] | dict[str, list[int | str]] | None
) -> list[TokenTarget]:
    """Resolve `trainable_token_indices`; a TargetError where there is no such embedding, row or token."""
    if not wanted:
        return []
    if isinstance(wanted, dict):
        requests = [(find_module(FIELD, entry, names), numbers) for entry, numbers in wanted.items()]
    else:
        requests = [(_input_embedding(model, names), wanted)]
    targets = []
    for module, tokens in requests:
        name, numbers = names[module][0], [_number(model, token) for token in tokens]
        if reason := token_refusal(module, numbers):
            raise TargetError(f"trainable_token_indices: '{name}' {reason}")
        assert isinstance(module, nn.Embedding)
        targets.append(TokenTarget(name, module, sorted(numbers), _tied_modules(name, module, names)))
    return targets


def _number(model: nn.Module, token: int | str) -> int:
    """The row of a token, which is given by number, or by name if `add_tokens` added it."""
    if isinstance(token, int):
        return token
    added: dict[str, int] = getattr(model, "added_tokens", {})
    if token not in added:
        there = did_you_mean(token, added) or ": add_tokens of lora_lightning.huggingface makes rows that have names"
        raise TargetError(f"trainable_token_indices: the backbone was given no token '{token}'{there}")
    return added[token]


def _input_embedding(model: nn.Module, names: dict[nn.Module, list[str]]) -> nn.Module:
    declared = input_embedding(model)
    if declared is not None:
        return declared
    embeddings = [m for m in names if isinstance(m, nn.Embedding)]
    if len(embeddings) == 1:
        return embeddings[0]
    there = ", ".join(names[m][0] for m in embeddings[:4]) or "none"
    raise TargetError(
        f"trainable_token_indices: which embedding is the input's cannot be told (there are: {there});"
        f" name it, as in {{embed_tokens: [0, 1]}}"
    )


def _tied_modules(name: str, module: nn.Embedding, names: dict[nn.Module, list[str]]) -> list[nn.Module]:
    tied = [m for m in names if m is not module and any(p is module.weight for p in m._parameters.values())]
    for other in tied:
        follows = isinstance(other, nn.Linear) or (isinstance(other, nn.Embedding) and token_refusal(other, []) is None)
        if not follows:
            raise TargetError(
                f"trainable_token_indices: '{name}' shares its weight with '{names[other][0]}',"
                f" a {type(other).__name__}, which would not follow: untie them"
            )
    return tied
