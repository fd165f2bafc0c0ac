"""Random inputs of the shapes that a transformers config asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROWS, LENGTH = 2, 12
WAVE = 8000
"""Samples of sound: half a second at 16 kHz."""


def drawers(config: Any, generator: torch.Generator) -> dict[str, Callable[[], Tensor]]:
    """By argument of a transformers model with this config, how to draw it."""
    text, decoder = config.get_text_config(), config.get_text_config(decoder=True)
    dtype = getattr(config, "dtype", None) or torch.float32

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    return {
        "input_ids": lambda: _tokens(text, generator),
        "attention_mask": lambda: _mask(text),
        "decoder_input_ids": lambda: _tokens(decoder, generator),
        "pixel_values": lambda: noise(*_pixels(config)),
        "input_values": lambda: noise(ROWS, *_sound(config)),
        "input_features": lambda: noise(ROWS, *_features(config)),
    }


def _rows(config: Any) -> int:
    """One where there is no padding token: such a model refuses to classify two rows."""
    return 1 if getattr(config, "pad_token_id", None) is None else ROWS


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    """Random tokens (n, t), none of them special but for the end's in the last place; the second row is padded."""
    rows, size = _rows(config), int(config.vocab_size)
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id", "video_token_id", "audio_token_id")
    special = {i for name in names for i in _ids(getattr(config, name, None))}
    plain = torch.tensor([i for i in range(min(size, 5000)) if i not in special] or [0])
    ids = plain[torch.randint(len(plain), (rows, LENGTH), generator=generator)]
    end = next(iter(_ids(getattr(config, "eos_token_id", None))), None)
    if rows == ROWS:
        ids[1, -2:] = config.pad_token_id
    if end is not None and end < size:
        for row, last in zip(ids, (LENGTH - 1, LENGTH - 3), strict=False):
            row[last] = end
    return ids


def _ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [int(value)]


def _mask(config: Any) -> Tensor:
    mask = torch.ones(_rows(config), LENGTH, dtype=torch.long)
    if len(mask) == ROWS:
        mask[1, -2:] = 0
    return mask


def _pixels(config: Any) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    frames = getattr(vision, "num_frames", None)
    return (ROWS, *([int(frames)] if frames else []), int(getattr(vision, "num_channels", 3)), int(height), int(width))


def _sound(config: Any) -> tuple[int, ...]:
    """A wave; a spectrogram where the config says how many bins it has."""
    bins = getattr(config, "num_mel_bins", None)
    return (int(config.max_length), int(bins)) if bins else (WAVE,)


def _features(config: Any) -> tuple[int, ...]:
    """(bins, frames) for whisper, whose frames are twice its positions; (frames, features) elsewhere."""
    whole = getattr(config, "max_source_positions", None)
    if whole and getattr(config, "num_mel_bins", None):
        return (int(config.num_mel_bins), 2 * int(whole))
    width = getattr(config, "input_feat_per_channel", None) or getattr(config, "feature_projection_input_dim", None)
    return (100, int(width or 80))
