"""Which modules a config selects, and why each one matched. Nothing is changed here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from torch import nn
from torch.nn.parameter import is_lazy

from lora_lightning.lora.config import ALL_LINEAR, LoRAConfig
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.frozen.tensors import get_module, named_modules
from lora_lightning.lora.init import from_weight as inits
from lora_lightning.lora.layers import AdaptedLayer, LayerSettings, LoRAParameter, kind_of
from lora_lightning.lora.report import OUTPUT_HEAD, STACK
from lora_lightning.lora.targets.bypass import bypassed_modules, computed_modules
from lora_lightning.lora.targets.fused_projections import Slices, SliceSpec, resolve_slices
from lora_lightning.lora.targets.output_heads import output_head
from lora_lightning.lora.targets.patterns import (
    block_number,
    by_pattern,
    flat,
    has_match,
    matches,
    matches_any,
    no_match,
    refuse_unused,
)
from lora_lightning.lora.targets.presets import PRESETS, preset_parts, preset_pattern
from lora_lightning.lora.targets.token_rows import TokenTarget, token_targets

Names = dict[nn.Module, list[str]]
"""Every name of each module, in the model's order: a module in two places has two and is adapted once."""


@dataclass(frozen=True)
class Target:
    """One module to adapt."""

    name: str
    module: nn.Module
    kind: type[AdaptedLayer]
    settings: LayerSettings
    why: str
    """The entry of the config that selected it."""


@dataclass
class Selection:
    """What a config means on one model."""

    targets: list[Target] = field(default_factory=list)
    saved: list[tuple[str, nn.Module]] = field(default_factory=list)
    tokens: list[TokenTarget] = field(default_factory=list)
    biases: list[nn.Module] = field(default_factory=list)
    """Modules whose parameter `bias` trains, in the model's order; those in `saved` train theirs anyway."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Modules and stacks of matrices that `all-linear` would have taken but for the reason given."""

    @property
    def inside_saved(self) -> dict[nn.Module, str]:
        """Every module within `modules_to_save`, with the name of the saved one."""
        return {module: name for name, saved in self.saved for module in saved.modules()}


@dataclass(frozen=True)
class _Wanted:
    """One thing to adapt, by every name that it has."""

    names: list[str]
    module: nn.Module
    why: str
    parameter: str = ""

    @property
    def kind(self) -> type[AdaptedLayer]:
        kind = LoRAParameter if self.parameter else kind_of(self.module)
        assert kind is not None
        return kind


def select(model: nn.Module, config: LoRAConfig, *, any_rank: bool = False) -> Selection:
    """Resolve `config` on `model`.

    Args:
        any_rank: for an adapter that is there already: r has no upper limit, `lora_bias` needs no bias to be merged
            into, and `bias` may find none.

    Raises:
        TargetError: an entry that matches nothing (near misses named), a module of a kind that has no adapted
            form, a rank that a layer does not allow.
    """
    model = get_module(model, "")
    names: Names = {}
    for name, module in named_modules(model, remove_duplicate=False):
        names.setdefault(module, []).append(name)
    bypassed = bypassed_modules(names)
    selection = Selection(saved=_modules_to_save(names, config, bypassed))
    found = _without_excluded(
        _target_modules(model, names, config, selection, computed_modules(names) | bypassed), names, config
    )
    wanted = [_Wanted(names[module], module, why) for module, why in found.items()]
    wanted = _in_layers(wanted + _target_parameters(names, config, selection), config)
    if config.target_modules == ALL_LINEAR:
        selection.skipped |= dict.fromkeys(_stacks(names, wanted, config, selection), STACK)
    settings = _settings(wanted, names, config, preset_parts(model, config.target_modules) if found else [])
    if not any_rank:
        wanted = _wide_enough(wanted, settings, config, selection)
    selection.tokens = token_targets(model, names, config.trainable_token_indices)
    _refuse_rows(selection, bypassed)
    if not wanted and not selection.tokens:
        raise TargetError(_nothing_left(names, config, selection))
    for field_name in ("rank_pattern", "alpha_pattern", "dropout_pattern", "slices"):
        refuse_unused(field_name, getattr(config, field_name), [w.names for w in wanted])
    for w in wanted:
        name, own = w.names[0], settings[w.names[0]]
        if not w.kind.has_input and (any_rank or w.why == ALL_LINEAR):
            own = replace(own, dropout=0.0)  # the one of all layers is not meant for it; the report shows 0
        if reason := _options_refusal(w, own):
            raise TargetError(reason)
        if any(p is not None and is_lazy(p) for p in w.module._parameters.values()):
            raise TargetError(f"cannot adapt '{name}': it is lazy and has no shape yet: run the model on a batch first")
        if reason := w.kind.refusal(w.module, own):
            raise TargetError(f"cannot adapt '{name}': {reason}")
        selection.targets.append(Target(name, w.module, w.kind, own, w.why))
    if not any_rank:
        _refuse_ranks(selection.targets)
        _refuse_lost_biases(selection.targets)
    selection.biases = _biases(model, config, selection, required=not any_rank)
    return selection


