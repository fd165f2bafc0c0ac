"""Which modules a config selects, and why each one matched. Nothing is changed here."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches

from torch import nn

from lora_lightning.lora.config import ALL_LINEAR, LoRAConfig
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.frozen.tensors import get_module, named_modules
from lora_lightning.lora.layers import AdaptedLayer, LayerSettings, LoRAParameter, kind_of
from lora_lightning.lora.targets.bypass import bypassed_modules, computed_modules
from lora_lightning.lora.targets.layer_settings import Wanted, check_fit, settings_of
from lora_lightning.lora.targets.options import refuse_options
from lora_lightning.lora.targets.output_heads import output_head
from lora_lightning.lora.targets.patterns import all_used, block_number, flat, matches, no_match
from lora_lightning.lora.targets.presets import PRESETS, preset_parts, preset_pattern
from lora_lightning.lora.targets.token_rows import TokenTarget, token_targets
from lora_lightning.lora.targets.ways_out import Resolved, refuse_lost_biases, refuse_ranks


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
    skipped: dict[str, str] = field(default_factory=dict)
    """Modules that `all-linear` would have taken but for the reason given."""


def select(model: nn.Module, config: LoRAConfig, *, any_rank: bool = False) -> Selection:
    """Resolve `config` on `model`; with `any_rank`, as for an adapter that is there already, r has no upper limit, and
    `lora_bias` needs no bias to be merged into.

    Raises:
        TargetError: an entry that matches nothing (near misses named), a module of a kind that has no adapted
            form, a rank that a layer does not allow.
    """
    model = get_module(model, "")
    # A module in two places has two names; it is adapted once, under the first, and may be asked for by either.
    names = _names_by_module(model)
    selection = Selection(saved=_saved(names, config))
    found = _found(model, names, config, selection)
    found = _without_excluded(found, names, config)
    wanted = [Wanted(names[module], module, why) for module, why in found.items()]
    wanted = _in_layers(wanted + _parameters(names, config, selection), config)
    selection.tokens = token_targets(model, names, config.trainable_token_indices)
    _refuse_rows(selection, bypassed_modules(names) if selection.tokens else {})
    if not wanted and not selection.tokens:
        raise TargetError(_nothing_left(model, config, selection))
    everything = [w.names for w in wanted]
    all_used("rank_pattern", config.rank_pattern, everything)
    all_used("alpha_pattern", config.alpha_pattern, everything)
    all_used("dropout_pattern", config.dropout_pattern, everything)
    all_used("slices", config.slices, everything)
    modules = {group[0]: module for module, group in names.items()}
    parts = preset_parts(model, config.target_modules) if found else []
    resolved: Resolved = []
    for w in wanted:
        kind = LoRAParameter if w.parameter else kind_of(w.module)
        assert kind is not None
        settings = settings_of(w, kind, config, modules, parts)
        refuse_options(w.names[0], w.module, kind, settings)
        check_fit(w, kind, settings)
        resolved.append((w, kind, settings))
        selection.targets.append(Target(w.names[0], w.module, kind, settings, w.why))
    if not any_rank:
        refuse_ranks(resolved)
        refuse_lost_biases(resolved)
    return selection


def _parameters(names: dict[nn.Module, list[str]], config: LoRAConfig, selection: Selection) -> list[Wanted]:
    """The parameters that `target_parameters` selects, in the model's order."""
    if not config.target_parameters:
        return []
    inside_saved = {m for _, saved in selection.saved for m in saved.modules()}
    entries, used = config.target_parameters, set[str]()
    wanted: list[Wanted] = []
    known: list[str] = []
    for module, group in names.items():
        for own in module._parameters if module not in inside_saved else ():
            full = [f"{name}.{own}" if name else own for name in group]
            known += full
            hits = [entry for entry in entries if any(matches([entry], name) for name in full)]
            used.update(hits)
            if hits and module._parameters[own] is not None and not _excluded(full, config):
                wanted.append(Wanted(full, module, hits[0], own))
    for entry in entries:
        if entry not in used:
            raise TargetError(no_match("target_parameters", entry, known, what="parameter"))
    return wanted


