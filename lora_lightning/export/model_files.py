"""Write the merged model as files that open without this package, and read them back."""

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
from lora_lightning.lora.formats.tensor_files import read_header, write_tensors
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a

WEIGHTS, LABELS = "model.safetensors", "label_names.json"


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is transformers', with `save_pretrained`."""
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
    """Write a transformers model by `save_pretrained`, any other model as one safetensors file.

    Args:
        processing: the tokenizer or other processors of the model's inputs, saved beside it.
        label_names: names of the classes, for a transformers config, else for a file beside the weights.
        problem_type: transformers' name of a classifier's task, for its config.
        max_shard_size: of a transformers model's files; transformers' default where it is None.
    """
    folder.mkdir(parents=True)
    if is_transformers(plain):
        config: Any = plain.config
        known = getattr(config, "id2label", None) or {}
        is_unnamed = all(name == f"LABEL_{i}" for i, name in known.items())  # by transformers' default
        if label_names and is_unnamed and getattr(config, "num_labels", None) == len(label_names):
            config.id2label = dict(enumerate(label_names))
            config.label2id = {name: i for i, name in enumerate(label_names)}
        if problem_type is not None:
            config.problem_type = problem_type
        quantizer: Any = getattr(plain, "hf_quantizer", None)
        if quantizer is not None:  # its marks would quantize the plain files when they are loaded
            quantizer.remove_quantization_config(plain)
            for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
                plain.__dict__.pop(flag, None)
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
    """Write the names of the classes, where they are known, as a JSON file."""
    if label_names:
        write_bytes(folder / LABELS, (json.dumps(label_names, indent=2, ensure_ascii=False) + "\n").encode())


def state_without_ties(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors under the first of their names, as safetensors' `load_model` expects them.

    safetensors refuses shared memory. Where tensors are views of one that covers all of their memory, only that one is
    kept: loading it fills the views too. Views without such a tensor are copied.
    """
    groups: dict[Any, dict[str, Tensor]] = {}
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            groups.setdefault(tensor.untyped_storage().data_ptr() or key, {})[key] = tensor
    state: dict[str, Tensor] = {}
    for group in groups.values():
        whole = next((key for key, t in group.items() if t.nbytes == t.untyped_storage().nbytes()), None)
        state |= {whole: group[whole]} if whole else {key: tensor.clone() for key, tensor in group.items()}
    return {key: tensor.contiguous() for key, tensor in state.items()}


def reader(plain: nn.Module, folder: Path) -> Callable[[], nn.Module]:
    """A function that reads the files back. For a transformers model it does not hold `plain`, which can be freed."""
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
    """Load a file's tensors, one at a time, into the model that they were written from, which keeps its ties."""
    state = {key: tensor for key, tensor in plain.state_dict().items() if isinstance(tensor, Tensor)}
    for tensor in state.values():
        tensor.zero_()  # so that a tensor that the file lacks is noticed
    for key, at in read_header(file)[0].items():
        state[key].copy_(at.read())
    return plain


def processing_of(backbone: nn.Module) -> list[Any]:
    """The processor of a transformers model's inputs, from the directory or hub name that it was loaded from."""
    name = getattr(getattr(backbone, "config", None), "_name_or_path", None)
    if not name or not is_transformers(backbone):
        return []
    import transformers

    with quiet(), contextlib.suppress(Exception):  # many kinds, for a model without one
        return [transformers.AutoProcessor.from_pretrained(name)]  # type: ignore[no-untyped-call]
    return []
