"""Whether models are to be built without numbers."""

from __future__ import annotations

import torch


def builds_bare() -> bool:
    """Whether torch's default device is `meta`, so that a model is wanted for its shapes alone."""
    return torch.get_default_device().type == "meta"
