"""Other spellings of PEFT's keys, turned into the one in which it writes its files.

A raw `state_dict` of a PEFT model carries the adapter's name, `q_proj.lora_A.default.weight`; wrappers for compiling,
sharding and checkpointing put names of their own in between; a model wrapped twice has the prefix twice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, some
from lora_lightning.lora.formats.peft.config import CONFIG, PICKLED, WEIGHTS
from lora_lightning.lora.formats.peft.packing import PREFIX
from lora_lightning.lora.formats.tensor_files import read_pickled, read_tensors

WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
NAMED = re.compile(
    r"\.(?:lora_[AB]\.(?P<a>[^.]+)\.(?:weight|bias)|lora_embedding_[AB]\.(?P<b>[^.]+)"
    r"|lora_magnitude_vector\.(?P<c>(?!weight$)[^.]+)(?:\.weight)?)$"
)


def read_weights(directory: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The file, tensors and metadata of a directory's weights: safetensors where there is one, else the old pickle.

    Raises:
        AdapterError: there is neither, or the file is torn or holds anything but tensors.
    """
    weights, pickled = directory / WEIGHTS, directory / PICKLED
    if pickled.is_file() and not weights.exists():
        return pickled, read_pickled(pickled), {}
    if not weights.exists():
        raise AdapterError(f"no file {weights}, and no {PICKLED} beside it: an adapter's directory holds one of them")
    return weights, *read_tensors(weights)


def as_written(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors by the keys that PEFT's `save_pretrained` would have given them.

    Raises:
        AdapterError: the keys hold several adapters, or two of them become one.
    """
    adapters = {name for key in tensors if (match := NAMED.search(key)) for name in match.groups() if name}
    if len(adapters) > 1:
        raise AdapterError(f"the file holds {len(adapters)} adapters ({some(sorted(adapters))}): save one of them")
    twice = PREFIX + PREFIX
    nested = bool(tensors) and all(key.startswith(twice) for key in tensors) and "base_model" not in model._modules
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = WRAPPERS.sub("", key)
        plain = plain.removeprefix(PREFIX) if nested else plain
        for name in adapters:
            plain = _without_adapter(plain, name)
        if plain in renamed:
            raise AdapterError(f"the adapter has two tensors for '{plain}', one of them as '{key}'")
        renamed[plain] = tensor
    return renamed


def _without_adapter(key: str, name: str) -> str:
    key = re.sub(rf"\.(lora_[AB])\.{re.escape(name)}\.(weight|bias)$", r".\1.\2", key)
    key = re.sub(rf"\.(lora_embedding_[AB]|trainable_tokens_delta)\.{re.escape(name)}$", r".\1", key)
    key = re.sub(rf"\.lora_magnitude_vector\.{re.escape(name)}(\.weight)?$", ".lora_magnitude_vector", key)
    return key.replace(f".modules_to_save.{name}.", ".")


def prefix_hint(unknown: list[str], model: nn.Module) -> str:
    """How the adapter's names would fit: it was made on this model's backbone, or on a model around this one."""
    modules = dict(model.named_modules())
    for outer in modules:
        if outer and 2 * sum(f"{outer}.{name}" in modules for name in unknown) >= len(unknown):
            return f"; it was made on the part '{outer}' of this model: load it into model.get_submodule('{outer}')"
    if any(re.search(r"\.experts\.\d+\.", name) for name in unknown):
        return (
            "; the adapter has its experts apart, as before transformers 5: load it in PEFT, which fuses them, and save"
            " it from there"
        )
    firsts = [name.partition(".")[0] for name in unknown if name.partition(".")[2] in modules]
    if 2 * len(firsts) >= len(unknown):
        first = Counter(firsts).most_common(1)[0][0]
        return (
            f"; it was made on a larger model that holds this one as '{first}': load it into a model of that class,"
            f" as {CONFIG} or its author says"
        )
    return ""
