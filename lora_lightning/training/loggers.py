"""Loggers that need no account."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_info


class WandbLogger(LightningWandbLogger):
    """Lightning's WandbLogger, which goes offline by itself where W&B has no key, and asks nothing.

    Args:
        offline: keep the run on disk, for `wandb sync`. Left out: offline where there is no key.
        save_dir: where W&B's own folder goes; made where it is missing.
    """

    def __init__(self, *args: Any, offline: bool | None = None, save_dir: str = "runs", **kwargs: Any) -> None:
        if offline is None:
            offline = os.environ.get("WANDB_MODE") != "disabled" and not has_wandb_key()
            if offline:
                rank_zero_info("W&B: no key found, so this run stays on disk; `wandb sync` uploads it later")
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        super().__init__(*args, offline=offline, save_dir=save_dir, **kwargs)  # type: ignore[misc]


def has_wandb_key() -> bool:
    """Whether W&B can log in without asking: by environment or by netrc, unless WANDB_MODE says offline."""
    if os.environ.get("WANDB_MODE", "") in ("offline", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
