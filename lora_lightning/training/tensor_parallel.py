"""Tensor parallelism of an adapted backbone: layers split within themselves over the processes of one group.

With N processes, a layer that is split by its outputs (colwise) has rows of W0 and b in each, a layer that is split by
its inputs (rowwise) columns of W0:

    colwise:  h_i = W_i x + b_i + s B_i (A x)          A whole, B by rows; h stays in parts, or is gathered
    rowwise:  h = sum over i of W_i x_i + s B (A_i x_i), + b + s b_B once       A by columns, B whole

The rowwise update goes into the layer's own partial sums, so it costs no message of its own. What is whole in a split
layer (A, or B and the biases) gets a part of its gradient in each process; the parts are added up once, before the
gradients are reduced over the data-parallel processes. Everything outside of the split layers is the same in all
processes of a group, its gradients too.

Parameters are DTensors on the mesh's second dimension, on which FSDP2 lays its own. Layers compute on what this process
holds, by the arithmetic that they have anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.fused_linear import eager_arithmetic
from lora_lightning.training.tensor_ops import Copies, PartOfDropout, joined, summed
from lora_lightning.training.tensor_plan import Plan, Style

BY_OUTPUT: dict[str, int | None] = {"weight": 0, "bias": 0, "lora_A": None, "lora_B": 0}
BY_OUTPUT |= {"lora_B_bias": 0, "lora_trained_bias": 0}
BY_INPUT: dict[str, int | None] = {"weight": 1, "bias": None, "lora_A": 1, "lora_B": None}
BY_INPUT |= {"lora_B_bias": None, "lora_trained_bias": None}
"""The dimension along which a parameter of a linear layer is split; None where each process has it whole."""

BIASES = ("bias", "lora_B_bias", "lora_trained_bias")
"""Of a layer that is split by its inputs, the first process alone adds these."""


class TensorParallel:
    """Splits the modules of one backbone, a part of it at a time.

    Args:
        backbone: adapted; `tensor_refusals.refuse` has been asked about it.
        mesh: of the one dimension that layers are split over.
    """

    def __init__(self, backbone: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.copies = Copies(self.group)
        self._styles = {id(backbone.get_submodule(name)): style for name, style in plan.styles.items()}
        self._done: set[int] = set()

    @torch.no_grad()
    def split(self, part: nn.Module) -> None:
        """Split what the plan names within `part`, and lay what else trains there on the mesh, whole."""
        for module in part.modules():
            if id(module) in self._done:
                continue
            self._done.add(id(module))
            style = self._styles.get(id(module))
            if style is not None:
                assert isinstance(module, nn.Linear)
                self._split_linear(module, style)
            elif any(p is not None and p.requires_grad for p in module._parameters.values()):
                self._keep_whole(module)

    def _split_linear(self, module: nn.Linear, style: Style) -> None:
        sides = BY_OUTPUT if style.by_output else BY_INPUT
        self._distribute(module, sides)
        grads = {name: Partial() if side is None else Shard(side) for name, side in sides.items()}
        own: Callable[..., Tensor] = module.forward
        if style.by_output:
            _set_forward(module, self._by_output(module, own, grads, style))
        else:
            dropout = module._modules.get("lora_dropout")
            if isinstance(dropout, nn.Dropout):
                module._modules["lora_dropout"] = PartOfDropout(dropout.p, self.group).train(dropout.training)
            _set_forward(module, self._by_input(module, own, grads, style))

    def _by_output(
        self, module: nn.Linear, own: Callable[..., Tensor], grads: Mapping[str, Placement], style: Style
    ) -> Callable[..., Tensor]:
        def forward(input: Tensor) -> Tensor:
            with local_parameters(module, grads):
                out = own(self.copies.of(input))
            return joined(out, self.group) if style.is_whole else out

        return forward

    def _by_input(
        self, module: nn.Linear, own: Callable[..., Tensor], grads: Mapping[str, Placement], style: Style
    ) -> Callable[..., Tensor]:
        rank, width = self.mesh.get_local_rank(), module.in_features // self.mesh.size()
        silent = BIASES if rank else ()

        def forward(input: Tensor) -> Tensor:
            if style.is_whole:
                input = self.copies.of(input).narrow(-1, rank * width, width)
            dropout = module._modules.get("lora_dropout")
            drops = dropout is not None and dropout.training  # by a mask that the quick form does not know
            with local_parameters(module, grads, silent), eager_arithmetic() if drops else nullcontext():
                return summed(own(input), self.group)

        return forward

    def _keep_whole(self, module: nn.Module) -> None:
        """What trains lies on one mesh, or norms over all gradients could not be taken."""
        own = {name: p for name, p in module._parameters.items() if p is not None and p.requires_grad}
        self._distribute(module, dict.fromkeys(own))
        grads, forward = dict.fromkeys(own, Replicate()), module.forward

        def whole(*args: Any, **kwargs: Any) -> Any:
            with local_parameters(module, grads):
                return forward(*args, **kwargs)

        _set_forward(module, whole)

    def _distribute(self, module: nn.Module, sides: Mapping[str, int | None]) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and name in sides:
                side = sides[name]
                placement = Replicate() if side is None else Shard(side)
                part = distribute_tensor(parameter.detach(), self.mesh, [placement], src_data_rank=None)
                part = _contiguous(part)
                module._parameters[name] = nn.Parameter(part, requires_grad=parameter.requires_grad)


def _contiguous(tensor: DTensor) -> DTensor:
    """In memory of its own, which FSDP2 asks for, with the whole's shape."""
    part = tensor.to_local().clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """On the object: its class, by which layers are known, stays."""
    module.__dict__["forward"] = forward


@contextmanager
def local_parameters(module: nn.Module, grads: Mapping[str, Placement], silent: tuple[str, ...] = ()) -> Iterator[None]:
    """Within the block the module's DTensors are what this process holds of them.

    Args:
        grads: what the gradient that a process finds is, of the whole.
        silent: parameters that are zero here, so that the sum over all processes has them once.
    """
    held: dict[str, Any] = module._parameters
    before = dict(held)
    try:
        for name, parameter in before.items():
            if isinstance(parameter, DTensor):
                if parameter.device_mesh.ndim > 1:
                    raise LoRAError(
                        f"a split {type(module).__name__} was called outside of the backbone's own call, where its"
                        " weights are not gathered: train without tensor parallelism"
                    )
                part = parameter.to_local(grad_placements=[grads[name]])
                held[name] = part * 0 if name in silent else part
        yield
    finally:
        held.update(before)
