"""W0 of each adapted layer as one matrix for each pair (A, B): from a model in memory, or from files one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lora_lightning.analysis.adapters import Factors
from lora_lightning.analysis.spectra import weight_matrices
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.peft.load import Read
from lora_lightning.lora.frozen.quantization import plain_weight
from lora_lightning.lora.frozen.spectrum import subtract_init
from lora_lightning.lora.frozen.tensors import full_name
from lora_lightning.lora.init.from_weight import factors_from_weight, is_from_weight


class Weights:
    """W0 by the names of adapted layers.

    Args:
        model: the plain model or the adapted one; on the meta device where `read` reads the values.
    """

    def __init__(self, model: nn.Module, read: Read | None = None) -> None:
        self.modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.prefix = str(getattr(model, "base_model_prefix", ""))
        """transformers' name of the model without its head, with which an adapter's names may begin."""
        self.read = read

    def of(self, layer: Factors) -> list[Tensor] | None:
        """The matrices (m, k), one for each pair of the layer; None where the files have no values for it.

        Raises:
            AdapterError: the model has no such layer, or it has another shape.
        """
        owner, key = self.place(layer)
        module = self.modules[owner]
        if self.read is not None:
            weight = self.read(full_name(owner, key))
        else:
            weight = plain_weight(module) if key == "weight" else module._parameters[key]
        if weight is None:
            return None
        matrices = weight_matrices(module, weight.detach(), stacked=layer.kind == "Parameter")
        shapes = {tuple(matrix.shape) for matrix in matrices}
        if len(matrices) != len(layer.pairs) or shapes != {layer.shape}:
            raise AdapterError(
                f"'{layer.name}': the base holds {len(matrices)} of shape {sorted(shapes)[0]}, and the adapter changes"
                f" {len(layer.pairs)} of {layer.shape}: name the base that it was made on"
            )
        return matrices

    def place(self, layer: Factors) -> tuple[str, str]:
        """The name of the module that holds W0, and the parameter's name in it; an AdapterError where there is none."""
        if layer.kind == "Parameter":
            owner, _, key = layer.name.rpartition(".")
        else:
            owner, key = layer.name, "in_proj_weight" if layer.kind == "MultiheadAttention" else "weight"
        for name in (owner, owner.removeprefix(f"{self.prefix}."), f"{self.prefix}.{owner}"):
            module = self.modules.get(name)
            if module is not None and module._parameters.get(key) is not None:
                return name, key
        raise AdapterError(f"the base has no '{layer.name}', which the adapter changes: name the base of its own")


def add_starts(layers: list[Factors], init: str, weights: Weights | None) -> list[Factors]:
    """The layers with the update `s (B A - B0 A0)`, where PEFT's init subtracted s B0 A0 from W0.

    Raises:
        AdapterError: there is such an init and no W0 to compute it from.
    """
    return [_add_start(layer, init, weights) for layer in layers] if is_from_weight(init) else layers


def _add_start(layer: Factors, init: str, weights: Weights | None) -> Factors:
    W0 = None if weights is None else weights.of(layer)
    if W0 is None or len(layer.pairs) != 1:
        raise AdapterError(
            f"the adapter counts on the start '{init}', which follows from W0: name its base with --base_model"
        )
    (A, B), (A0, B0) = layer.pairs[0], factors_from_weight(init, W0[0], layer.r, layer.scale)
    return replace(layer, pairs=[subtract_init((A, B), A0.to(A.dtype), B0.to(B.dtype))])
