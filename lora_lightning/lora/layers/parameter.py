"""A bare `nn.Parameter`: a matrix, or a stack of them such as a mixture's experts.

Code that reads the parameter gets `W0 + s B A`, computed in each forward; W0 stays where it is, under its name. So any
product that the model computes with it, grouped ones too, uses the adapted weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.config import LayerSettings
from lora_lightning.lora.layers.base import WHOLE, AdaptedLayer
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
        """`W0 + s B A`."""
        values = self.__dict__.get("lora_values", {})
        if name not in values:
            W0 = self._parameters[name]
            adapter = self._modules[CHILD + name]
            assert W0 is not None
            assert isinstance(adapter, LoRAParameter)
            values[name] = adapter.updated_weights()[name].to(W0.dtype) if adapter.lora_enabled else W0
        value: Tensor = values[name]
        return value


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

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as any module: this class is defined here, not made by `graft`."""
        return object.__reduce_ex__(self, protocol)  # type: ignore[return-value]

    def lora_name(self, path: str) -> str:
        return f"{path.rpartition('.')[0]}.{self.lora_settings.parameter}".removeprefix(".")

    @property
    def lora_owner(self) -> nn.Module:
        return self._owner[0]

    @classmethod
    def factor_shapes(cls, module: nn.Module, settings: LayerSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
        count, out_features, in_features = _layout(module, settings.parameter)
        return (count * settings.r, in_features), (out_features, settings.r * count)

    @classmethod
    def largest_rank(cls, module: nn.Module, settings: LayerSettings) -> int:
        return min(_layout(module, settings.parameter)[1:])

    @classmethod
    def refusal(cls, module: nn.Module, settings: LayerSettings) -> str | None:
        parameter = module._parameters[settings.parameter]
        assert parameter is not None
        if parameter.dim() not in (2, 3) or not parameter.is_floating_point():
            return f"it is {parameter.dtype} of shape {tuple(parameter.shape)}; expected a matrix or a stack of them"
        return super().refusal(module, settings)

    @classmethod
    def adapted_parameters(cls, module: nn.Module, settings: LayerSettings) -> dict[str, nn.Parameter]:
        parameter = module._parameters[settings.parameter]
        assert parameter is not None
        return {settings.parameter: parameter}

    @classmethod
    def attach(cls, module: nn.Module, settings: LayerSettings) -> AdaptedLayer:
        adapter = cls(module).train(module.training)
        adapter.add_factors(settings)
        module.add_module(CHILD + settings.parameter, adapter)
        _regraft(module)
        return adapter

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        count, _, _ = _layout(self.lora_owner, self.lora_settings.parameter)
        return list(zip(*stack_factors(self.lora_A, self.lora_B, count), strict=True))

    def delta_weight(self, part: slice = WHOLE) -> Tensor:
        """Parts are along the matrix's rows or the stack's entries."""
        name, scale, dtype = self.lora_settings.parameter, self.lora_settings.scale, self._lora_dtype()
        parameter = self.adapted_parameters(self.lora_owner, self.lora_settings)[name]
        if parameter.dim() == 2:
            return lora_delta(self.lora_A, self.lora_B[part], scale, dtype)
        A, B = stack_factors(self.lora_A, self.lora_B, len(parameter))
        if _is_transposed(self.lora_owner):
            return lora_delta(B[part].mT, A[part].mT, scale, dtype)
        return lora_delta(A[part], B[part], scale, dtype)

    def extra_repr(self) -> str:
        return f"{self.lora_settings.parameter}{super().extra_repr()}"


def _regraft(module: nn.Module) -> None:
    """Make the module's class read exactly its adapted parameters by `lora_read`."""
    if isinstance(module, ParameterHost):
        ungraft(module, ParameterHost)
    names = tuple(name.removeprefix(CHILD) for name, m in module._modules.items() if isinstance(m, LoRAParameter))
    if names:
        graft(module, ParameterHost, names)


def _layout(module: nn.Module, name: str) -> tuple[int, int, int]:
    """(entries of the stack, outputs, inputs); a matrix is one entry."""
    parameter = module._parameters[name]
    assert parameter is not None
    if parameter.dim() == 2:
        return 1, parameter.shape[0], parameter.shape[1]
    count, rows, columns = parameter.shape
    return (count, columns, rows) if _is_transposed(module) else (count, rows, columns)


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))
