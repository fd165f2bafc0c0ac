"""How large the file of an adapter will be, to the byte, for a model on any device, the meta device among them."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lightning.lora.formats.peft.adapter import adapter_config
from lora_lightning.lora.formats.peft.packing import packed_layers, peft_tensors
from lora_lightning.lora.formats.peft.write import other_dropouts
from lora_lightning.lora.formats.provenance import write_record

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls them."""


def adapter_file_bytes(
    model: nn.Module, *, base_model_name_or_path: str | None = None, task_type: str | None = None
) -> int:
    """The size of the `adapter_model.safetensors` that `save_adapter` writes of this model, header included."""
    packed = packed_layers(model)
    tensors = peft_tensors(model, packed)
    config = adapter_config(model, packed, base_model_name_or_path, task_type)
    metadata = write_record(model, packed, tensors, other_dropouts(packed), config, digests=False)
    return safetensors_bytes(tensors, metadata)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """The size of a safetensors file: 8 bytes, a header in JSON that is filled up to a multiple of 8, the tensors."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    # In the file's order, which is the widest dtype first and then by name, since offsets have more digits later on.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")
    return 8 + len(text) + -len(text) % 8 + end
