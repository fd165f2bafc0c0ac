"""What is said of a checkpoint that is not what was written."""

from __future__ import annotations

from lora_lightning.lora.errors import LoRAError


class DamagedCheckpointError(LoRAError):
    """A file or folder that is not what was written: torn, or with a bit flipped."""
