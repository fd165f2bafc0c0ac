"""Write an adapter as a directory that PEFT opens on the plain backbone, and warn of what PEFT reads differently."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_lightning.lora.errors import AdapterError, did_you_mean, first_few, warn
from lora_lightning.lora.formats.atomic_dir import write_together
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS
from lora_lightning.lora.formats.peft.layout import LayerLayout, fold_for_vllm, layer_layouts, to_peft, vllm_targets
from lora_lightning.lora.formats.peft.load import exact_patterns, refuse_meta
from lora_lightning.lora.formats.provenance import write_record
from lora_lightning.lora.formats.tensor_files import file_content, file_size
from lora_lightning.lora.frozen.tensors import get_module, named_modules
from lora_lightning.lora.inject import modules_of_kind
from lora_lightning.lora.layers import LoRAConv1D, LoRAParameter, ParameterHost, SavedCopy, TokenRows, TrainedBias
from lora_lightning.lora.layers.attention import OutProj
from lora_lightning.lora.layers.conv import is_conv_unlike_peft
from lora_lightning.lora.targets.bypass import bypassed_modules
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.lora.targets.patterns import matches

TASKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")),
    "QUESTION_ANS": ("qa_outputs",),
    **dict.fromkeys(("SEQ_2_SEQ_LM", "CAUSAL_LM", "FEATURE_EXTRACTION"), ()),
}
"""By PEFT's name of a task, the ends of names that PEFT adds to `modules_to_save` (0.21.2, peft_model.py)."""


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    serving: Literal["vllm"] | None = None,
) -> Path:
    """Write the adapter of `model` as a directory that PEFT opens on the plain backbone. Same adapter, same bytes.

    Ranks, alphas and module names are written in full, so that nothing depends on the order of patterns. The metadata
    of the weights hold the fingerprint of W0. An `AdapterWarning` names the modules that PEFT would read differently;
    `load_adapter` reads all of them. Other files in the directory stay.

    Args:
        base_model_name_or_path: the backbone for PEFT's `Auto` classes; by default the name of a transformers model.
        task_type: PEFT's name of the task, such as `SEQ_CLS`; it is not written, with a warning, where PEFT would then
            look for a trained head that this adapter does not have.
        serving: `vllm` writes one rank and one alpha for all modules, as vLLM needs: patterns, rslora, slices and
            subtracted inits are folded into A and B, and what vLLM cannot serve is refused.

    Raises:
        AdapterError: the model has no adapter; its values are not finite or on the meta device; vLLM cannot serve it;
            or the directory cannot be written, and is then unchanged.
    """
    refuse_meta(model, "has no values to save")
    layouts = layer_layouts(model)
    if not all(layout.peft_name for layout in layouts):
        raise AdapterError("the model itself is the adapted layer and has no name: wrap it, as in nn.Sequential(layer)")
    if serving not in (None, "vllm"):
        raise AdapterError(f"serving must be 'vllm' or left out, got {serving!r}")
    if serving == "vllm":
        layouts = fold_for_vllm(model, layouts)
    tensors = to_peft(model, layouts)
    if not tensors:
        raise AdapterError("nothing to save: this model has no adapter; call inject(model, config) first")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"'{key}' is not finite: training diverged; save an earlier checkpoint")
    if serving is None:
        for what, names in _limits(model, layouts):
            if names:
                warn(f"PEFT {what}: {first_few([repr(name) for name in names])}; load_adapter reads all of it")
    config = _config(model, layouts, base_model_name_or_path, task_type)
    if serving == "vllm":
        config["target_modules"] = vllm_targets(model, layouts)
    record = write_record(model, layouts, tensors, config)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_together(Path(directory), {WEIGHTS: file_content(tensors, record), CONFIG: text.encode()})
    return Path(directory)


def adapter_file_bytes(
    model: nn.Module, *, base_model_name_or_path: str | None = None, task_type: str | None = None
) -> int:
    """The size of the `adapter_model.safetensors` that `save_adapter` writes of this model, on any device."""
    layouts = layer_layouts(model)
    tensors = to_peft(model, layouts)
    config = _config(model, layouts, base_model_name_or_path, task_type)
    return file_size(tensors, write_record(model, layouts, tensors, config, digests=False))


