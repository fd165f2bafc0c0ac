"""The merged model as files that open without this package, and what those files hold, read back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.backbones.tokenizers import quiet
from lora_lightning.lora.errors import MergeError, first_few
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.lora.formats.tensor_files import DTYPES, read_bytes, read_header, write_tensors
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a

WEIGHTS, LABELS = "model.safetensors", "label_names.json"


def is_transformers(model: nn.Module) -> bool:
    """Whether the model saves and loads itself in transformers' format."""
    return is_a(model, HF_MODEL)


def write_merged(
    plain: nn.Module,
    folder: Path,
    *,
    processing: list[Any],
    label_names: list[str] | None,
    problem_type: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """A transformers model in its own way; any other as one file of tensors under its own keys.

    Args:
        processing: the tokenizer, or what else prepares the model's inputs, to be saved beside it.
        label_names: what the numbers of the classes mean: into a transformers config, else into a file beside.
        problem_type: what transformers calls the task of a classifier, into its config.
        max_shard_size: of a transformers model's files; transformers' own by default.
    """
    folder.mkdir(parents=True)
    if is_transformers(plain):
        config: Any = plain.config
        _name_labels(config, label_names)
        if problem_type is not None:
            config.problem_type = problem_type
        _forget_quantization(plain)
        shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        try:
            with quiet():
                plain.save_pretrained(folder, **shards)  # type: ignore[operator]
        except ValueError as error:  # such as settings of generation that contradict each other
            raise MergeError(f"transformers does not save the merged model: {error}") from error
    else:
        write_tensors(folder / WEIGHTS, state_without_ties(plain), {"format": "pt"})
        write_labels(label_names, folder)
    for part in processing:
        part.save_pretrained(folder)


def write_labels(label_names: list[str] | None, folder: Path) -> None:
    """What the numbers of the classes mean, where it is known, as a file of its own."""
    if label_names:
        write_bytes(folder / LABELS, (json.dumps(label_names, indent=2, ensure_ascii=False) + "\n").encode())


def state_without_ties(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors under the first of their names, as safetensors' `load_model` expects them.

    Where one tensor covers a piece of memory that others are views of, it stands for them: loading it fills them too.
    Parts of which none is the whole become tensors of their own; safetensors refuses shared memory.
    """
    groups: dict[Any, dict[str, Tensor]] = {}
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            groups.setdefault(tensor.untyped_storage().data_ptr() or key, {})[key] = tensor
    kept: dict[str, Tensor] = {}
    for group in groups.values():
        whole = next((key for key, tensor in group.items() if _is_whole(tensor)), None)
        kept |= {whole: group[whole]} if whole else {key: tensor.clone() for key, tensor in group.items()}
    return {key: tensor.contiguous() for key, tensor in kept.items()}


def _is_whole(tensor: Tensor) -> bool:
    return tensor.nbytes == tensor.untyped_storage().nbytes()


def reader(plain: nn.Module, folder: Path) -> Callable[[], nn.Module]:
    """How to read the files back. For a transformers model it holds nothing of `plain`, which can go first."""
    if not is_transformers(plain):
        return lambda: _fill(plain, folder / WEIGHTS)
    cls: Any = type(plain)
    device = next(plain.parameters()).device
    kwargs: dict[str, Any] = {"dtype": next(p.dtype for p in plain.parameters() if p.is_floating_point())}
    kwargs["attn_implementation"] = getattr(plain.config, "_attn_implementation", None)

    def read() -> nn.Module:
        with quiet():
            model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
        wrong = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
        if wrong:
            raise MergeError(f"the merged files have no values for {len(wrong)} tensors: {first_few(wrong)}")
        return model.to(device).eval()  # type: ignore[no-any-return]

    return read


@torch.no_grad()
def _fill(plain: nn.Module, file: Path) -> nn.Module:
    """Put a file's tensors into the model that they were written from, one at a time; ties are the model's own."""
    state = {key: tensor for key, tensor in plain.state_dict().items() if isinstance(tensor, Tensor)}
    for tensor in state.values():
        tensor.zero_()  # so that only what the file holds can answer
    for key, at in read_header(file)[0].items():
        state[key].copy_(read_bytes(file, key, at.start, at.size).view(DTYPES[at.dtype]).reshape(at.shape))
    return plain


def processing_of(backbone: nn.Module) -> list[Any]:
    """What prepares the inputs of a transformers model, from the directory or hub name that it was loaded from."""
    name = getattr(getattr(backbone, "config", None), "_name_or_path", None)
    if not name or not is_transformers(backbone):
        return []
    import transformers

    with quiet(), contextlib.suppress(Exception):  # a model without any says so in many ways
        return [transformers.AutoProcessor.from_pretrained(name)]  # type: ignore[no-untyped-call]
    return []


def _name_labels(config: Any, names: list[str] | None) -> None:
    """Where a config has as many labels and no names of its own for them."""
    if not names or getattr(config, "num_labels", None) != len(names):
        return
    if all(name == f"LABEL_{i}" for i, name in (config.id2label or {}).items()):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}


def _forget_quantization(model: nn.Module) -> None:
    """Once every layer is plain, what transformers notes of its quantization would quantize the files anew."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            model.__dict__.pop(flag, None)
