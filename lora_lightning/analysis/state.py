"""The factors in a checkpoint's own state, without its model: for one whose config or base is not at hand."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lora_lightning.analysis.adapters import Factors, natural
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.frozen.spectrum import matrix_pair, stack_pairs, subtract_init
from lora_lightning.lora.layers.parameter import CHILD
from lora_lightning.lora.targets.patterns import by_pattern

END = ".lora_A"


def factors_in_state(state: Mapping[str, Tensor], config: LoRAConfig) -> list[Factors]:
    """Every adapted layer of a state dict by our keys, in the order of their names.

    Raises:
        AdapterError: parts of a fused weight, whose places only the model knows; or nothing is adapted.
    """
    paths = [key.removesuffix(END) for key in state if key.endswith(END)]
    if not paths:
        raise AdapterError("the checkpoint has no A and B: nothing to analyse")
    return sorted((_layer(path, state, config) for path in paths), key=lambda layer: natural(layer.name))


def _layer(path: str, state: Mapping[str, Tensor], config: LoRAConfig) -> Factors:
    A, B = state[f"{path}.lora_A"], state[f"{path}.lora_B"]
    parent, _, last = path.rpartition(".")
    name = f"{parent}.{last.removeprefix(CHILD)}".removeprefix(".")
    r = by_pattern("rank_pattern", config.rank_pattern, [name], config.r)
    alpha = by_pattern("alpha_pattern", config.alpha_pattern, [name], config.scaling_alpha)
    is_stack = last.startswith(CHILD) and A.shape[0] != r
    if A.dim() == 2 and A.shape[0] != B.shape[1]:
        raise AdapterError(
            f"'{name}' is adapted in parts, whose places only its model knows: analyse the run with its config.yaml"
        )
    if is_stack:
        pairs = stack_pairs(A, B, A.shape[0] // r)
    else:
        pairs = [subtract_init(matrix_pair(A, B), state.get(f"{path}.lora_A0"), state.get(f"{path}.lora_B0"))]
    return Factors(
        name=name,
        kind="Parameter" if last.startswith(CHILD) else "Linear" if A.dim() == 2 else f"Conv{A.dim() - 2}d",
        r=r,
        scale=config.scale(r, alpha),
        pairs=pairs,
        groups=A.shape[0] // B.shape[1] if A.dim() > 2 else 1,
        dora=config.use_dora,
    )
