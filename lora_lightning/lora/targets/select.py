"""Which modules a config selects, and why each one matched. This does not change the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from torch import nn
from torch.nn.parameter import is_lazy

from lora_lightning.lora.config import ALL_LINEAR, LayerSettings, LoRAConfig
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.frozen.tensors import full_name, get_module, named_modules
from lora_lightning.lora.init import from_weight as inits
from lora_lightning.lora.layers import AdaptedLayer, LoRAParameter, kind_of
from lora_lightning.lora.report import OUTPUT_HEAD, STACK
from lora_lightning.lora.targets.bypass import bypassed_modules, parametrized_modules, refuse_uncalled
from lora_lightning.lora.targets.fused_projections import SliceSpec, resolve_slices
from lora_lightning.lora.targets.output_heads import output_head
from lora_lightning.lora.targets.patterns import (
    all_names,
    block_number,
    by_pattern,
    dotted_ends,
    find_module,
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


@dataclass(eq=False)
class Target:
    """One module, or one bare parameter of it, to adapt."""

    names: list[str]
    """Every name of the module or parameter, the model's first one first."""
    module: nn.Module
    why: str
    """The entry of the config that selected it."""
    parameter: str = ""
    settings: LayerSettings = field(init=False)

    @property
    def name(self) -> str:
        """The name for reports and errors."""
        return self.names[0]

    @property
    def kind(self) -> type[AdaptedLayer]:
        """The class of the adapted layer."""
        kind = LoRAParameter if self.parameter else kind_of(self.module)
        assert kind is not None
        return kind

    @property
    def largest_rank(self) -> int:
        """The smaller side of its weight."""
        return self.kind.layout(self.module, self.settings).largest_rank


@dataclass
class Selection:
    """What a config selects in one model."""

    targets: list[Target] = field(default_factory=list)
    saved: list[tuple[str, nn.Module]] = field(default_factory=list)
    tokens: list[TokenTarget] = field(default_factory=list)
    biases: list[nn.Module] = field(default_factory=list)
    """Modules whose parameter `bias` trains, in the model's order; those in `saved` train theirs anyway."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Modules and stacks of matrices that `all-linear` leaves out, with the reason."""

    @property
    def inside_saved(self) -> dict[nn.Module, str]:
        """Every module within `modules_to_save`, with the name of the saved one."""
        return {module: name for name, saved in self.saved for module in saved.modules()}


