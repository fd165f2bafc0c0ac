"""Transforms of an image before the backbone: the backbone's preprocessing, and augmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torchvision.transforms import v2

from lora_lightning.lora.errors import LoRAError, first_line

Interpolation = Literal["bilinear", "bicubic", "nearest"]
PIL_FILTERS: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's filters by number, as transformers' processors store them."""
ROUNDING = 0.02
"""Mean difference of normalized pixels at most between two ways of resizing, of which one rounds to 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, crop in the center, scale to [0, 1] and normalize, as in a backbone's pretraining."""

    size: tuple[int, int] = (224, 224)
    """Height and width of the backbone's input."""
    resize: int | tuple[int, int] = 256
    """The shorter side before the crop; or height and width, regardless of the image's proportions."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from each channel. ImageNet's by default."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divides each channel."""
    interpolation: Interpolation = "bilinear"
    """Of the resizing, with antialiasing."""

    def at(self, size: int | Sequence[int] | None) -> Preprocessing:
        """The preprocessing for another input size; the crop keeps its share of the image."""
        if size is None:
            return self
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
        if min(height, width) < 1 or (not isinstance(size, int) and len(size) != 2):
            raise LoRAError(f"image_size must be one number or height and width, at least 1, got {size}")
        if isinstance(self.resize, int):
            shorter = max(round(min(height, width) * self.resize / min(self.size)), height, width)
            return replace(self, size=(height, width), resize=shorter)
        scaled = round(height * self.resize[0] / self.size[0]), round(width * self.resize[1] / self.size[1])
        return replace(self, size=(height, width), resize=scaled)

    def processor(self) -> Any:
        """An equal transformers image processor, to be saved beside a model."""
        import transformers

        height, width = self.size
        resize = self.resize
        return transformers.CLIPImageProcessor(
            size={"shortest_edge": resize} if isinstance(resize, int) else {"height": resize[0], "width": resize[1]},
            do_center_crop=resize != self.size,
            crop_size={"height": height, "width": width},
            image_mean=list(self.mean),
            image_std=list(self.std),
            resample=next(number for number, name in PIL_FILTERS.items() if name == self.interpolation),
            do_convert_rgb=True,
        )


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes in training."""

    crop_scale: float | None = 0.5
    """Least share of the image's area in a random crop, which is resized to the backbone's input (Inception's crop,
    arXiv 1409.4842, which takes 0.08); null crops in the center as evaluation does."""
    flip: float = 0.5
    """Probability of a mirror image, left to right."""
    rand_augment: int | None = None
    """Magnitude, 0 to 30, of two random operations of RandAugment (arXiv 1909.13719; 9 is usual); null for none.
    Not for segmentation."""

    def __post_init__(self) -> None:
        if self.crop_scale is not None and not 0 < self.crop_scale <= 1:
            raise LoRAError(f"augment.crop_scale must be above 0 and at most 1, got {self.crop_scale}")
        if not 0 <= self.flip <= 1:
            raise LoRAError(f"augment.flip must be from 0 to 1, got {self.flip}")
        if self.rand_augment is not None and not 0 <= self.rand_augment <= 30:
            raise LoRAError(f"augment.rand_augment must be from 0 to 30, got {self.rand_augment}")


def evaluation_transform(p: Preprocessing) -> v2.Transform:
    """A transform of a uint8 image (3, h, w) to float32 (3, *size), and of a mask to the same size."""
    return v2.Compose([*_to_size(p), *_to_numbers(p)])


def training_transform(p: Preprocessing, augment: Augmentation) -> v2.Transform:
    """The same with augmentation, by torch's global generator."""
    steps: list[Any] = _to_size(p)
    if augment.crop_scale is not None:
        mode = v2.InterpolationMode(p.interpolation)
        steps = [v2.RandomResizedCrop(list(p.size), (augment.crop_scale, 1.0), interpolation=mode, antialias=True)]
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    if augment.rand_augment is not None:
        steps.append(v2.RandAugment(magnitude=augment.rand_augment))
    return v2.Compose([*steps, *_to_numbers(p)])


def _to_size(p: Preprocessing) -> list[Any]:
    resize = p.resize if isinstance(p.resize, int) else list(p.resize)
    steps: list[Any] = [v2.Resize(resize, interpolation=v2.InterpolationMode(p.interpolation), antialias=True)]
    return steps if p.resize == p.size else [*steps, v2.CenterCrop(list(p.size))]


def _to_numbers(p: Preprocessing) -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(p.mean), list(p.std))]


