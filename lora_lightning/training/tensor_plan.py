"""Which layers tensor parallelism splits, and along which side: the backbone's own plan, or one that is given.

The names of styles are those of transformers' plans (`base_model_tp_plan`), which say the same of a model's layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate

from torch import nn

from lora_lightning.lora.errors import LoRAError, did_you_mean, some
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a, output_head


@dataclass(frozen=True)
class Style:
    """How one linear layer is split."""

    by_output: bool
    """Each process holds some of the outputs (colwise), or some of the inputs (rowwise)."""
    is_whole: bool = False
    """Whether the side that is split is whole outside of the layer: its outputs are gathered, its inputs cut here."""


STYLES = {
    "colwise": Style(by_output=True),
    "colwise_gather_output": Style(by_output=True, is_whole=True),
    "colwise_rep": Style(by_output=True, is_whole=True),
    "rowwise": Style(by_output=False),
    "rowwise_split_input": Style(by_output=False, is_whole=True),
    "rowwise_rep": Style(by_output=False, is_whole=True),
}
PER_HEAD = "replicated_with_grad_allreduce"
"""Of a module that every process holds whole and calls with its own part, as a norm of each head."""
WHOLE = {"replicate", PER_HEAD, "embedding_rowwise", "embedding_colwise"}
"""Styles of what stays whole here. An embedding that is split gives the same as one that is not."""


@dataclass(frozen=True)
class Plan:
    """Of one model, by names of modules."""

    styles: Mapping[str, Style]
    """What is split."""
    per_head: frozenset[str]
    """What is whole, and is called with parts: the gradients of its weights are parts too."""


def plan_of(backbone: nn.Module, own: Mapping[str, str] | None) -> Plan:
    """The backbone's plan with one's own over it.

    A language model's head stays whole but where it is named in `own`: its loss is taken without all logits in memory.

    Args:
        own: styles by names of modules (or of parameters that stand for themselves, such as experts), `*` for
            anything; `replicate` leaves a layer whole.

    Raises:
        LoRAError: there is none, a name fits nothing, or a style is not supported here.
    """
    given = _of_model(backbone)
    if not given and not own:
        raise LoRAError(
            f"tensor parallelism needs a plan, and {type(backbone).__name__} has none: give"
            " FSDP2Strategy.tensor_parallel_plan, such as {'*.q_proj': colwise, '*.o_proj': rowwise}"
        )
    named, heads = dict(_own(backbone, own or {})), output_head(backbone)
    found = {name: style for name, style in given.items() if name not in heads} | named
    modules = dict(backbone.named_modules())
    known = {name: style in WHOLE or (style in STYLES and name in modules) for name, style in found.items()}
    if other := [name for name, is_known in known.items() if not is_known]:
        kinds = ", ".join(sorted({found[name] for name in other}))
        raise LoRAError(
            f"tensor parallelism of style {kinds} is not supported, which the plan has for {some(other)}:"
            " name these as `replicate` in FSDP2Strategy.tensor_parallel_plan, or leave tensor_parallel_size at 1"
        )
    split = {name: STYLES[style] for name, style in found.items() if style in STYLES}
    if not split:
        raise LoRAError("tensor parallelism would split nothing: every layer of the plan is `replicate`")
    return Plan(split, frozenset(name for name, style in found.items() if style == PER_HEAD))


def _of_model(backbone: nn.Module) -> dict[str, str]:
    """What transformers says of its model, in which `*` is the number of a layer."""
    if not is_a(backbone, HF_MODEL):
        return {}
    rules: Mapping[str, str] = backbone._tp_plan or {}  # type: ignore[assignment]
    found: dict[str, str] = {}
    for pattern, style in rules.items():
        fits = re.compile(re.escape(pattern.removesuffix(".weight")).replace(r"\*", r"\d+"))
        found |= {name: style for name in _names(backbone) if fits.fullmatch(name)}
    return found


def _own(backbone: nn.Module, own: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for pattern, style in own.items():
        if style not in STYLES and style not in WHOLE:
            raise LoRAError(
                f"tensor_parallel_plan: '{style}' of '{pattern}' is no style{did_you_mean(style, STYLES)}; known:"
                f" {', '.join([*STYLES, 'replicate'])}"
            )
        fits = re.compile(translate(pattern))
        names = [name for name in _names(backbone, parameters=style not in STYLES) if fits.fullmatch(name)]
        if not names:
            near = did_you_mean(pattern, _names(backbone))
            raise LoRAError(f"tensor_parallel_plan: '{pattern}' fits no module{near}")
        yield from ((name, style) for name in names)


def _names(backbone: nn.Module, *, parameters: bool = True) -> Iterator[str]:
    """Of modules, and of parameters, which may stand for themselves, such as experts."""
    yield from (name for name, _ in backbone.named_modules() if name)
    if parameters:
        yield from (name for name, _ in backbone.named_parameters())
