"""Read PEFT's `adapter_config.json` with every field checked, and resolve its names by PEFT's rules."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_lightning.lora.errors import AdapterError, did_you_mean, first_few, warn
from lora_lightning.lora.targets.patterns import matches, regex_refusal

WEIGHTS, PICKLED, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlist = _SHORT.maxdict = 10


def shorten(value: Any) -> str:
    """A value of a file for an error message, shortened where it is long or deep."""
    return _SHORT.repr(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_regex(value: Any) -> bool:
    return isinstance(value, str) and regex_refusal(value) is None


def _is_list(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _is_names(value: Any) -> bool:
    return _is_list(value, lambda entry: isinstance(entry, str) and entry != "")


Check = tuple[Callable[[Any], bool], str]
NUMBER: Check = (_is_number, "a number")
FLAG: Check = (lambda v: isinstance(v, bool), "true or false")
NAMES: Check = (_is_names, "a list of names")
SELECTION: Check = (lambda v: _is_names(v) or _is_regex(v), "a list of names or a regular expression")
PATTERNS: Check = (
    lambda v: isinstance(v, dict) and all(map(_is_regex, v)) and all(map(_is_number, v.values())),
    "a map of regular expressions to numbers",
)

FIELDS: dict[str, Check | str | None] = {
    "r": (_is_int, "a whole number"),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), NUMBER),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), FLAG),
    **dict.fromkeys(("target_parameters", "modules_to_save"), NAMES),
    **dict.fromkeys(("target_modules", "exclude_modules"), SELECTION),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), PATTERNS),
    "trainable_token_indices": (
        lambda v: all(_is_list(numbers, _is_int) for numbers in (v.values() if isinstance(v, dict) else [v])),
        "a list of token numbers, or one for each embedding's name",
    ),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "layers_to_transform": (lambda v: _is_int(v) or _is_list(v, _is_int), "a block number or a list of them"),
    "layers_pattern": (  # PEFT takes the first group as the block's number
        lambda v: all(_is_regex(p) and re.compile(p).groups == 0 for p in (v if isinstance(v, list) else [v])),
        "regular expressions without groups",
    ),
    "init_lora_weights": (lambda v: isinstance(v, bool | str), "true, false or a name"),
    "layer_replication": "builds a deeper model of repeated blocks: build it so and load the adapter in PEFT",
    "megatron_config": "is for Megatron's parallel layers",
    "alora_invocation_tokens": "switches the adapter on after certain tokens only",
    "use_qalora": "pools the input of A",
    "use_bdlora": "cuts A or B into diagonal blocks",
    "arrow_config": "routes tokens among several adapters",
    "kasa_config": "adds singular values of its own to the update",
    "monteclora_config": "draws the update at random",
    "velora_config": "compresses what the backward pass keeps",
    **dict.fromkeys(("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision")),
    **dict.fromkeys(("inference_mode", "megatron_core", "loftq_config", "eva_config", "corda_config")),
    **dict.fromkeys(("lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying")),
}
"""PEFT's fields: of one that is read, its check and the expected value in words; of one that changes the arithmetic and
has no counterpart here, what it does; None for one that does not change the arithmetic of a trained adapter."""


def read_config(path: Path) -> dict[str, Any]:
    """A PEFT config of type LORA; an AdapterError where there is none, or a field has an invalid value."""
    folder = path.parent
    if not folder.exists():
        near = did_you_mean(folder.name, [sibling.name for sibling in folder.parent.glob("*") if sibling.is_dir()])
        raise AdapterError(f"no folder '{folder}'{near}")
    if not path.is_file():
        raise AdapterError(f"no file {path}: an adapter directory holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_repeated_keys)
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON ({str(error)[:200]})") from error
    if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{path} must describe a LoRA adapter (peft_type LORA), got {shorten(got)}")
    unknown = []
    for name, value in config.items():
        match FIELDS.get(name):
            case str(what) if value not in (None, False):
                raise AdapterError(
                    f"the adapter's setting {name}={shorten(value)} {what}, which has no counterpart here"
                )
            case (check, expected) if value is not None or name in ("r", "lora_alpha"):  # never null in PEFT
                if not check(value):
                    why = _regex_refusal(value) if "regular expression" in expected else ""
                    raise AdapterError(f"{path}: {name} must be {expected}, got {shorten(value)}{why}")
            case None if value and name not in FIELDS:
                unknown.append(f"{name[:40]}={shorten(value)}")
    if unknown:
        warn(f"{path} has settings that are unknown here and not used: {first_few(unknown, 10)}")
    return config


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(n for n in names if names.count(n) > 1)[:40]}' stands there twice")
    return fields


def _regex_refusal(value: Any) -> str:
    """Why one of a field's regular expressions is refused, as the end of an error message."""
    for pattern in [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []:
        if isinstance(pattern, str) and (reason := regex_refusal(pattern)):
            return f": {shorten(pattern)} {reason}"
    return ""


def peft_adapts(peft: Mapping[str, Any], targets: str | list[str], name: str) -> bool:
    """Whether PEFT adapts the module, as in its `check_target_module_exists`: full names count in every block."""
    if matches(peft.get("exclude_modules") or [], name) or not matches(targets, name):
        return False
    blocks = peft.get("layers_to_transform")
    if isinstance(targets, str) or name in targets or blocks is None or blocks == []:
        return True
    patterns = peft.get("layers_pattern") or r"[^.]*"
    # Without `layers_pattern`, PEFT requires a name before the list of blocks.
    head = r"(?:^|.*?\.)" if peft.get("layers_pattern") else r".*?\."
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"{head}{pattern}\.(\d+)\.", name):
            return int(match[1]) in ([blocks] if isinstance(blocks, int) else blocks)
    return False


