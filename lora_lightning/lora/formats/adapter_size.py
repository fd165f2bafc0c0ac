"""How large the file of an adapter will be, to the byte, for a model on any device, the meta device among them."""

from __future__ import annotations

from torch import nn

from lora_lightning.lora.formats.peft.adapter import adapter_config
from lora_lightning.lora.formats.peft.packing import packed_layers, peft_tensors
from lora_lightning.lora.formats.peft.write import other_dropouts
from lora_lightning.lora.formats.provenance import write_record
from lora_lightning.lora.formats.tensor_files import file_size


def adapter_file_bytes(
    model: nn.Module, *, base_model_name_or_path: str | None = None, task_type: str | None = None
) -> int:
    """The size of the `adapter_model.safetensors` that `save_adapter` writes of this model, header included."""
    packed = packed_layers(model)
    tensors = peft_tensors(model, packed)
    config = adapter_config(model, packed, base_model_name_or_path, task_type)
    metadata = write_record(model, packed, tensors, other_dropouts(packed), config, digests=False)
    return file_size(tensors, metadata)
