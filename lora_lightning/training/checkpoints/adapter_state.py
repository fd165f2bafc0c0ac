"""What a checkpoint holds, and what is refused of it before anything is loaded (law 7).

A checkpoint is one file (`file_io.py`) with what Lightning writes for a fit, less W0:

    state_dict                what trains, under `backbone.` and the plain model's own names
    lora_lightning            config: LoRAConfig as plain values; base: the fingerprint of W0; precision; products
    lora_lightning_resume     what an exact resume needs beside Lightning's own state (`resume.py`)
    epoch, global_step        counts
    loops                     Lightning's loops, as of one of two places (`loop_state.py`)
    optimizer_states, lr_schedulers, callbacks   as Lightning writes them

All of it is tensors and plain values, so that nothing in a file is run when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError, did_you_mean
from lora_lightning.lora.frozen.tensors import frozen_keys, plain_name

CHECKPOINT_KEY, PREFIX = "lora_lightning", "backbone."
"""The key of the adapter's settings in a checkpoint, and the prefix of its tensors' keys."""

FIELDS: dict[str, type | tuple[type, ...]] = {
    "state_dict": dict,
    CHECKPOINT_KEY: dict,
    f"{CHECKPOINT_KEY}.config": dict,
    f"{CHECKPOINT_KEY}.base": str,
}
"""Fields of every checkpoint."""
FIT_FIELDS: dict[str, type | tuple[type, ...]] = {
    "epoch": int,
    "global_step": int,
    "callbacks": dict,
    "loops": dict,
    "loops.fit_loop": dict,
    "loops.fit_loop.epoch_progress": dict,
    "loops.fit_loop.epoch_loop.state_dict": dict,
    "loops.fit_loop.epoch_loop.batch_progress": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
"""Further fields of a checkpoint that a fit resumes from."""
RESUME_KEY = "lora_lightning_resume"
RESUME_FIELDS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "at_step": bool,
    "validates_next": bool,
    "processes": list,
    "metrics": dict,
    "plateaus": dict,
    "settings": dict,
    "ended_early": (list, type(None)),
}
"""Fields that the callback `Resume` writes."""


def refuse_damaged_fields(checkpoint: Mapping[str, Any], *, resumes: bool) -> None:
    """Raise unless a checkpoint has the fields above, with their types.

    Args:
        resumes: whether a fit resumes from it, which needs more than its weights.

    Raises:
        AdapterError: the first field that is missing or has another type.
    """
    if CHECKPOINT_KEY not in checkpoint:
        raise AdapterError("this checkpoint was not written by lora_lightning: it has no adapter in it")
    _refuse(checkpoint, FIELDS)
    if not resumes:
        return
    if "optimizer_states" not in checkpoint:
        raise AdapterError(
            "the checkpoint has no 'optimizer_states', so that no fit can go on from it: start a new one from its"
            " weights with --model.init_adapter"
        )
    _refuse(checkpoint, FIT_FIELDS)
    states = checkpoint["optimizer_states"]
    if not states or not all(isinstance(state, dict) and state.get("param_groups") for state in states):
        raise AdapterError(_damage_line("optimizer_states", "the state of an optimizer", states))
    if RESUME_KEY in checkpoint:
        _refuse(checkpoint, {f"{RESUME_KEY}.{name}": kind for name, kind in RESUME_FIELDS.items()})


def _refuse(checkpoint: Mapping[str, Any], fields: Mapping[str, type | tuple[type, ...]]) -> None:
    for path, kind in fields.items():
        value = _value(checkpoint, path)
        if value is _MISSING:
            raise AdapterError(_damage_line(path))
        if not isinstance(value, kind):
            wanted = kind if isinstance(kind, type) else kind[0]
            raise AdapterError(_damage_line(path, f"a {wanted.__name__}", value))


_MISSING = object()


def _value(checkpoint: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; Lightning's keys contain dots too."""
    if path in checkpoint:
        return checkpoint[path]
    first, _, rest = path.partition(".")
    inner = checkpoint.get(first, _MISSING)
    return _value(inner, rest) if rest and isinstance(inner, Mapping) else _MISSING


def _damage_line(path: str, wanted: str | None = None, got: Any = None) -> str:
    what = f"has no '{path}'" if wanted is None else f"has {got!r:.40} as '{path}', where {wanted} is expected"
    return f"the checkpoint is damaged: it {what}; take an older one, or its NAME.ckpt.previous"


def adapter_only(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's state without W0, under the plain model's names; shards stay shards."""
    frozen = frozen_keys_of(module)
    named = {plain_name(module, key): value for key, value in state.items()}
    return {key: value for key, value in named.items() if key not in frozen}


def frozen_keys_of(module: nn.Module) -> set[str]:
    """The keys of W0 in a module whose `backbone` is adapted."""
    return {PREFIX + key for key in frozen_keys(module.get_submodule(PREFIX.removesuffix(".")))}


def refuse_other_config(checkpoint: Mapping[str, Any], config: LoRAConfig) -> None:
    """Raise where the checkpoint's adapter has another config; only dropout may differ.

    Raises:
        AdapterError: the first field that differs, with both values.
    """
    trained, here = checkpoint[CHECKPOINT_KEY]["config"], config.to_dict()
    for name in dict.fromkeys([*here, *trained]):
        if trained.get(name) != here.get(name) and name not in {"dropout", "dropout_pattern"}:
            raise AdapterError(
                f"the checkpoint was trained with lora.{name}={trained.get(name)!r}, this run says"
                f" {here.get(name)!r}: use the run's own config.yaml, or start a new fit"
            )


def refuse_misfits(module: nn.Module, expected: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint's tensors fit the adapter by keys and shapes.

    Args:
        expected: the module's state dict.
        state: the checkpoint's.

    Raises:
        AdapterError: a list of keys that are missing, left over or wrongly shaped.
    """
    expected = {plain_name(module, key): value for key, value in expected.items()}
    state = {plain_name(module, key): value for key, value in state.items()}
    frozen = frozen_keys_of(module)
    problems = [f"missing '{k}'" for k in expected if k not in state and k not in frozen]
    problems += [f"left over '{k}'{did_you_mean(k, expected)}" for k in state if k not in expected]
    problems += [
        f"'{k}' has shape {tuple(state[k].shape)}, expected {tuple(expected[k].shape)}"
        for k in expected
        if k in state and isinstance(expected[k], Tensor) and state[k].shape != expected[k].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise AdapterError(f"the checkpoint does not fit this model: {', '.join(problems[:4])}{more}")