def select(model: nn.Module, config: LoRAConfig, *, any_rank: bool = False) -> Selection:
    """Resolve `config` on `model`.

    Args:
        any_rank: r has no upper limit, `lora_bias` needs no bias to merge into, and `bias` may select none: for an
            adapter that was trained elsewhere.

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
    targets = _target_modules(model, names, config, selection, parametrized_modules(names) | bypassed)
    parts = preset_parts(model, config.target_modules) if targets else []
    targets = _in_layers(targets + _target_parameters(names, config, selection), config)
    refuse_uncalled(names, [*selection.saved, *((target.names[0], target.module) for target in targets)])
    if config.target_modules == ALL_LINEAR:
        selection.skipped |= dict.fromkeys(_stacks(targets, names, config, selection), STACK)
    modules = {group[0]: module for module, group in names.items()}
    for target in targets:
        target.settings = _settings(target, config, parts, modules)
    if not any_rank:
        targets = _without_narrow(targets, config, selection)
    selection.tokens = token_targets(model, names, config.trainable_token_indices)
    _refuse_rows(selection, bypassed)
    if not targets and not selection.tokens:
        raise TargetError(_nothing_left(names, config, selection))
    for field_name in ("rank_pattern", "alpha_pattern", "dropout_pattern", "slices"):
        refuse_unused(field_name, getattr(config, field_name), [target.names for target in targets])
    for target in targets:
        if not target.kind.has_input and (any_rank or target.why == ALL_LINEAR):
            # It has no input to drop from; the report shows 0.
            target.settings = replace(target.settings, dropout=0.0)
        _refuse_unfit(target)
    selection.targets = targets
    if not any_rank:
        _refuse_ranks(selection.targets)
        _refuse_lost_biases(selection.targets)
    selection.biases = _biases(model, config, selection, required=not any_rank)
    return selection


# What each field of the config selects.


def _modules_to_save(names: Names, config: LoRAConfig, bypassed: dict[nn.Module, str]) -> list[tuple[str, nn.Module]]:
    """The outermost modules of `modules_to_save`: the copy of a module contains the modules inside it."""
    chosen: dict[str, nn.Module] = {}
    for entry in config.modules_to_save or []:
        module = find_module("modules_to_save", entry, names)
        chosen[names[module][0]] = module
    outermost = [(name, m) for name, m in chosen.items() if not any(name.startswith(f"{outer}.") for outer in chosen)]
    for name, module in outermost:
        if module in bypassed:
            raise TargetError(f"modules_to_save: cannot train '{name}': {bypassed[module]}")
        if quantized := [path for path, inner in module.named_modules() if scheme(inner)]:
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
) -> list[Target]:
    """The modules that `target_modules` selects and `exclude_modules` leaves."""
    inside_saved = selection.inside_saved
    candidates = {m: group for m, group in names.items() if m not in inside_saved}
    if config.target_modules == ALL_LINEAR:
        targets = _all_linear(model, candidates, unfit, selection)
    else:
        targets = _by_name(model, names, candidates, config, unfit)
    excluded, everything = config.exclude_modules or [], all_names(names.values())
    for entry in [excluded] if isinstance(excluded, str) else excluded:
        if not any(matches([entry] if isinstance(excluded, list) else entry, name) for name in everything):
            raise TargetError(no_match("exclude_modules", entry, everything, is_regex=isinstance(excluded, str)))
    return [target for target in targets if not any(matches(excluded, name) for name in target.names)]


def _by_name(
    model: nn.Module, names: Names, candidates: Names, config: LoRAConfig, unfit: dict[nn.Module, str]
) -> list[Target]:
    preset = preset_pattern(model, config.target_modules)
    pattern = config.target_modules if preset is None else preset
    targets: list[Target] = []
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
        targets.append(Target(group, module, hits[0] if preset is None else str(config.target_modules)))
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        if entry not in used:
            raise TargetError(_unused_target(entry, pattern, names, candidates))
    return targets


def _unused_target(entry: str, pattern: str | list[str], names: Names, candidates: Names) -> str:
    listed = isinstance(pattern, list)
    if any(matches([entry] if listed else entry, n) for m in names if m not in candidates for n in names[m]):
        return f"target_modules: '{entry}' is in modules_to_save, which trains it in full: name it once"
    word = ALL_LINEAR if entry == "all" else entry.replace("_", "-")
    if "," not in entry and (close := get_close_matches(word, (ALL_LINEAR, *PRESETS), n=1, cutoff=0.8)):
        note = " (as a string, not in a list)" if listed else ""
        return f"target_modules: no module matches '{entry}'; did you mean '{close[0]}'?{note}"
    return no_match("target_modules", entry, all_names(names.values()), is_regex=not listed)


def _all_linear(model: nn.Module, candidates: Names, unfit: dict[nn.Module, str], selection: Selection) -> list[Target]:
    heads = output_head(model)
    targets: list[Target] = []
    for module, group in candidates.items():
        kind = kind_of(module)
        if kind is None or not kind.linear_like:
            continue
        if any(name == head or name.startswith(f"{head}.") for name in group for head in heads):
            selection.skipped[group[0]] = OUTPUT_HEAD
        elif module in unfit:
            selection.skipped[group[0]] = unfit[module]
        else:
            targets.append(Target(group, module, ALL_LINEAR))
    return targets


def _stacks(targets: list[Target], names: Names, config: LoRAConfig, selection: Selection) -> list[str]:
    """Parameters with a matrix for each expert that are not adapted: `all-linear` selects modules only."""
    taken, inside_saved = {(target.module, target.parameter) for target in targets}, selection.inside_saved
    layers, stacks = config.layers_to_transform, []
    for module, group in names.items():
        if kind_of(module) is not None or module in inside_saved or type(module).__module__.startswith("torch."):
            continue
        for key, p in module._parameters.items():
            if p is None or is_lazy(p) or p.dim() != 3 or min(p.shape) < 2 or (module, key) in taken:
                continue
            places = [full_name(name, key) for name in group]
            outside = isinstance(layers, list) and block_number(places[0]) not in layers
            if not outside and not any(matches(config.exclude_modules or [], name) for name in (*places, *group)):
                stacks.append(places[0])
    return stacks


def _target_parameters(names: Names, config: LoRAConfig, selection: Selection) -> list[Target]:
    """The parameters that `target_parameters` selects and `exclude_modules` leaves."""
    entries, inside_saved = config.target_parameters or [], selection.inside_saved
    used, known, targets = set[str](), list[str](), list[Target]()
    for module, group in names.items() if entries else ():
        for key in module._parameters if module not in inside_saved else ():
            places = [full_name(name, key) for name in group]
            known += places
            hits = matches_any(entries, places)
            used.update(hits)
            excluded = any(matches(config.exclude_modules or [], name) for name in places)
            if hits and module._parameters[key] is not None and not excluded:
                targets.append(Target(places, module, hits[0], key))
    for entry in entries:
        if entry not in used:
            raise TargetError(no_match("target_parameters", entry, known, what="parameter"))
    return targets


def _in_layers(targets: list[Target], config: LoRAConfig) -> list[Target]:
    layers = config.layers_to_transform
    if layers is None:
        return targets
    assert isinstance(layers, list)
    numbers = [block_number(target.names[0]) for target in targets]
    present = sorted({n for n in numbers if n is not None})
    if missing := sorted(set(layers) - set(present)):
        blocks = f"{present[0]} to {present[-1]}" if present else "none: no selected module has a number in its name"
        raise TargetError(f"layers_to_transform: no selected module is in block {missing[0]}; blocks there: {blocks}")
    return [target for target, n in zip(targets, numbers, strict=True) if n in layers]


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


def _settings(target: Target, config: LoRAConfig, parts: list[str], modules: dict[str, nn.Module]) -> LayerSettings:
    """One layer's settings, with `parts` where `slices` names none; a TargetError where they do not fit."""
    name, names = target.name, target.names
    r = by_pattern("rank_pattern", config.rank_pattern, names, config.r)
    alpha = by_pattern("alpha_pattern", config.alpha_pattern, names, config.scaling_alpha)
    settings = LayerSettings(
        r=r,
        alpha=alpha,
        scale=config.scale(r, alpha),
        dropout=by_pattern("dropout_pattern", config.dropout_pattern, names, config.dropout),
        init=config.init,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        parameter=target.parameter,
    )
    spec: SliceSpec = by_pattern("slices", config.slices, names, [] if target.parameter else parts)
    if not spec:
        return settings
    if not target.kind.linear_like:
        raise TargetError(f"slices: '{name}', a {target.kind.kind}, has no parts to choose from")
    rows = target.kind.layout(target.module, settings).B[0]
    parent = modules.get(name.rpartition(".")[0])
    return replace(settings, slices=resolve_slices(name, target.module, parent, rows, spec))