# What each field of the config names.


def _modules_to_save(names: Names, config: LoRAConfig, bypassed: dict[nn.Module, str]) -> list[tuple[str, nn.Module]]:
    """The outermost modules of `modules_to_save`: one inside another is in its copy already."""
    chosen: dict[str, nn.Module] = {}
    for entry in config.modules_to_save or []:
        exact = [m for m, group in names.items() if entry in group]
        hits = exact or [m for m, group in names.items() if any(matches([entry], n) for n in group)]
        if not hits:
            raise TargetError(no_match("modules_to_save", entry, flat(names.values())))
        if len(hits) > 1:
            several = ", ".join(f"'{names[m][0]}'" for m in hits[:4])
            raise TargetError(f"modules_to_save: '{entry}' is the end of several names: write in full {several}")
        chosen[names[hits[0]][0]] = hits[0]
    outermost = [(name, m) for name, m in chosen.items() if not any(name.startswith(f"{outer}.") for outer in chosen)]
    for name, module in outermost:
        if module in bypassed:
            raise TargetError(f"modules_to_save: cannot train '{name}': {bypassed[module]}")
        if quantized := [own for own, inner in module.named_modules() if scheme(inner)]:
            inside = f"{name}.{quantized[0]}".removesuffix(".")
            raise TargetError(
                f"modules_to_save: '{inside}' is quantized, and a copy of it cannot train: leave it out of the"
                " quantization (llm_int8_skip_modules of transformers' quantization_config)"
            )
        if type(module).forward is nn.Module.forward:
            inside = ", ".join([f"{name}.{child}" for child, _ in module.named_children()][:4])
            raise TargetError(
                f"modules_to_save: '{name}' is a {type(module).__name__}, which is never called itself, so a copy of"
                f" it would be ignored; name what it holds: {inside}"
            )
    return outermost


def _target_modules(
    model: nn.Module, names: Names, config: LoRAConfig, selection: Selection, unfit: dict[nn.Module, str]
) -> dict[nn.Module, str]:
    """Each module that `target_modules` selects with the entry that selected it, in the model's order."""
    inside_saved = selection.inside_saved
    candidates = {m: group for m, group in names.items() if m not in inside_saved}
    if config.target_modules == ALL_LINEAR:
        return _all_linear(model, candidates, unfit, selection)
    preset = preset_pattern(model, config.target_modules)
    pattern = config.target_modules if preset is None else preset
    found: dict[nn.Module, str] = {}
    used: set[str] = set()
    for module, group in candidates.items():
        hits = matches_any(pattern, group)
        if not hits:
            continue
        used.update(hits)
        if module in unfit:
            raise TargetError(f"cannot adapt '{group[0]}': {unfit[module]}")
        if kind_of(module) is None:
            raise TargetError(_unknown_kind(group[0], module, hits[0], candidates))
        found[module] = hits[0] if preset is None else str(config.target_modules)
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        if entry not in used:
            raise TargetError(_unused_target(entry, pattern, names, inside_saved))
    return found


