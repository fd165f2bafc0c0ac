"""PEFT's `adapter_config.json`: reading it with every field checked, and the rules by which PEFT resolves its names."""

from __future__ import annotations

import json
import re
import reprlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_lightning.lora.errors import AdapterError, AdapterWarning, did_you_mean, some
from lora_lightning.lora.targets.patterns import regex_refusal

WEIGHTS, PICKLED, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"

# Fields of PEFT's config that change the arithmetic and have no counterpart here, by what they do: anything but an
# empty value is refused.
WITHOUT_COUNTERPART = {
    "layer_replication": "builds a deeper model of repeated blocks: build it so and load the adapter in PEFT",
    "megatron_config": "is for Megatron's parallel layers",
    "alora_invocation_tokens": "switches the adapter on after certain tokens only",
    "use_qalora": "pools the input of A",
    "use_bdlora": "cuts A or B into diagonal blocks",
    "arrow_config": "routes tokens among several adapters",
    "kasa_config": "adds singular values of its own to the update",
    "monteclora_config": "draws the update at random",
    "velora_config": "compresses what the backward pass keeps",
}

OTHER_METHODS = {
    "ADALORA": "B diag(E) A with ranks that training moves",
    "BOFT": "W0 times an orthogonal matrix",
    "FOURIERFT": "an update in the Fourier domain",
    "IA3": "activations rescaled, without A and B",
    "LOHA": "a product of two low-rank updates",
    "LOKR": "a Kronecker product",
    "LN_TUNING": "norms trained in full",
    "MULTITASK_PROMPT_TUNING": "trained prompts",
    "OFT": "W0 times an orthogonal matrix",
    "P_TUNING": "trained prompts",
    "PREFIX_TUNING": "trained prefixes",
    "PROMPT_TUNING": "trained prompts",
    "TRAINABLE_TOKENS": "rows of an embedding alone; here trainable_token_indices of a LoRA adapter",
    "VERA": "fixed A and B with trained scales",
    "XLORA": "a mixture of several adapters",
}

# Fields that say nothing about the arithmetic of a trained adapter, or are read elsewhere.
HARMLESS = {
    *{"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"},
    *{"inference_mode", "megatron_core", "loftq_config", "eva_config", "corda_config"},
    *{"lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"},
}


def read_config(path: Path) -> dict[str, Any]:
    """A PEFT config of type LORA.

    Raises:
        AdapterError: it is missing, no JSON, of another method, or has a field that means nothing here.
    """
    folder = path.parent
    if not folder.exists():
        near = did_you_mean(folder.name, [one.name for one in folder.parent.glob("*") if one.is_dir()])
        raise AdapterError(f"no folder '{folder}'{near}")
    if not path.is_file():
        raise AdapterError(f"no file {path}: an adapter directory holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON ({str(error)[:200]})") from error
    if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        what = f" ({OTHER_METHODS[str(got).upper()]})" if str(got).upper() in OTHER_METHODS else ""
        raise AdapterError(f"{path} must describe a LoRA adapter (peft_type LORA), got {shown(got)}{what}")
    for name, what in WITHOUT_COUNTERPART.items():
        if config.get(name) not in (None, False):
            raise AdapterError(
                f"the adapter's setting {name}={shown(config[name])} {what}, which has no counterpart here"
            )
    unknown = {name: value for name, value in config.items() if value and name not in {*HARMLESS, *CHECKS}}
    if unknown:
        said = some([f"{name[:40]}={shown(value)}" for name, value in unknown.items()], 10)
        warnings.warn(f"{path} has settings that are unknown here and not used: {said}", AdapterWarning, stacklevel=3)
    for name, (check, expected) in CHECKS.items():
        left_out = config.get(name) is None and (name not in config or name not in NUMBERS)
        if not left_out and not check(config[name]):
            why = _why_no_regex(config[name]) if name in WITH_REGEXES else ""
            raise AdapterError(f"{path}: {name} must be {expected}, got {shown(config[name])}{why}")
    return config


def _why_no_regex(value: Any) -> str:
    """The reason for which one of a field's regular expressions is refused."""
    patterns = [value] if isinstance(value, str) else list(value) if isinstance(value, list | dict) else []
    refused = ((pattern, regex_refusal(pattern)) for pattern in patterns if isinstance(pattern, str))
    return next((f": {shown(pattern)} {reason}" for pattern, reason in refused if reason), "")


