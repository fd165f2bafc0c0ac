"""A bare `nn.Parameter`: a matrix, or a stack of them such as a mixture's experts.

Code that reads the parameter gets `W0 + s B A`, computed in each forward; W0 stays where it is, under its name. So any
product that the model computes with it, grouped ones too, uses the adapted weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.config import LayerSettings
from lora_lightning.lora.layers.base import WHOLE, AdaptedLayer, Layout
from lora_lightning.lora.layers.class_swap import Grafted, graft, ungraft
from lora_lightning.lora.layers.functional import lora_delta, stack_factors

CHILD = "lora_of_"
"""A parameter's adapter is a child of its module, under this prefix and the parameter's name."""


class ParameterHost(Grafted):
    """A module some of whose parameters are adapted."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, in which each adapted parameter is computed once, however often it is read."""
        self.__dict__["lora_values"] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__.pop("lora_values", None)

    def lora_read(self, name: str) -> Tensor:
        values: dict[str, Tensor] = self.__dict__.get("lora_values", {})
        if name not in values:
            adapter: Any = self._modules[CHILD + name]
            values[name] = adapter.lora_read(name)
        return values[name]


class LoRAParameter(AdaptedLayer):
    """The factors of one parameter, in PEFT's layout.

    A matrix (out, in) has A (r, in) and B (out, r). A stack of e matrices has A (e r, in), an entry's rows together,
    and B (out, r e), with column `rank * e + entry`; the matrices are (out, in), or (in, out) where the module says
    so by `is_transposed`, as transformers' experts do.
    """

    kind = "Parameter"
    part_dim = 0
    has_input = False
    _owner: tuple[nn.Module]

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it does not become a child of its child

    def lora_name(self, path: str) -> str:
        return f"{path.rpartition('.')[0]}.{self.lora_settings.parameter}".removeprefix(".")

    @property
    def lora_owner(self) -> nn.Module:
        return self._owner[0]

    @classmethod
    def layout(cls, module: Any, settings: LayerSettings) -> Layout:
        r, parameter = settings.r, module._parameters[settings.parameter]
        count, rows, columns = parameter.shape if parameter.dim() == 3 else (1, *parameter.shape)
        outputs, inputs = (columns, rows) if _is_transposed(module, parameter) else (rows, columns)
        return Layout((count * r, inputs), (outputs, r * count), min(rows, columns), (settings.parameter,))

    @classmethod
    def refusal(cls, module: Any, settings: LayerSettings) -> str | None:
        parameter = module._parameters[settings.parameter]
        if parameter.dim() not in (2, 3) or not parameter.is_floating_point():
            return f"it is {parameter.dtype} of shape {tuple(parameter.shape)}; expected a matrix or a stack of them"
        return super().refusal(module, settings)

    @classmethod
    def attach(cls, module: nn.Module, settings: LayerSettings) -> AdaptedLayer:
        adapter = cls(module).train(module.training)
        adapter.add_factors(settings)
        if isinstance(module, ParameterHost):  # grafted anew below, for all of its adapted parameters
            ungraft(module, ParameterHost)
        module.add_module(CHILD + settings.parameter, adapter)
        graft(
            module, ParameterHost, tuple(name.removeprefix(CHILD) for name in module._modules if name.startswith(CHILD))
        )
        return adapter

    def _stacks(self) -> tuple[Tensor, Tensor]:
        """A (e, r, in) and B (e, out, r) of the entries of a stack, as views; a matrix is one entry."""
        return stack_factors(self.lora_A, self.lora_B, self.lora_A.shape[0] // self.lora_settings.r)

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*self._stacks(), strict=True))

    def delta_weight(self, part: slice = WHOLE, name: str = "weight") -> Tensor:
        """Parts are along the matrix's rows or the stack's entries."""
        s, dtype = self.lora_settings, self._lora_dtype()
        parameter: Tensor = self.lora_owner._parameters[s.parameter]  # type: ignore[assignment]
        if parameter.dim() == 2:
            return lora_delta(self.lora_A, self.lora_B[part], s.scale, dtype)
        A, B = (factors[part] for factors in self._stacks())
        if _is_transposed(self.lora_owner, parameter):
            A, B = B.mT, A.mT
        return lora_delta(A, B, s.scale, dtype)

    def extra_repr(self) -> str:
        return f"{self.lora_settings.parameter}{super().extra_repr()}"


def _is_transposed(module: nn.Module, parameter: Tensor) -> bool:
    return parameter.dim() == 3 and bool(getattr(module, "is_transposed", False))
