"""`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, with any stride, padding, padding mode, dilation and groups."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.layers.base import AdaptedLayer
from lora_lightning.lora.layers.class_swap import own_forward_calls_super
from lora_lightning.lora.layers.functional import conv_delta, conv_update
from lora_lightning.lora.layers.fused_linear import can_go_quick
from lora_lightning.lora.layers.options import LayerSettings
from lora_lightning.lora.layers.ordinary import drops_by_bytes, has_weights_of_its_own, of_one_dtype, why_not_ordinary
from lora_lightning.lora.quick_bias import with_bias_gradient
from lora_lightning.lora.quick_conv import Slide, quick_conv

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@functools.cache
def _computes_plainly(cls: type) -> bool:
    """Whether the base layer slides as torch's own does, by a kernel that is read as it lies there."""
    torch_class = next(base for base in CONVS if issubclass(cls, base))
    return cls._conv_forward is torch_class._conv_forward and has_weights_of_its_own(cls)  # type: ignore[attr-defined]


class _Conv(AdaptedLayer):
    """`h = W0 * x + b + s B * (A * x)`: A is (r, in / groups, kernel...), B is (out, r / groups, 1...).

    A slides over x as W0 does, B is pointwise, and both keep to W0's groups, so that the update is a weight of
    W0's shape. With DoRA, each output channel has a factor as in `dora.py`.
    """

    dora_dim = 0

    @classmethod
    def factor_shapes(cls, module: nn.Module, settings: LayerSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_channels, in_group, *kernel = _weight(module).shape
        r = settings.r
        return (r, in_group, *kernel), (out_channels, r // _groups(module), *(1 for _ in kernel))

    @classmethod
    def largest_rank(cls, module: nn.Module, settings: LayerSettings) -> int:
        out_channels, *rest = _weight(module).shape
        return min(out_channels, _groups(module) * math.prod(rest))

    @classmethod
    def refusal(cls, module: nn.Module, settings: LayerSettings) -> str | None:
        torch_class = next(cls for cls in CONVS if isinstance(module, cls))
        if not own_forward_calls_super(type(module), torch_class):
            return (
                f"{type(module).__name__} has a forward of its own that uses its weight in an unknown way: exclude it"
            )
        groups = _groups(module)
        if settings.r % groups:
            return f"it has {groups} groups and r={settings.r} is no multiple: set rank_pattern for it, or exclude it"
        return super().refusal(module, settings)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(n, in, size...) to (n, out, size...), or both without n."""
        if self.lora_enabled and not args and not kwargs and self._goes_quick(x):
            return self._quick(x)
        out: Tensor = super().forward(x, *args, **kwargs)
        if not self.lora_enabled:
            return out
        update = conv_update(self._slide, self.lora_input(x), self.lora_A, self.lora_B, self.lora_settings.scale)
        return self.lora_combine(out, update)

    def _goes_quick(self, x: Tensor) -> bool:
        """Whether `quick_conv` computes this call: torch's own arithmetic in the base, W0 frozen, some images."""
        cls: Any = type(self)
        if torch.compiler.is_compiling() or not _computes_plainly(cls):
            return False
        own = self._parameters
        weight, A = own.get("weight"), own.get("lora_A")
        if weight is None or A is None or weight.requires_grad or not drops_by_bytes(self._dropout_now()):
            return False
        fits = can_go_quick(x, *own.values()) and x.dim() == A.dim() and x.numel() > 0
        return fits and of_one_dtype(x, weight)

    def _quick(self, x: Tensor) -> Tensor:
        """The same by `quick_conv`, for x (n, in, size...); what is padded in an own way is padded once."""
        module: Any = self
        bias: Tensor | None = module.bias
        constant, padding, more = None if bias is None else bias.detach(), *_paddings(module)
        if any(more):
            x = F.pad(x, more, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        slide = Slide(module.stride, padding, module.dilation, module.groups)
        p, scale = self._dropout_now(), self.lora_settings.scale
        out = quick_conv(x, module.weight, constant, self.lora_A, self.lora_B, scale, slide, p)
        out = self.lora_rescale_(out, constant)
        return out if bias is None or not bias.requires_grad else with_bias_gradient(out, bias, self.dora_output_dim)

    def why_plain(self) -> str | None:
        cls: Any = type(self)
        return why_not_ordinary(self, of_its_own=not _computes_plainly(cls))

    def _row_factors(self) -> tuple[Tensor, Tensor, Tensor] | None:
        weight = self._parameters["weight"]
        if weight is None or _groups(self) != 1:
            return None
        return weight.flatten(1), self.lora_A.flatten(1), self.lora_B.flatten(1)

    def _slide(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, weight, None)  # type: ignore[operator]  # torch's, with every padding mode
        return out

    def delta_weight(self) -> Tensor:
        return conv_delta(self.lora_A, self.lora_B, self.lora_settings.scale, self._lora_dtype())

    def to_peft(self) -> dict[str, Tensor]:
        """PEFT's A sees all channels, (r, in, kernel...): ours has zeros at the channels of other groups."""
        groups, tensors = _groups(self), super().to_peft()
        if self.lora_magnitude_vector is not None:
            tensors["lora_magnitude_vector"] = self.lora_magnitude_vector.view(1, -1, *self.lora_B.shape[2:])
        if groups == 1:
            return tensors
        r, in_group, *kernel = self.lora_A.shape
        wide = self.lora_A.new_zeros(groups, r // groups, groups, in_group, *kernel)
        own = torch.arange(groups, device=wide.device)
        wide[own, :, own] = torch.unflatten(self.lora_A.detach(), 0, (groups, -1))
        return {**tensors, "lora_A": wide.flatten(2, 3).flatten(0, 1)}

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "lora_magnitude_vector" in tensors:
            tensors = {**tensors, "lora_magnitude_vector": tensors["lora_magnitude_vector"].flatten()}
        groups, A = _groups(self), tensors["lora_A"]
        if groups == 1 or A.dim() != self.lora_A.dim() or A.shape[1] % groups:
            return dict(tensors)
        wide = torch.unflatten(torch.unflatten(A, 1, (groups, -1)), 0, (groups, -1))
        own = torch.arange(groups)
        narrow = wide[own, :, own]
        if torch.count_nonzero(narrow) != torch.count_nonzero(A):
            raise AdapterError(
                f"lora_A of a convolution with {groups} groups reaches across groups, as PEFT trains it: no weight"
                f" of W0's shape can hold that update; train it anew, without this layer"
            )
        return {**tensors, "lora_A": narrow.flatten(0, 1)}


class LoRAConv1d(_Conv, nn.Conv1d):  # type: ignore[misc]  # a wider forward
    """`nn.Conv1d`."""

    kind = "Conv1d"
    dora_output_dim = -2


class LoRAConv2d(_Conv, nn.Conv2d):  # type: ignore[misc]  # a wider forward
    """`nn.Conv2d`."""

    kind = "Conv2d"
    dora_output_dim = -3


class LoRAConv3d(_Conv, nn.Conv3d):  # type: ignore[misc]  # a wider forward
    """`nn.Conv3d`."""

    kind = "Conv3d"
    dora_output_dim = -4


def _paddings(module: Any) -> tuple[tuple[int, ...], list[int]]:
    """Zeros on both sides, a number for each dimension; and what `F.pad` has to add before, in its reversed order."""
    sides = list(module._reversed_padding_repeated_twice)
    if module.padding_mode != "zeros":
        return (0,) * (len(sides) // 2), sides
    both = [min(pair) for pair in zip(sides[::2], sides[1::2], strict=True)]
    return tuple(reversed(both)), [side - both[i // 2] for i, side in enumerate(sides)]


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, CONVS)
    return module.weight


def _groups(module: nn.Module) -> int:
    assert isinstance(module, CONVS)
    return module.groups
