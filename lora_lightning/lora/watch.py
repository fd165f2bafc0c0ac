"""Whether the base is what it was, without reading it: torch counts how often a tensor is written into.

A fingerprint proves more and takes a second for each GiB; this takes a millisecond and sees a merge, a
`load_state_dict` and an optimizer's step. Moving a model to another device or dtype is no write.
"""

from __future__ import annotations

from torch import nn

from lora_lightning.lora.errors import AdapterError

Marks = dict[str, tuple[int, int]]


def marks(model: nn.Module) -> Marks:
    """Of every parameter of the base: which object it is, and how often it was written into."""
    found: Marks = {}
    for path, module in model.named_modules():
        if "lora_" in path:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and not name.startswith("lora_"):
                found[f"{path}.{name}"] = (id(parameter), 0 if parameter.is_inference() else parameter._version)
    return found


def refuse_moved(model: nn.Module, before: Marks) -> None:
    """Raise an AdapterError where a parameter of the base was replaced or written into since."""
    moved = [name for name, mark in marks(model).items() if before.get(name) != mark]
    if moved:
        raise AdapterError(
            f"W0 moved since the bank was made, first '{moved[0].removeprefix('.')}': a merge is the end of a bank,"
            f" whose other adapters belong to the base as it was; load that and make a new bank"
        )