def preprocessing_of(name: str) -> Preprocessing:
    """The preprocessing of a backbone's pretraining; one that is not known, or not supported here, is refused.

    Args:
        name: `timm:NAME`, `torchvision:WEIGHTS` such as `torchvision:ResNet50_Weights.DEFAULT`, or an argument of
            `AutoImageProcessor.from_pretrained`.
    """
    kind, _, rest = name.partition(":")
    if kind == "torchvision":
        return _of_torchvision(rest)
    return _of_timm(rest) if kind == "timm" else _of_transformers(name)


def _of_timm(name: str) -> Preprocessing:
    try:
        import timm
    except ImportError as error:
        raise LoRAError("preprocessing by timm needs timm: pip install 'lora_lightning[vision]'") from error
    from lora_lightning.backbones.vision import check_timm_name

    check_timm_name(name)
    try:
        config = timm.models.get_pretrained_cfg(name)
        resolve_config: Any = timm.data.resolve_data_config  # type: ignore[attr-defined]
        settings = resolve_config({}, pretrained_cfg=config.to_dict())  # type: ignore[union-attr]
    except Exception as error:
        raise LoRAError(f"timm does not say how '{name}' prepares images: {error}") from error
    _, height, width = settings["input_size"]
    whole = math.floor(height / settings["crop_pct"]), math.floor(width / settings["crop_pct"])
    return Preprocessing(
        size=(height, width),
        resize=whole if settings["crop_mode"] == "squash" else min(whole),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=_interpolation(settings["interpolation"], name),
    )


def _of_torchvision(name: str) -> Preprocessing:
    from torchvision import models

    try:
        preset = models.get_weight(name).transforms()
    except (KeyError, ValueError, AttributeError) as error:
        raise LoRAError(
            f"torchvision has no weights '{name}': expected such as ResNet50_Weights.IMAGENET1K_V2 ({error})"
        ) from error
    resize = preset.resize_size[0]
    crop = getattr(preset, "crop_size", None)
    size = (crop[0], crop[-1]) if crop else (resize, resize)
    return Preprocessing(
        size=size,
        resize=resize if crop else size,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=_interpolation(preset.interpolation.value, name),
    )


def _of_transformers(name: str) -> Preprocessing:
    import transformers

    from lora_lightning.backbones.locate import refuse_not_there, resolve
    from lora_lightning.backbones.tokenizers import quiet

    path = resolve(name)
    refuse_not_there("image processor", path)
    try:
        with quiet():
            settings: Any = transformers.AutoImageProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, ImportError) as error:
        raise LoRAError(f"'{name}' has no image processor: {first_line(error)}") from error

    def of(attribute: str, default: Any) -> Any:
        value = getattr(settings, attribute, None)
        return default if value is None else value

    size, crop = dict(of("size", {"height": 224, "width": 224})), of("crop_size", None)
    resize: int | tuple[int, int]
    if "shortest_edge" in size:
        resize = int(size["shortest_edge"])
        target = (resize, resize)
        if share := of("crop_pct", None):  # ConvNeXt's: a crop below 384 pixels, none from there on
            resize = int(resize / share) if resize < 384 else target
    elif {"height", "width"} <= set(size):
        target = resize = (int(size["height"]), int(size["width"]))
    else:
        raise LoRAError(f"the image processor of '{name}' resizes by {size}, which is not known here: give image_size")
    if of("do_center_crop", False) and crop is not None:
        target = (int(dict(crop)["height"]), int(dict(crop)["width"]))
    plain = not of("do_normalize", True)
    how = Preprocessing(
        size=target,
        resize=resize,
        mean=(0.0, 0.0, 0.0) if plain else tuple(of("image_mean", Preprocessing.mean)),
        std=(1.0, 1.0, 1.0) if plain else tuple(of("image_std", Preprocessing.std)),
        interpolation=PIL_FILTERS.get(int(of("resample", 2)), "bilinear"),
    )
    noise = torch.randint(256, (3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    probe = noise.repeat_interleave(25, 1).repeat_interleave(25, 2)
    theirs = settings(v2.functional.to_pil_image(probe), return_tensors="pt")["pixel_values"][0]
    ours = evaluation_transform(how)(probe)
    if theirs.shape != ours.shape or not (theirs - ours).abs().mean() <= ROUNDING:  # such as blue before red
        raise LoRAError(
            f"the {type(settings).__name__} of '{name}' does more than to resize, crop, scale to [0, 1] and normalize:"
            " leave preprocessing out, and give what you can of image_size, crop_share, mean, std and interpolation"
        )
    return how


def _interpolation(interpolation: str, name: str) -> Interpolation:
    if interpolation in PIL_FILTERS.values():
        return interpolation  # type: ignore[return-value]
    raise LoRAError(f"'{name}' resizes by {interpolation}, which is not known here: give preprocessing by hand")