def _without_narrow(targets: list[Target], config: LoRAConfig, selection: Selection) -> list[Target]:
    """Leave out layers of `all-linear` for which r is too large; those that `rank_pattern` names are refused later."""
    wide = []
    for target in targets:
        named = target.why != ALL_LINEAR or has_match(config.rank_pattern, target.names)
        if named or target.settings.r <= target.largest_rank:
            wide.append(target)
        else:
            selection.skipped[target.name] = (
                f"r={target.settings.r} is larger than the smaller side of its weight, {target.largest_rank}"
            )
    return wide


# Refusals of layers that cannot take an option.


def _refuse_unfit(target: Target) -> None:
    if reason := _option_refusal(target):
        raise TargetError(reason)
    if any(p is not None and is_lazy(p) for p in target.module._parameters.values()):
        reason = "it is lazy and has no shape yet: run the model on a batch first"
    else:
        reason = target.kind.refusal(target.module, target.settings)
    if reason:
        raise TargetError(f"cannot adapt '{target.name}': {reason}")


def _option_refusal(target: Target) -> str | None:
    """Why the layer cannot take DoRA, `lora_bias` or the init of its settings; None where it can."""
    name, module, kind, settings = target.name, target.module, target.kind, target.settings
    init, what = settings.init, "a bare parameter" if target.parameter else f"a {type(module).__name__}"
    needs_w0 = inits.is_from_weight(init) or init in inits.DATA_INITS
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
    layout = kind.layout(module, settings)
    reason = inits.refusal(init, settings.r, (layout.B[0], layout.A[1]))
    return f"{reason} (module '{name}')" if reason else None


def _refuse_ranks(targets: list[Target]) -> None:
    """Raise one TargetError for all layers with r above the smaller side of the weight, with settings to copy."""
    largest = {target.name: target.largest_rank for target in targets}
    narrow = [t for t in targets if t.settings.r > largest[t.name]]
    if not narrow:
        return
    ends = _shortest_ends([t.name for t in narrow], largest)
    # Keys of rank_pattern are regular expressions.
    ranks = {".".join(map(re.escape, e.split("."))): min(largest[n] for n in names) for e, names in ends.items()}
    name = narrow[0].name
    raise TargetError(
        f"r={narrow[0].settings.r} is larger than the layer '{name}' allows ({largest[name]}, the smaller side of its"
        f" weight){_count_rest(len(narrow))}: lower r, or add rank_pattern={json.dumps(ranks)}, or add"
        f" exclude_modules={json.dumps(list(ends))}"
    )


def _refuse_lost_biases(targets: list[Target]) -> None:
    """Raise a TargetError where B's bias would have no bias to be merged into."""
    biasless = [t.name for t in targets if t.settings.lora_bias and t.module._parameters.get("bias") is None]
    if biasless:
        ends = _shortest_ends(biasless, [t.name for t in targets])
        raise TargetError(
            f"lora_bias: '{biasless[0]}' has no bias for a merge to add B's to{_count_rest(len(biasless))}: add"
            f" exclude_modules={json.dumps(list(ends))}, or set lora_bias=False"
        )


def _count_rest(count: int) -> str:
    return f", nor do {count - 1} more" if count > 1 else ""


def _shortest_ends(names: list[str], selected: Iterable[str]) -> dict[str, list[str]]:
    """The shortest dotted ends that select `names` and no other selected name, each with the names it selects."""
    others = set(selected) - set(names)
    ends: dict[str, list[str]] = {}
    for name in names:
        fitting = (end for end in dotted_ends(name) if not any(matches([end], other) for other in others))
        ends.setdefault(next(fitting, name), []).append(name)
    return ends


def _refuse_rows(selection: Selection, bypassed: dict[nn.Module, str]) -> None:
    """Raise a TargetError for token rows that the forward bypasses, or whose weight `modules_to_save` trains."""
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
