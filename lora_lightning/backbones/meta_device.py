"""A transformers model by `from_pretrained`, in which every tensor that its files hold is on the meta device.

transformers finds the files, renames and fuses their tensors, chooses each dtype, checks keys and shapes, and
initializes what the files lack. Only the values stay in the files: the safetensors files that it opens give it tensors
of the right shape on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils

from lora_lightning.backbones.key_mapping import groups_of
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.tensor_files import DTYPES
from lora_lightning.lora.meta.key_mapping import base_of, keep_files

NOT_ON_META = (
    "random_weights", "add_tokens", "gguf_file", "quantization_config", "device_map", "key_mapping",
    "tp_plan", "tp_size", "distributed_config",
)  # fmt: skip


def load_on_meta(load: Callable[[], PreTrainedModel], given: Mapping[str, Any]) -> PreTrainedModel:
    """The result of `load`, a call of `from_pretrained` with the `given` arguments, which reads no values.

    Tensors that loading ties if their values are equal are tied, and the model records where its weights are.

    Raises:
        LoRAError: an argument makes weights, or prevents that they are read one by one; the weights are quantized, or
            were read in another way.
    """
    if conflict := next((name for name in NOT_ON_META if given.get(name)), None):
        raise LoRAError(f"on_meta reads plain safetensors files and goes with no {conflict}: leave one of the two out")
    files: list[Path] = []

    def opened(file: str, *args: Any, **kwargs: Any) -> _Headers:
        files.append(Path(file))
        return _Headers(safe_open(file, framework="pt"))

    with patch.object(modeling_utils, "safe_open", opened):
        model = load()
    if getattr(model, "hf_quantizer", None) is not None:
        raise LoRAError("on_meta fills plain weights, and these are quantized: leave on_meta out")
    if not files or not any(p.is_meta for p in model.parameters()):
        raise LoRAError(
            f"{type(model).__name__} was not built on the meta device: its weights are no safetensors files, or this"
            " version of transformers opens them in another way; leave on_meta out"
        )
    keep_files(model, list(dict.fromkeys(files)), partial(groups_of, to_write=False))
    _tie_equal(model)
    return model


class _Headers:
    """A safetensors file that gives shapes and dtypes only."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def get_slice(self, key: str) -> _Bare:
        return _Bare(self.file.get_slice(key))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class _Bare:
    """A tensor of a file without its values, with the operations that transformers applies to it."""

    def __init__(self, part: Any) -> None:
        self.get_shape, self.get_dtype = part.get_shape, part.get_dtype

    def __getitem__(self, index: Any) -> _Bare:
        assert index is Ellipsis, index
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return an empty tensor on the meta device, whatever `device` says."""
        return torch.empty(self.get_shape(), dtype=dtype or DTYPES.get(self.get_dtype(), torch.uint8), device="meta")


def _tie_equal(model: PreTrainedModel) -> None:
    """Tie weights that the files hold equal under both names, as `PreTrainedModel.tie_weights` does in memory."""
    base = base_of(model)
    assert base is not None
    keys: dict[str, str] = model.all_tied_weights_keys
    stored, equal = base.checkpoint.stored, set[str]()
    for target, source in list(keys.items()):
        if model.get_parameter(target) is model.get_parameter(source):
            continue
        dtype, groups = model.get_parameter(target).dtype, (base.of_name[target], base.of_name[source])
        if all(group.is_alone for group in groups):
            one, other = (stored[group.stored[0]] for group in groups)
            pairs = zip(one.blocks(), other.blocks(), strict=True)
            same = one.shape == other.shape and all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in pairs)
        else:
            values = [group.load({key: stored[key].read().to(dtype) for key in group.stored}) for group in groups]
            same = torch.equal(values[0][target], values[1][source])
        if same:
            equal.add(target)
        else:
            keys.pop(target)
    if equal:
        model.tie_weights(missing_keys=equal, recompute_mapping=False)