def shown(value: Any) -> str:
    """A value of a file for one line of an error, cut where it is long or deep."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlist = _SHORT.maxdict = 10


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(n for n in names if names.count(n) > 1)[:40]}' stands there twice")
    return found


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)


def _is_regex(value: Any) -> bool:
    return isinstance(value, str) and regex_refusal(value) is None


def _is_selection(value: Any) -> bool:
    return _is_names(value) or _is_regex(value)


def _is_patterns(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_regex(k) and _is_number(v) for k, v in value.items())


def _is_blocks(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, list) and all(_is_int(entry) for entry in value))


def _is_blocks_pattern(value: Any) -> bool:
    """Without groups of its own, for PEFT takes the first group as the block's number."""
    patterns = value if isinstance(value, list) else [value]
    return all(_is_regex(pattern) and re.compile(pattern).groups == 0 for pattern in patterns)


def _is_tokens(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(numbers, list) and all(_is_int(n) for n in numbers) for numbers in lists)


WITH_REGEXES = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
NUMBERS = ("r", "lora_alpha")
"""Fields that PEFT never leaves at null."""

# What is read of PEFT's config, each by a check and by what it expects.
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_int, "a whole number"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_number, "a number"),
    "use_rslora": (_is_bool, "true or false"),
    "use_dora": (_is_bool, "true or false"),
    "lora_bias": (_is_bool, "true or false"),
    "fan_in_fan_out": (_is_bool, "true or false"),
    "target_parameters": (_is_names, "a list of names"),
    "trainable_token_indices": (_is_tokens, "a list of token numbers, or one for each embedding's name"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "target_modules": (_is_selection, "a list of names or a regular expression"),
    "exclude_modules": (_is_selection, "a list of names or a regular expression"),
    "modules_to_save": (_is_names, "a list of names"),
    "rank_pattern": (_is_patterns, "a map of regular expressions to numbers"),
    "alpha_pattern": (_is_patterns, "a map of regular expressions to numbers"),
    "layers_to_transform": (_is_blocks, "a block number or a list of them"),
    "layers_pattern": (_is_blocks_pattern, "regular expressions without groups"),
    "init_lora_weights": (lambda value: isinstance(value, bool | str), "true, false or a name"),
}


def peft_adapts(peft: dict[str, Any], targets: str | list[str], name: str) -> bool:
    """PEFT's `check_target_module_exists`: blocks count only for entries that are not a full name."""
    if peft_selects(peft.get("exclude_modules") or [], name) or not peft_selects(targets, name):
        return False
    blocks = peft.get("layers_to_transform")
    if isinstance(targets, str) or name in targets or blocks is None or blocks == []:
        return True
    patterns = peft.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # Without a pattern of its own, PEFT wants a name before the blocks' list.
        head = r"(?:^|.*?\.)" if peft.get("layers_pattern") else r".*?\."
        match = re.match(rf"{head}{pattern}\.(\d+)\.", name)
        if match and match[1]:
            return int(match[1]) in ([blocks] if isinstance(blocks, int) else blocks)
    return False


def peft_selects(pattern: str | list[str], name: str) -> bool:
    """A string is a regular expression on the full name, a list's entries are dotted ends of it."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return not set(pattern).isdisjoint(dotted_ends(name))


def dotted_ends(name: str) -> list[str]:
    """`a.b.c`, `b.c` and `c` of `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def holder(key: str, listed: list[str]) -> str | None:
    """The outermost module around `key` that PEFT wraps: its name ends in an entry, even within a word."""
    parts = key.split(".")
    around = [".".join(parts[:i]) for i in range(1, len(parts))]
    return next((name for name in around if any(name.endswith(entry) for entry in listed)), None)


def start_in_file(peft: dict[str, Any]) -> str:
    """The start whose B0 A0 the file's factors count on, `gaussian` where there is none.

    PEFT takes s B0 A0 out of W0 for some starts and writes A and B as they are; pissa and olora follow from W0 alone.
    """
    init = peft.get("init_lora_weights", True)
    if init in ("pissa", "olora"):
        return str(init)
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal", "mica"):
        raise AdapterError(
            f"the adapter's config has init_lora_weights '{init}', which changed the base that it belongs to in a way"
            f" that cannot be computed again: save it in PEFT with path_initial_model_for_weight_conversion first"
        )
    return "gaussian"


def token_ids(peft: dict[str, Any], name: str) -> list[int]:
    """The token numbers of an embedding's rows, in the file's order.

    Raises:
        AdapterError: the config does not say.
    """
    indices = peft.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((numbers for entry, numbers in indices.items() if peft_selects([entry], name)), None)
    if not indices:
        raise AdapterError(f"the adapter has token rows for '{name}' and its config no trainable_token_indices for it")
    return [int(number) for number in indices]
