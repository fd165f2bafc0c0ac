"""Messages of other packages that a user cannot act on and that are not shown, each with the reason.

Messages that a user can act on stay, such as that of an idle GPU, and all messages of this package.
"""

from __future__ import annotations

import functools
import logging
import warnings

WARNINGS = {
    # An advertisement and a hint to use more workers: texts of this size are faster without.
    ".*does not have many workers.*",
    # Lightning calls a torch API that warns about itself.
    ".*isinstance\\(treespec, LeafSpec\\).*",
    # The log of a repeated `test` replaces the last one's, as it should.
    "Experiment logs directory .* exists and is not empty.*",
    # A test or a resumed fit may write to another folder, where the best of the first does not count.
    "The dirpath has changed from .*",
    # The backbone is in eval mode on purpose, see `backbone_mode`.
    "Found .* module\\(s\\) in eval mode at the start of training.*",
    # Its successor is unknown to torch 2.10 and older.
    "`broadcast_buffers` is deprecated.*",
}
"""Patterns of warnings, from their beginning."""

RECORDS = {
    "lightning.pytorch.utilities.rank_zero": (
        "litlogger",  # advertisements
        "litmodels",
        "GPU available: ",  # the first screen names the device; Lightning warns where a GPU is left idle
        "TPU available: ",
        "Using bfloat16 Automatic Mixed Precision",  # the first screen names the precision
        "Using 16bit Automatic Mixed Precision",
        "Loading `train_dataloader` to estimate number of stepping batches",  # how a schedule learns its length
        "Loaded model weights from the checkpoint",  # the second of two lines on one file
        "All distributed processes registered",  # a box of four lines; the first screen counts the processes
    ),
    "lightning.fabric.utilities.distributed": ("Initializing distributed: ",),  # a line from each process
    "lightning.fabric.utilities.seed": ("Seed set to",),  # it stands in the run's config.yaml
    "torchao": ("Failed to load ",),  # kernels for GPUs, which are not there; it is quiet where they are
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),  # torchao calls an older torch API
}
"""Parts of log records, by the logger's name."""


def silence_others() -> None:
    """Keep these messages of other packages off the screen."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, parts in RECORDS.items():
        logging.getLogger(name).addFilter(functools.partial(_is_shown, parts))


def _is_shown(parts: tuple[str, ...], record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in parts)
