"""`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, with any stride, padding, padding mode, dilation and groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.config import LayerSettings
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.layers.base import WHOLE, AdaptedLayer, Layout
from lora_lightning.lora.layers.class_swap import own_forward_calls_super
from lora_lightning.lora.layers.functional import lora_delta, without_groups

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Conv(AdaptedLayer):
    """`h = W0 * x + b + s B * (A * x)`: A is (r, in / groups, kernel...), B is (out, r / groups, 1...).

    A has the stride, padding and dilation of W0, B is pointwise, and both have W0's groups, so that the update is a
    weight of W0's shape. With DoRA, each output channel has a factor as in `dora.py`.
    """

    dora_dim = 0
    has_lora_bias = True
    groups: int

    @classmethod
    def layout(cls, module: Any, settings: LayerSettings) -> Layout:
        out_channels, in_group, *kernel = module.weight.shape
        r, groups = settings.r, module.groups
        largest = min(out_channels, groups * in_group * math.prod(kernel))
        return Layout((r, in_group, *kernel), (out_channels, r // groups, *(1 for _ in kernel)), largest)

    @classmethod
    def refusal(cls, module: Any, settings: LayerSettings) -> str | None:
        torch_class = next(cls for cls in CONVS if isinstance(module, cls))
        if not own_forward_calls_super(type(module), torch_class):
            return (
                f"{type(module).__name__} has a forward of its own that uses its weight in an unknown way: exclude it"
            )
        if settings.r % module.groups:
            return (
                f"it has {module.groups} groups and r={settings.r} is no multiple: set rank_pattern for it, or exclude"
                " it"
            )
        return super().refusal(module, settings)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(n, in, size...) to (n, out, size...), or both without n."""
        out: Tensor = super().forward(input, *args, **kwargs)
        return self.lora_finish(out + self.lora_update(input)) if self.lora_enabled else out

    def lora_update(self, x: Tensor) -> Tensor:
        """`s B * (A * x)`, of the output's shape."""
        x = self.lora_input(x)
        z: Tensor = self._conv_forward(x, self.lora_A.to(x.dtype), None)  # type: ignore[operator]  # with its padding
        pointwise = (F.conv1d, F.conv2d, F.conv3d)[self.lora_A.dim() - 3]
        return pointwise(z * self.lora_settings.scale, self.lora_B.to(x.dtype), groups=self.groups)

    def _stacks(self) -> tuple[Tensor, Tensor]:
        """A (groups, r / groups, in / groups times kernel) and B (groups, out / groups, r / groups), as views."""
        A, B = (torch.unflatten(factor.flatten(1), 0, (self.groups, -1)) for factor in (self.lora_A, self.lora_B))
        return A, B

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """A pair for each group of channels."""
        return list(zip(*self._stacks(), strict=True))

    def delta_weight(self, part: slice = WHOLE, name: str = "weight") -> Tensor:
        delta = lora_delta(*self._stacks(), self.lora_settings.scale, self._lora_dtype())
        return torch.unflatten(delta.flatten(0, 1), 1, self.lora_A.shape[1:])

    def to_peft(self) -> dict[str, Tensor]:
        """PEFT's A (r, in, kernel...) sees all channels; here it is zero at the channels of other groups."""
        tensors = super().to_peft()
        if self.lora_magnitude_vector is not None:
            tensors["lora_magnitude_vector"] = self.lora_magnitude_vector.view(1, -1, *self.lora_B.shape[2:])
        return {**tensors, "lora_A": without_groups(self.lora_A, self.groups)}

    def from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "lora_magnitude_vector" in tensors:
            tensors = {**tensors, "lora_magnitude_vector": tensors["lora_magnitude_vector"].flatten()}
        groups, A = self.groups, tensors["lora_A"]
        if groups == 1 or A.dim() != self.lora_A.dim() or A.shape[1] % groups:
            return dict(tensors)
        wide = torch.unflatten(torch.unflatten(A, 1, (groups, -1)), 0, (groups, -1))
        index = torch.arange(groups)
        narrow = wide[index, :, index]
        if torch.count_nonzero(narrow) != torch.count_nonzero(A):
            raise AdapterError(
                f"lora_A of a convolution with {groups} groups reaches across groups, as PEFT trains it: no weight"
                f" of W0's shape can hold that update; train it anew, without this layer"
            )
        return {**tensors, "lora_A": narrow.flatten(0, 1)}


class LoRAConv1d(_Conv, nn.Conv1d):  # type: ignore[misc]  # a wider forward
    """`nn.Conv1d`."""

    kind = "Conv1d"


class LoRAConv2d(_Conv, nn.Conv2d):  # type: ignore[misc]  # a wider forward
    """`nn.Conv2d`."""

    kind = "Conv2d"


class LoRAConv3d(_Conv, nn.Conv3d):  # type: ignore[misc]  # a wider forward
    """`nn.Conv3d`."""

    kind = "Conv3d"


def is_conv_unlike_peft(module: nn.Module) -> bool:
    """Whether PEFT computes another update: its A pads with zeros, whatever W0's mode, and is not dilated."""
    if not isinstance(module, CONVS):
        return False
    is_dilated = any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return is_dilated or module.padding_mode != "zeros"