def _refuse_rows(selection: Selection, bypassed: dict[nn.Module, str]) -> None:
    """Rows that the model would read past, or whose embedding or tied head `modules_to_save` trains in full."""
    inside_saved = {m: name for name, saved in selection.saved for m in saved.modules()}
    for token in selection.tokens:
        if token.module in bypassed:
            raise TargetError(f"trainable_token_indices: cannot train rows of '{token.name}': {bypassed[token.module]}")
        for module in (token.module, *token.tied):
            if module in inside_saved:
                raise TargetError(
                    f"trainable_token_indices: the weight of '{token.name}' is in '{inside_saved[module]}' of"
                    f" modules_to_save, which trains it in full: name it once"
                )


def _excluded(names: list[str], config: LoRAConfig) -> bool:
    return bool(config.exclude_modules) and any(matches(config.exclude_modules or [], name) for name in names)


def _names_by_module(model: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _saved(names: dict[nn.Module, list[str]], config: LoRAConfig) -> list[tuple[str, nn.Module]]:
    entries = config.modules_to_save or []
    chosen: list[tuple[str, nn.Module]] = []
    for entry in entries:
        exact = [m for m, group in names.items() if entry in group]
        hits = exact or [m for m, group in names.items() if any(matches([entry], n) for n in group)]
        if not hits:
            raise TargetError(no_match("modules_to_save", entry, flat(names.values())))
        if len(hits) > 1:
            several = ", ".join(f"'{names[m][0]}'" for m in hits[:4])
            raise TargetError(f"modules_to_save: '{entry}' is the end of several names: write in full {several}")
        if (names[hits[0]][0], hits[0]) not in chosen:
            chosen.append((names[hits[0]][0], hits[0]))
    # A module inside a saved one is in its copy already.
    outermost = [(name, m) for name, m in chosen if not any(name.startswith(f"{outer}.") for outer, _ in chosen)]
    bypassed = bypassed_modules(names) if outermost else {}
    for name, module in outermost:
        if module in bypassed:
            raise TargetError(f"modules_to_save: cannot train '{name}': {bypassed[module]}")
        if type(module).forward is nn.Module.forward:
            inside = ", ".join([f"{name}.{child}" for child, _ in module.named_children()][:4])
            raise TargetError(
                f"modules_to_save: '{name}' is a {type(module).__name__}, which is never called itself, so a copy of"
                f" it would be ignored; name what it holds: {inside}"
            )
    return outermost


def _found(
    model: nn.Module, names: dict[nn.Module, list[str]], config: LoRAConfig, selection: Selection
) -> dict[nn.Module, str]:
    """Each selected module with the entry that selected it, in the model's order."""
    inside_saved = {m for _, saved in selection.saved for m in saved.modules()}
    candidates = {m: group for m, group in names.items() if m not in inside_saved}
    bypassed = computed_modules(names) | bypassed_modules(names)
    pattern = config.target_modules
    if pattern == ALL_LINEAR:
        return _all_linear(model, candidates, bypassed, selection)
    preset = preset_pattern(model, pattern)
    if preset is not None:
        pattern = preset
    found: dict[nn.Module, str] = {}
    used: set[str] = set()
    for module, group in candidates.items():
        why = next((hit for name in group if name and (hit := matches(pattern, name))), None)
        if why is None:
            continue
        used.add(why)
        if module in bypassed:
            raise TargetError(f"cannot adapt '{group[0]}': {bypassed[module]}")
        if kind_of(module) is None:
            raise TargetError(_unknown_kind(group[0], module, why, candidates))
        found[module] = why if preset is None else str(config.target_modules)
    everything = flat(names.values())
    saved_names = {n for m in inside_saved for n in names.get(m, [])}
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        if entry in used or (
            isinstance(pattern, list) and any(matches([entry], n) for n in flat([names[m] for m in found]))
        ):
            continue
        if any(matches([entry] if isinstance(pattern, list) else entry, n) for n in saved_names):
            raise TargetError(f"target_modules: '{entry}' is in modules_to_save, which trains it in full: name it once")
        word = ALL_LINEAR if entry == "all" else entry.replace("_", "-")
        if "," not in entry and (close := get_close_matches(word, (ALL_LINEAR, *PRESETS), n=1, cutoff=0.8)):
            listed = " (as a string, not in a list)" if isinstance(pattern, list) else ""
            raise TargetError(f"target_modules: no module matches '{entry}'; did you mean '{close[0]}'?{listed}")
        raise TargetError(no_match("target_modules", entry, everything, is_regex=isinstance(pattern, str)))
    return found


def _all_linear(
    model: nn.Module, candidates: dict[nn.Module, list[str]], bypassed: dict[nn.Module, str], selection: Selection
) -> dict[nn.Module, str]:
    heads = output_head(model)
    found: dict[nn.Module, str] = {}
    for module, group in candidates.items():
        kind = kind_of(module)
        if kind is None or not kind.linear_like:
            continue
        if any(name == head or name.startswith(f"{head}.") for name in group for head in heads):
            selection.skipped[group[0]] = "the output head"
        elif module in bypassed:
            selection.skipped[group[0]] = bypassed[module]
        else:
            found[module] = ALL_LINEAR
    return found


def _without_excluded(
    found: dict[nn.Module, str], names: dict[nn.Module, list[str]], config: LoRAConfig
) -> dict[nn.Module, str]:
    pattern = config.exclude_modules
    if not pattern:
        return found
    everything = flat(names.values())
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        if not any(matches([entry] if isinstance(pattern, list) else entry, name) for name in everything):
            raise TargetError(no_match("exclude_modules", entry, everything, is_regex=isinstance(pattern, str)))
    return {m: why for m, why in found.items() if not any(matches(pattern, name) for name in names[m])}


def _in_layers(wanted: list[Wanted], config: LoRAConfig) -> list[Wanted]:
    layers = config.layers_to_transform
    if layers is None:
        return wanted
    assert isinstance(layers, list)
    index = [block_number(w.names[0]) for w in wanted]
    missing = sorted(set(layers) - {n for n in index if n is not None})
    if missing:
        there = sorted({n for n in index if n is not None})
        blocks = f"{there[0]} to {there[-1]}" if there else "none: no selected module has a number in its name"
        raise TargetError(f"layers_to_transform: no selected module is in block {missing[0]}; blocks there: {blocks}")
    return [w for w, n in zip(wanted, index, strict=True) if n in layers]


def _unknown_kind(name: str, module: nn.Module, why: str, candidates: dict[nn.Module, list[str]]) -> str:
    inner = [g[0].removeprefix(f"{name}.") for m, g in candidates.items() if g[0].startswith(f"{name}.") and kind_of(m)]
    inside = f"; adaptable inside it: {', '.join(inner[:4])}" if inner else ""
    return f"target_modules: '{why}' selects '{name}', a {type(module).__name__}, which has no LoRA form{inside}"


def _nothing_left(model: nn.Module, config: LoRAConfig, selection: Selection) -> str:
    if config.exclude_modules:
        return f"target_modules {config.target_modules!r} less exclude_modules {config.exclude_modules!r} is empty"
    kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
    skipped = "".join(f"; left out: '{name}' ({reason})" for name, reason in list(selection.skipped.items())[:3])
    named = [name for name, module in named_modules(model) if kind_of(module) and name not in selection.skipped]
    by_name = f"; adaptable by name: {', '.join(named[:4])}" if named else ""
    return f"target_modules {config.target_modules!r} selects nothing among {', '.join(kinds)}{skipped}{by_name}"