def _unused_target(entry: str, pattern: str | list[str], names: Names, inside_saved: dict[nn.Module, str]) -> str:
    listed = isinstance(pattern, list)
    if any(matches([entry] if listed else entry, n) for m in inside_saved for n in names.get(m, [])):
        return f"target_modules: '{entry}' is in modules_to_save, which trains it in full: name it once"
    word = ALL_LINEAR if entry == "all" else entry.replace("_", "-")
    if "," not in entry and (close := get_close_matches(word, (ALL_LINEAR, *PRESETS), n=1, cutoff=0.8)):
        note = " (as a string, not in a list)" if listed else ""
        return f"target_modules: no module matches '{entry}'; did you mean '{close[0]}'?{note}"
    return no_match("target_modules", entry, flat(names.values()), is_regex=not listed)


def _all_linear(
    model: nn.Module, candidates: Names, unfit: dict[nn.Module, str], selection: Selection
) -> dict[nn.Module, str]:
    heads = output_head(model)
    found: dict[nn.Module, str] = {}
    for module, group in candidates.items():
        kind = kind_of(module)
        if kind is None or not kind.linear_like:
            continue
        if any(name == head or name.startswith(f"{head}.") for name in group for head in heads):
            selection.skipped[group[0]] = OUTPUT_HEAD
        elif module in unfit:
            selection.skipped[group[0]] = unfit[module]
        else:
            found[module] = ALL_LINEAR
    return found


def _stacks(names: Names, wanted: list[_Wanted], config: LoRAConfig, selection: Selection) -> list[str]:
    """Parameters that hold a matrix for each expert and are not adapted: `all-linear` sees modules alone."""
    taken, inside_saved = {(w.module, w.parameter) for w in wanted}, selection.inside_saved
    found = []
    for module, group in names.items():
        if kind_of(module) is not None or module in inside_saved or type(module).__module__.startswith("torch."):
            continue
        for own, p in module._parameters.items():
            if p is None or is_lazy(p) or p.dim() != 3 or min(p.shape) < 2 or (module, own) in taken:
                continue
            full = [f"{name}.{own}" if name else own for name in group]
            layers = config.layers_to_transform
            asked_for = layers is None or block_number(full[0]) in layers  # type: ignore[operator]  # checked to be a list
            if asked_for and not any(matches(config.exclude_modules or [], name) for name in (*full, *group)):
                found.append(full[0])
    return found


def _without_excluded(found: dict[nn.Module, str], names: Names, config: LoRAConfig) -> dict[nn.Module, str]:
    pattern = config.exclude_modules
    if not pattern:
        return found
    everything = flat(names.values())
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        if not any(matches([entry] if isinstance(pattern, list) else entry, name) for name in everything):
            raise TargetError(no_match("exclude_modules", entry, everything, is_regex=isinstance(pattern, str)))
    return {m: why for m, why in found.items() if not any(matches(pattern, name) for name in names[m])}


def _target_parameters(names: Names, config: LoRAConfig, selection: Selection) -> list[_Wanted]:
    """The parameters that `target_parameters` selects, in the model's order."""
    entries, inside_saved = config.target_parameters or [], selection.inside_saved
    used, known, wanted = set[str](), list[str](), list[_Wanted]()
    for module, group in names.items() if entries else ():
        for own in module._parameters if module not in inside_saved else ():
            full = [f"{name}.{own}" if name else own for name in group]
            known += full
            hits = matches_any(entries, full)
            used.update(hits)
            excluded = any(matches(config.exclude_modules or [], name) for name in full)
            if hits and module._parameters[own] is not None and not excluded:
                wanted.append(_Wanted(full, module, hits[0], own))
    for entry in entries:
        if entry not in used:
            raise TargetError(no_match("target_parameters", entry, known, what="parameter"))
    return wanted


def _in_layers(wanted: list[_Wanted], config: LoRAConfig) -> list[_Wanted]:
    layers = config.layers_to_transform
    if layers is None:
        return wanted
    assert isinstance(layers, list)
    numbers = [block_number(w.names[0]) for w in wanted]
    there = sorted({n for n in numbers if n is not None})
    missing = sorted(set(layers) - set(there))
    if missing:
        blocks = f"{there[0]} to {there[-1]}" if there else "none: no selected module has a number in its name"
        raise TargetError(f"layers_to_transform: no selected module is in block {missing[0]}; blocks there: {blocks}")
    return [w for w, n in zip(wanted, numbers, strict=True) if n in layers]