def _config(
    model: nn.Module, layouts: list[LayerLayout], base_model_name_or_path: str | None, task_type: str | None
) -> dict[str, Any]:
    settings = [layout.layer.lora_settings for layout in layouts]
    biased = {module for _, module in modules_of_kind(model, TrainedBias)}
    biases = "lora_only" if biased <= {layout.layer.lora_owner for layout in layouts} else "all"
    parameters = [layout.peft_name for layout in layouts if isinstance(layout.layer, LoRAParameter)]
    ranks = {layout.peft_name: layout.rank for layout in layouts}
    modules = [name for name in ranks if name not in parameters]
    others = {name for name, _ in named_modules(model, remove_duplicate=False)} - {*modules}
    is_ambiguous = any(matches(modules, other) for other in others)
    config_name = getattr(getattr(get_module(model, ""), "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model_name_or_path or config_name or None,
        "task_type": _task(model, task_type),
        **ranks_and_alphas(ranks, {layout.peft_name: layout.alpha for layout in layouts}),
        "lora_dropout": _common_dropout(layouts),
        # Where a name is also the dotted end of another module's, one regular expression.
        "target_modules": "|".join(map(re.escape, modules)) if is_ambiguous else sorted(modules),
        "target_parameters": parameters or None,
        "trainable_token_indices": {n: m.lora_token_ids.tolist() for n, m in modules_of_kind(model, TokenRows)} or None,
        "modules_to_save": [name for name, _ in modules_of_kind(model, SavedCopy)] or None,
        "use_rslora": any(layout.rslora for layout in layouts),
        "init_lora_weights": True,
        "bias": biases if biased else "none",
        # PEFT refuses it with bare parameters, and then sets it for Conv1D by itself.
        "fan_in_fan_out": any(isinstance(layout.layer, LoRAConv1D) for layout in layouts) and not parameters,
        "use_dora": any(s.use_dora for s in settings),
        "lora_bias": any(s.lora_bias for s in settings),
        "inference_mode": True,
    }


def ranks_and_alphas(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Rank and alpha of the first module as the config's, and a pattern for each module with others."""
    r, rank_pattern = exact_patterns(ranks, 8)
    numbers = {name: int(alpha) if float(alpha).is_integer() else alpha for name, alpha in alphas.items()}
    alpha, alpha_pattern = exact_patterns(numbers, 16)
    return {"r": r, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _common_dropout(layouts: list[LayerLayout]) -> float:
    """The most common dropout, for PEFT's config, which holds one; the record holds those that differ."""
    counts = Counter(layout.layer.lora_settings.dropout for layout in layouts)
    return max(counts, key=lambda dropout: (counts[dropout], dropout), default=0.0)


def _task(model: nn.Module, task_type: str | None) -> str | None:
    """The task for the file; None, with a warning, where PEFT would look for a head that this adapter does not have."""
    if task_type is None:
        return None
    if task_type not in TASKS:
        raise AdapterError(
            f"task_type must be one of {', '.join(TASKS)}, got '{task_type}'{did_you_mean(task_type, TASKS)}"
        )
    brought = {inner for _, saved in modules_of_kind(model, SavedCopy) for inner in saved.modules()}
    ends = TASKS[task_type]
    missed = [n for n, m in named_modules(model) if ends and n.endswith(ends) and m not in brought]
    if not missed:
        return task_type
    warn(
        f"PEFT takes {first_few([repr(name) for name in missed])} for trained in full wherever task_type is"
        f" {task_type}, and this adapter brings no values for that: task_type is left out of its config, so that"
        f" PeftModel.from_pretrained opens it; to keep it, train the head: modules_to_save"
    )
    return None


def _limits(model: nn.Module, layouts: list[LayerLayout]) -> Iterator[tuple[str, list[str]]]:
    """PEFT's limits, where it computes something else without an error, each with the names of the modules.

    They are those of PEFT 0.21.2 and transformers 5.24; tests fail when one of them is gone.
    """
    saved = [name for name, _ in modules_of_kind(model, SavedCopy)]
    rest = [n for n, _ in named_modules(model) if not any(n == s or n.startswith(f"{s}.") for s in saved)]
    caught = [name for name in rest if name.endswith(tuple(saved))]
    yield "matches modules_to_save by the ends of names, within a word too, and misses tensors for", caught
    places = Counter(module for _, module in named_modules(model, remove_duplicate=False))
    twice = [one.name for one in layouts if places[one.layer.lora_owner] > 1]
    yield "adapts one place of a module that stands in several", twice
    dropout = _common_dropout(layouts)
    others = [one.name for one in layouts if one.layer.lora_settings.dropout != dropout]
    yield f"knows one dropout, {dropout:g}, and would train on with it in", others
    in_attention = [one.name for one in layouts if one.name != one.peft_name]
    yield "counts the update of an attention's out_proj twice (its issue 3774)", in_attention
    owners = {one.name: one.layer.lora_owner for one in layouts}
    convs = [name for name, module in owners.items() if is_conv_unlike_peft(module)]
    yield "pads a convolution's update with zeros and does not dilate it, whatever its padding_mode and dilation", convs
    parameters = {one.name: one.layer.lora_owner for one in layouts if isinstance(one.layer, LoRAParameter)}
    read = {*bypassed_modules({module: [name] for name, module in named_modules(model)})}
    uncalled = [name for name, owner in parameters.items() if owner in read or isinstance(owner, OutProj)]
    yield "drops the update of a parameter whose module is read and not called", uncalled
    # PEFT looks for them under that module's wrapper.
    hosts = tuple(f"{name}." for name, _ in modules_of_kind(model, ParameterHost) if name)
    layers = [one.path.rpartition(".")[0] if one.name in parameters else one.path for one in layouts]
    trained = [name for kind in (TrainedBias, TokenRows, SavedCopy) for name, _ in modules_of_kind(model, kind)]
    inside = list(dict.fromkeys(name for name in layers + trained if name.startswith(hosts)))
    yield "looks elsewhere for what is trained inside a module with adapted parameters", inside
    stacks = {n for _, m in named_modules(model) for n, p in m._parameters.items() if p is not None and p.dim() == 3}
    if "down_proj" in stacks and is_a(get_module(model, ""), HF_MODEL):  # dense and shared layers have the same names
        ends = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
        fused = [n for n, m in owners.items() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in ends]
        yield "may take these for fused experts as it reads the config, and drop their update", fused
