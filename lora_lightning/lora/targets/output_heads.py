"""Where a model's output head is, so that `all-linear` can leave it out."""

from __future__ import annotations

import re

from torch import nn

from lora_lightning.lora.frozen.tensors import named_modules

# Names of heads in transformers, timm and torchvision, at the top level of a model.
HEAD_NAMES = frozenset(
    {"lm_head", "embed_out", "cls", "classifier", "score", "qa_outputs", "head", "heads", "head_dist", "fc"}
    | {"out_head", "output_head", "classification_head", "seq_classif"}
)

# The module that defines `PreTrainedModel`, of which a part of a model, such as one block, is no instance.
HF_MODEL = "transformers.modeling_utils"


def output_head(model: nn.Module) -> tuple[str, ...]:
    """Full names of the modules that compute the model's output; empty where it has no head.

    A transformers or timm model names its head. Otherwise it is the top-level module with a name from `HEAD_NAMES`
    that contains the last linear layer, else that layer itself unless it belongs to a repeated block.
    """
    declared = _declared_head(model)
    if declared is not None:
        return tuple(name for name, module in named_modules(model) if any(module is head for head in declared))
    named = tuple(name for name, _ in model.named_children() if name in HEAD_NAMES)
    if is_a(model, HF_MODEL):
        return named
    linears = [name for name, module in named_modules(model) if isinstance(module, nn.Linear)]
    if linears and linears[-1].partition(".")[0] in named:
        return (linears[-1].partition(".")[0],)
    # `layers.3.linear2` counts as `layers.*.linear2`; a number in the last place names the layer itself.
    blocks = [re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in linears]
    return (linears[-1],) if len(linears) > 1 and blocks.count(blocks[-1]) == 1 else ()


def _declared_head(model: nn.Module) -> list[nn.Module] | None:
    """The heads that the getters of transformers and timm return; None where the model has no such getter or head."""
    if is_a(model, HF_MODEL):
        embeddings = model.get_output_embeddings()  # type: ignore[operator]
        return None if embeddings is None else [embeddings]
    if is_a(model, "timm.") and any("get_classifier" in vars(cls) for cls in type(model).__mro__):
        classifier = model.get_classifier()  # type: ignore[operator]
        heads = classifier if isinstance(classifier, tuple | list) else [classifier]
        return [head for head in heads if isinstance(head, nn.Module)]
    return None


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The embedding of tokens that a transformers model names; None of any other model."""
    if not is_a(model, HF_MODEL):
        return None
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # raised by transformers models that have none
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def is_a(model: nn.Module, package: str) -> bool:
    """Whether the model's class or an ancestor is defined in `package`, which is not imported."""
    return any(cls.__module__.startswith(package) for cls in type(model).__mro__)