def _biases(model: nn.Module, config: LoRAConfig, selection: Selection, *, required: bool) -> list[nn.Module]:
    if config.bias == "none":
        return []
    candidates = list(dict.fromkeys(target.module for target in selection.targets))
    if config.bias == "all":
        candidates = [module for module in model.modules() if module not in selection.inside_saved]
    biased = [m for m in candidates if (b := m._parameters.get("bias")) is not None and b.is_floating_point()]
    if not biased and required:
        whose = "no module" if config.bias == "all" else "none of the selected modules"
        raise TargetError(f"bias '{config.bias}': {whose} has a bias to train: use bias 'none'")
    return biased


# Each layer's share of the config.


def _settings(wanted: list[_Wanted], names: Names, config: LoRAConfig, parts: list[str]) -> dict[str, LayerSettings]:
    """Each layer's settings by its first name; `parts` are taken of a fused layer where `slices` says nothing.

    Raises:
        TargetError: two patterns of one length disagree, or the parts are not there.
    """
    modules = {group[0]: module for module, group in names.items()}
    found: dict[str, LayerSettings] = {}
    for w in wanted:
        r = by_pattern("rank_pattern", config.rank_pattern, w.names, config.r)
        alpha = by_pattern("alpha_pattern", config.alpha_pattern, w.names, config.scaling_alpha)
        spec: SliceSpec = by_pattern("slices", config.slices, w.names, [] if w.parameter else parts)
        found[w.names[0]] = LayerSettings(
            r=r,
            alpha=alpha,
            scale=config.scale(r, alpha),
            dropout=by_pattern("dropout_pattern", config.dropout_pattern, w.names, config.dropout),
            init=config.init,
            use_dora=config.use_dora,
            lora_bias=config.lora_bias,
            slices=_slices(w, spec, modules) if spec else None,
            parameter=w.parameter,
        )
    return found


def _slices(wanted: _Wanted, spec: SliceSpec, modules: dict[str, nn.Module]) -> Slices:
    name, rows = wanted.names[0], wanted.kind.output_rows(wanted.module)
    if rows is None:
        raise TargetError(f"slices: '{name}', a {wanted.kind.kind}, has no parts to choose from")
    return resolve_slices(name, wanted.module, modules.get(name.rpartition(".")[0]), rows, spec)


def _wide_enough(
    wanted: list[_Wanted], settings: dict[str, LayerSettings], config: LoRAConfig, selection: Selection
) -> list[_Wanted]:
    """Leave out what `all-linear` found and r is too large for, unless `rank_pattern` names it: that is refused."""
    kept = []
    for w in wanted:
        own = settings[w.names[0]]
        named = w.why != ALL_LINEAR or has_match(config.rank_pattern, w.names)
        if named or own.r <= (largest := w.kind.largest_rank(w.module, own)):
            kept.append(w)
        else:
            selection.skipped[w.names[0]] = f"r={own.r} is larger than the smaller side of its weight, {largest}"
    return kept


# What is refused: a layer that cannot take an option, each with what to do.


def _options_refusal(wanted: _Wanted, settings: LayerSettings) -> str | None:
    """Why the layer cannot take DoRA, `lora_bias` or the start asked for; None where it can."""
    name, module, kind, init = wanted.names[0], wanted.module, wanted.kind, settings.init
    needs_w0 = inits.is_from_weight(init) or init in inits.DATA_INITS
    what = f"a {type(module).__name__}" if not settings.parameter else "a bare parameter"
    if settings.slices and (settings.use_dora or settings.lora_bias or needs_w0):
        option = "use_dora" if settings.use_dora else "lora_bias" if settings.lora_bias else f"init '{init}'"
        return f"{option} has no form for chosen slices yet, and '{name}' has some: leave one of them out"
    if settings.use_dora and kind.dora_dim is None:
        return f"use_dora: '{name}', {what}, has no DoRA form: exclude it or switch it off"
    if settings.lora_bias and not kind.has_lora_bias:
        return f"lora_bias: '{name}', {what}, takes no bias on B: exclude it"
    if not needs_w0:
        return None
    if not kind.has_inits:
        return f"init '{init}' is made for linear layers; '{name}' is {what}: exclude it, or use init 'gaussian'"
    if init == "loftq" and scheme(module) is None:
        return (
            f"init 'loftq' takes back what quantization lost, and '{name}', {what},"
            f" is not quantized: load the base in 4 or 8 bits, or use init 'pissa'"
        )
    shape_a, shape_b = kind.factor_shapes(module, settings)
    reason = inits.refusal(init, settings.r, (shape_b[0], shape_a[1]))
    return f"{reason} (module '{name}')" if reason else None


