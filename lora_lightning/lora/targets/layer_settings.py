"""One layer's share of a config: its rank, alpha, dropout and parts, checked against the layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.layers import AdaptedLayer, LayerSettings
from lora_lightning.lora.targets.fused_projections import Slices, SliceSpec, resolve
from lora_lightning.lora.targets.patterns import by_pattern


@dataclass(frozen=True)
class Wanted:
    """One thing to adapt, by every name that it has."""

    names: list[str]
    module: nn.Module
    why: str
    parameter: str = ""


def settings_of(
    wanted: Wanted, kind: type[AdaptedLayer], config: LoRAConfig, modules: dict[str, nn.Module], parts: list[str]
) -> LayerSettings:
    """Resolve the patterns; `modules` by name, `parts` as a preset takes them of a fused layer.

    Raises:
        TargetError: two patterns of one length disagree, or the parts are not there.
    """
    r = by_pattern("rank_pattern", config.rank_pattern, wanted.names, config.r)
    alpha = by_pattern("alpha_pattern", config.alpha_pattern, wanted.names, config.scaling_alpha)
    return LayerSettings(
        r=r,
        alpha=alpha,
        scale=config.scale(r, alpha),
        dropout=by_pattern("dropout_pattern", config.dropout_pattern, wanted.names, config.dropout),
        init=config.init,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        slices=_slices(wanted, kind, config, modules, [] if wanted.parameter else parts),
        parameter=wanted.parameter,
    )


def _slices(
    wanted: Wanted, kind: type[AdaptedLayer], config: LoRAConfig, modules: dict[str, nn.Module], parts: list[str]
) -> Slices | None:
    """`parts` are taken where `slices` says nothing."""
    spec: SliceSpec = by_pattern("slices", config.slices, wanted.names, parts)
    if not spec:
        return None
    name = wanted.names[0]
    rows = kind.output_rows(wanted.module)
    if rows is None:
        raise TargetError(f"slices: '{name}', a {kind.kind}, has no parts to choose from")
    return resolve(name, wanted.module, modules.get(name.rpartition(".")[0]), rows, spec)


def check_fit(wanted: Wanted, kind: type[AdaptedLayer], settings: LayerSettings) -> None:
    """Raise a TargetError where the layer cannot be adapted so."""
    name = wanted.names[0]
    if any(p is not None and is_lazy(p) for p in wanted.module._parameters.values()):
        raise TargetError(f"cannot adapt '{name}': it is lazy and has no shape yet: run the model on a batch first")
    if reason := kind.refusal(wanted.module, settings):
        raise TargetError(f"cannot adapt '{name}': {reason}")
