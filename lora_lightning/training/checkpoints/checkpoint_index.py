"""torch's reader of checkpoints in parts, that runs no code out of a folder which may come from anyone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from lora_lightning.training.checkpoints.damage import DamagedCheckpointError

ALLOWED = {"Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"}
ALLOWED |= {"MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo", "Size"}


class _Unpickler(pickle.Unpickler):
    """Of what a folder's index is made of, and of nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        of_torch = module == "torch" or module.startswith("torch.distributed.checkpoint.")
        if is_dtype or (of_torch and name in ALLOWED):
            return super().find_class(module, name)
        if (module, name) in {("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's index")


class Reader(FileSystemReader):
    """torch's, that runs no code out of a folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        try:
            with (folder / ".metadata").open("rb") as file:
                found = _Unpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
            raise DamagedCheckpointError(f"'{folder}' is not a whole checkpoint ({error})") from error
        if not isinstance(found, Metadata):
            raise DamagedCheckpointError(f"'{folder}' is not a whole checkpoint: its index is none")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found
