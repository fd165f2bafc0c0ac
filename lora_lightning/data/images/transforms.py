"""Transforms of an image before the backbone: the backbone's preprocessing, and augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torchvision.transforms import v2

from lora_lightning.lora.errors import LoRAError

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
        sides = (size, size) if isinstance(size, int) else tuple(map(int, size))
        if len(sides) != 2 or min(sides) < 1:
            raise LoRAError(f"image_size must be one number or height and width, at least 1, got {size}")
        if isinstance(self.resize, int):
            shorter = round(min(sides) * self.resize / min(self.size))
            return replace(self, size=sides, resize=max(shorter, *sides))
        height, width = (sides[i] * self.resize[i] / self.size[i] for i in (0, 1))
        return replace(self, size=sides, resize=(round(height), round(width)))

    def processor(self) -> Any:
        """An equal transformers image processor, to be saved beside a model."""
        import transformers

        resize = {"shortest_edge": self.resize} if isinstance(self.resize, int) else _sides(self.resize)
        return transformers.CLIPImageProcessor(
            size=resize,
            do_center_crop=self.resize != self.size,
            crop_size=_sides(self.size),
            image_mean=list(self.mean),
            image_std=list(self.std),
            resample=next(number for number, name in PIL_FILTERS.items() if name == self.interpolation),
            do_convert_rgb=True,
        )

    def transform(self, augment: Augmentation | None = None) -> v2.Compose:
        """A transform of images to float32 (3, *size) and of their masks to the same size, for evaluation.

        With `augment` it is that of training, by torch's global generator.
        """
        mode, size = v2.InterpolationMode(self.interpolation), list(self.size)
        if augment is not None and augment.crop_scale is not None:
            scale = (augment.crop_scale, 1.0)
            steps: list[Any] = [v2.RandomResizedCrop(size, scale, interpolation=mode, antialias=True)]
        else:
            resize = self.resize if isinstance(self.resize, int) else list(self.resize)
            steps = [v2.Resize(resize, interpolation=mode, antialias=True), v2.CenterCrop(size)]
        if augment is not None and augment.flip:
            steps.append(v2.RandomHorizontalFlip(augment.flip))
        if augment is not None and augment.rand_augment is not None:
            steps.append(v2.RandAugment(magnitude=augment.rand_augment))
        numbers = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]
        return v2.Compose([v2.ToImage(), *steps, *numbers, v2.ToPureTensor()])


def _sides(size: tuple[int, int]) -> dict[str, int]:
    return dict(zip(("height", "width"), size, strict=True))


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


def preprocessing_of(name: str) -> Preprocessing:
    """The preprocessing of a backbone's pretraining; one that is not known, or not supported here, is refused.

    Args:
        name: `timm:NAME`, `torchvision:WEIGHTS` such as `torchvision:ResNet50_Weights.DEFAULT`, or an argument of
            `AutoImageProcessor.from_pretrained`.
    """
    kind, _, rest = name.partition(":")
    readers = {"timm": _of_timm, "torchvision": _of_torchvision}
    how = readers[kind](rest) if kind in readers else _of_transformers(name)
    if how.interpolation not in PIL_FILTERS.values():
        raise LoRAError(f"'{name}' resizes by {how.interpolation}, which is not known here: give preprocessing by hand")
    return how


def _of_timm(name: str) -> Preprocessing:
    from lora_lightning.backbones.vision import check_timm_name, vision_package

    timm = vision_package("timm", "preprocessing by timm")
    check_timm_name(name)
    try:
        config = timm.get_pretrained_cfg(name).to_dict()
        settings = timm.data.resolve_data_config({}, pretrained_cfg=config)
    except Exception as error:
        raise LoRAError(f"timm does not say how '{name}' prepares images: {error}") from error
    size = settings["input_size"][1:]
    height, width = (int(side / settings["crop_pct"]) for side in size)
    return Preprocessing(
        size=size,
        resize=(height, width) if settings["crop_mode"] == "squash" else min(height, width),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings["interpolation"],
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
        interpolation=preset.interpolation.value,
    )


def _of_transformers(name: str) -> Preprocessing:
    """The settings of an image processor as far as they are known here, if they then give its pixels."""
    import transformers

    from lora_lightning.backbones.tokenizers import load_processor

    processor = load_processor(transformers.AutoImageProcessor, name, "image processor")
    resize: int | tuple[int, int]
    given = {key: value for key, value in processor.to_dict().items() if value is not None}
    size, share = given.get("size", _sides((224, 224))), given.get("crop_pct")
    noise = torch.randint(256, (3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    probe = noise.repeat_interleave(25, 1).repeat_interleave(25, 2)
    theirs = processor(v2.functional.to_pil_image(probe), return_tensors="pt")["pixel_values"][0]
    target = (theirs.shape[-2], theirs.shape[-1])
    if "shortest_edge" in size:
        side = int(size["shortest_edge"])  # ConvNeXt's crops below 384 pixels, and not from there on
        resize = side if not share else int(side / share) if side < 384 else target
    elif {"height", "width"} <= size.keys():
        resize = (int(size["height"]), int(size["width"]))
    else:
        raise LoRAError(f"the image processor of '{name}' resizes by {size}, which is not known here: give image_size")
    plain = not given.get("do_normalize", True)
    how = Preprocessing(
        size=target,
        resize=resize,
        mean=(0.0, 0.0, 0.0) if plain else tuple(given.get("image_mean", Preprocessing.mean)),
        std=(1.0, 1.0, 1.0) if plain else tuple(given.get("image_std", Preprocessing.std)),
        interpolation=PIL_FILTERS.get(int(given.get("resample", 2)), "bilinear"),
    )
    ours = how.transform()(probe)
    if theirs.shape != ours.shape or not (theirs - ours).abs().mean() <= ROUNDING:  # such as blue before red
        raise LoRAError(
            f"the {type(processor).__name__} of '{name}' does more than to resize, crop, scale to [0, 1] and normalize:"
            " leave preprocessing out, and give what you can of image_size, crop_share, mean, std and interpolation"
        )
    return how