def _refuse_ranks(targets: list[Target]) -> None:
    """Raise a TargetError where r is above the smaller side of a weight: all of them in one, with lines to copy."""
    largest = {t.name: t.kind.largest_rank(t.module, t.settings) for t in targets}
    narrow = [t for t in targets if t.settings.r > largest[t.name]]
    if not narrow:
        return
    ends = _ends([t.name for t in narrow], largest)
    # Keys of rank_pattern are regular expressions.
    ranks = {".".join(map(re.escape, e.split("."))): min(largest[n] for n in names) for e, names in ends.items()}
    name = narrow[0].name
    raise TargetError(
        f"r={narrow[0].settings.r} is larger than the layer '{name}' allows ({largest[name]}, the smaller side of its"
        f" weight){_and_more(len(narrow))}: lower r, or add rank_pattern={json.dumps(ranks)}, or add"
        f" exclude_modules={json.dumps(list(ends))}"
    )


def _refuse_lost_biases(targets: list[Target]) -> None:
    """Raise a TargetError where B's bias would have no bias to be merged into."""
    biasless = [t.name for t in targets if t.settings.lora_bias and t.module._parameters.get("bias") is None]
    if biasless:
        ends = _ends(biasless, [t.name for t in targets])
        raise TargetError(
            f"lora_bias: '{biasless[0]}' has no bias for a merge to add B's to{_and_more(len(biasless))}: add"
            f" exclude_modules={json.dumps(list(ends))}, or set lora_bias=False"
        )


def _and_more(count: int) -> str:
    return f", nor do {count - 1} more" if count > 1 else ""


def _ends(names: list[str], selected: Iterable[str]) -> dict[str, list[str]]:
    """The shortest ends of names that select `names` and nothing else of what is selected, with what each selects."""
    others = set(selected) - set(names)
    ends: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        tails = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        fitting = [tail for tail in tails if not any(matches([tail], other) for other in others)]
        ends.setdefault(fitting[0] if fitting else name, []).append(name)
    return ends


def _refuse_rows(selection: Selection, bypassed: dict[nn.Module, str]) -> None:
    """Rows that the model would read past, or whose embedding or tied head `modules_to_save` trains in full."""
    inside_saved = selection.inside_saved
    for token in selection.tokens:
        if token.module in bypassed:
            raise TargetError(f"trainable_token_indices: cannot train rows of '{token.name}': {bypassed[token.module]}")
        if module := next((m for m in (token.module, *token.tied) if m in inside_saved), None):
            raise TargetError(
                f"trainable_token_indices: the weight of '{token.name}' is in '{inside_saved[module]}' of"
                f" modules_to_save, which trains it in full: name it once"
            )


def _unknown_kind(name: str, module: nn.Module, why: str, candidates: Names) -> str:
    inner = [g[0].removeprefix(f"{name}.") for m, g in candidates.items() if g[0].startswith(f"{name}.") and kind_of(m)]
    inside = f"; adaptable inside it: {', '.join(inner[:4])}" if inner else ""
    return f"target_modules: '{why}' selects '{name}', a {type(module).__name__}, which has no LoRA form{inside}"


def _nothing_left(names: Names, config: LoRAConfig, selection: Selection) -> str:
    if config.exclude_modules:
        return f"target_modules {config.target_modules!r} less exclude_modules {config.exclude_modules!r} is empty"
    kinds = sorted({type(module).__name__ for module in names if not list(module.children())})
    skipped = "".join(f"; left out: '{name}' ({reason})" for name, reason in list(selection.skipped.items())[:3])
    named = [group[0] for module, group in names.items() if kind_of(module) and group[0] not in selection.skipped]
    by_name = f"; adaptable by name: {', '.join(named[:4])}" if named else ""
    return f"target_modules {config.target_modules!r} selects nothing among {', '.join(kinds)}{skipped}{by_name}"