def matching_entries(patterns: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """The entries whose regular expression matches the name or a dotted end of it, by PEFT's rule."""
    return {key: value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)}


def possible_ranks(peft: Mapping[str, Any], peft_name: str) -> list[int]:
    """The ranks that the config gives a module; several where several patterns match it."""
    return sorted({*matching_entries(peft.get("rank_pattern"), peft_name).values()} or {peft.get("r", 8)})


def find_alphas(
    peft: Mapping[str, Any], names: Mapping[str, str], ranks: Mapping[str, int], chosen: Mapping[str, float]
) -> dict[str, float]:
    """The alpha of every adapted module, by name, where its rank is one that the config gives it.

    In training PEFT takes the first entry that matches a module, in the user's order; its file holds them in
    alphabetical order, of which PEFT takes the first on loading. So entries with different alphas for one module leave
    its alpha in doubt, which is an error unless `chosen` has it.

    Args:
        names, ranks: PEFT's name of each module, and its tensors' rank.
    """
    alphas, doubtful = dict[str, float](), dict[str, dict[str, Any]]()
    for name, rank in ranks.items():
        allowed = possible_ranks(peft, names[name])
        if rank and rank not in allowed:  # a rank of 0 is refused with the config
            raise AdapterError(
                f"'{name}': lora_A has a shape of rank {rank}, and {CONFIG} says {' or '.join(map(str, allowed))}: the"
                f" two files are not of one adapter, or one was edited"
            )
        entries = matching_entries(peft.get("alpha_pattern"), names[name])
        alphas[name] = float(next(iter(entries.values()), peft.get("lora_alpha", 8)))
        if len({*map(float, entries.values())}) > 1:
            doubtful[name] = entries
    for name in chosen:
        if name not in names:
            raise AdapterError(f"alphas: the adapter has no module '{name}'{did_you_mean(name, names)}")
        if name not in doubtful:
            raise AdapterError(f"alphas: {CONFIG} leaves no doubt about '{name}': leave it out")
    if unanswered := [name for name in doubtful if name not in chosen]:
        first = unanswered[0]
        both = " and ".join(f"'{key}' ({value:g})" for key, value in doubtful[first].items())
        by_rank = [k for k, r in matching_entries(peft.get("rank_pattern"), names[first]).items() if r == ranks[first]]
        likely = [key for key in by_rank if key in doubtful[first]]
        evidence = f"; in rank_pattern '{likely[0]}' won, by the tensors' rank" if len(likely) == 1 else ""
        raise AdapterError(
            f"alpha_pattern: {both} match '{first}'{evidence}; PEFT trained with the one that was first, and its"
            f" file has lost the order: pass alphas={{'{first}': ...}}; in doubt: {first_few(unanswered, 10)}"
        )
    return alphas | {name: float(alpha) for name, alpha in chosen.items()}


def subtracted_init(peft: Mapping[str, Any]) -> str:
    """The init whose s B0 A0 PEFT subtracted from W0, `gaussian` where there is none.

    PEFT then writes A and B only; pissa and olora can be computed from W0 again, any other is an AdapterError.
    """
    init = peft.get("init_lora_weights", True)
    if init in ("pissa", "olora"):
        return str(init)
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal", "mica"):
        raise AdapterError(
            f"the adapter's config has init_lora_weights '{init}', which changed the base in a way that cannot be"
            " computed again: save it in PEFT with path_initial_model_for_weight_conversion first"
        )
    return "gaussian"


def token_ids(peft: Mapping[str, Any], name: str) -> list[int]:
    """The token numbers of an embedding's rows in the file's order; an AdapterError where the config has none."""
    indices = peft.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((numbers for entry, numbers in indices.items() if matches([entry], name)), None)
    if not indices:
        raise AdapterError(f"the adapter has token rows for '{name}' and its config no trainable_token_indices for it")
    return [int(number) for number in indices]
