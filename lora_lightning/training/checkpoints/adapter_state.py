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

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.frozen.tensors import frozen_keys, plain_name, refuse_misfits

CHECKPOINT_KEY, PREFIX = "lora_lightning", "backbone."
"""The key of the adapter's settings in a checkpoint, and the prefix of its tensors' keys."""

RESUME_KEY = "lora_lightning_resume"

Fields = Mapping[str, type | tuple[type, ...]]
"""Types by path; Lightning's keys contain dots."""
FIELDS: Fields = {"state_dict": dict, f"{CHECKPOINT_KEY}/config": dict, f"{CHECKPOINT_KEY}/base": str}
"""Fields of every checkpoint."""
FIT_FIELDS: Fields = {
    "epoch": int,
    "global_step": int,
    "callbacks": dict,
    "loops/fit_loop/epoch_progress": dict,
    "loops/fit_loop/epoch_loop.state_dict": dict,
    "loops/fit_loop/epoch_loop.batch_progress": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
"""Further fields of a checkpoint that a fit resumes from."""
RESUME_FIELDS: Fields = {
    **{f"{RESUME_KEY}/{name}": bool for name in ("at_step", "validates_next")},
    **{f"{RESUME_KEY}/{name}": dict for name in ("metrics", "plateaus", "settings")},
    f"{RESUME_KEY}/kind": str,
    f"{RESUME_KEY}/processes": list,
    f"{RESUME_KEY}/ended_early": (list, type(None)),
}
"""Fields that the callback `Resume` writes."""


def refuse_damaged_fields(checkpoint: Mapping[str, Any], *, resumes: bool) -> None:
    """Raise unless a checkpoint has the fields above, with their types; a fit that resumes needs more than weights."""
    if CHECKPOINT_KEY not in checkpoint:
        raise AdapterError("this checkpoint was not written by lora_lightning: it has no adapter in it")
    if resumes and "optimizer_states" not in checkpoint:
        raise AdapterError(
            "the checkpoint has no 'optimizer_states', so that no fit can go on from it: start a new one from its"
            " weights with --model.init_adapter"
        )
    wanted = {**FIELDS, **(FIT_FIELDS if resumes else {})}
    wanted |= RESUME_FIELDS if resumes and RESUME_KEY in checkpoint else {}
    problem = next(filter(None, (_damage(checkpoint, path.split("/"), kind) for path, kind in wanted.items())), None)
    states = checkpoint.get("optimizer_states", ())
    if resumes and not (states and all(isinstance(state, dict) and state.get("param_groups") for state in states)):
        problem = problem or f"{states!r:.40} as 'optimizer_states', where the state of an optimizer is expected"
    if problem:
        raise AdapterError(f"the checkpoint is damaged: it has {problem}; take an older one, or its NAME.ckpt.previous")


def _damage(value: Any, path: Sequence[str], kind: type | tuple[type, ...]) -> str | None:
    """What is wrong on the way to a field; None where nothing is."""
    for depth, step in enumerate(path, 1):
        name = ".".join(path[:depth])
        if step not in value:
            return f"no '{name}'"
        value, expected = value[step], kind if depth == len(path) else dict
        if not isinstance(value, expected):
            first = expected if isinstance(expected, type) else expected[0]
            return f"{value!r:.40} as '{name}', where a {first.__name__} is expected"
    return None


def adapter_only(module: nn.Module, state: Mapping[str, Any], beside: Collection[str] = ()) -> dict[str, Any]:
    """A module's state under the plain model's names, of W0 only the keys in `beside`; shards stay shards."""
    frozen = {PREFIX + key for key in frozen_keys(module.get_submodule(PREFIX.removesuffix(".")))}
    named = {plain_name(module, key): value for key, value in state.items()}
    return {key: value for key, value in named.items() if key in beside or key not in frozen}


def refuse_other_config(checkpoint: Mapping[str, Any], config: LoRAConfig) -> None:
    """Raise where the checkpoint's adapter has another config; only dropout may differ."""
    trained, here = checkpoint[CHECKPOINT_KEY]["config"], config.to_dict()
    for name in dict.fromkeys([*here, *trained]):
        if trained.get(name) != here.get(name) and name not in {"dropout", "dropout_pattern"}:
            raise AdapterError(
                f"the checkpoint was trained with lora.{name}={trained.get(name)!r}, this run says"
                f" {here.get(name)!r}: use the run's own config.yaml, or start a new fit"
            )


def refuse_other_tensors(module: nn.Module, expected: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint's tensors `state` fit the adapter in a module's state `expected` by keys and shapes."""
    state = {plain_name(module, key): value for key, value in state.items()}
    refuse_misfits(adapter_only(module, expected, state), state, "the checkpoint does not fit this model")
