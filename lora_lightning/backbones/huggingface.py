"""Backbones by one line of YAML. Any other `nn.Module` is named by its own `class_path`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from lora_lightning.backbones.checkpoint import load_on_meta
from lora_lightning.backbones.locate import directory_and_file, refuse_not_there, resolve
from lora_lightning.backbones.tokenizers import load_tokenizer, quiet
from lora_lightning.lora.errors import LoRAError, did_you_mean, first_line
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.meta.empty_model import builds_bare


def huggingface(
    pretrained_model_name_or_path: str,
    auto_class: str = "AutoModelForSequenceClassification",
    num_labels: int | None = None,
    label_names: list[str] | None = None,
    pad_token_id: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    random_weights: bool = False,
    on_meta: bool = False,
    add_tokens: list[str] | None = None,
    tokenizer: Any = None,
    model_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """A transformers model, by `AutoModel...from_pretrained`; within `torch.device("meta")` its architecture alone.

    Args:
        pretrained_model_name_or_path: a hub name, a directory, a GGUF file, or `package:NAME/path` for one of the
            latter inside an installed package.
        auto_class: the transformers class whose `from_pretrained` is called.
        num_labels: outputs of a classification head; by default the number of the data's label names.
        label_names: written to the config, in the order of the labels' numbers; by default the data's.
        pad_token_id: the token that pads batches, by default the tokenizer's. GPT-2 and Llama come without one, and
            classify by the last token that is not padding.
        dtype: of the frozen weights; the adapters are float32 or wider in any case. By default float32, or in the
            command what `--trainer.precision` says of W0.
        attn_implementation: transformers' choice of attention: eager, sdpa, flash_attention_2 and more.
        revision: branch, tag or commit on the hub.
        random_weights: build the architecture from its config and load no weights.
        on_meta: keep the weights on the meta device until a fit or a test begins, where each process reads its part
            only: for sharded models that no process can hold. Safetensors only.
        add_tokens: new tokens, which the tokenizer no longer splits, each with a row of the embedding (and of the head)
            that starts as the mean of the others. `lora.trainable_token_indices` trains them by these names.
        tokenizer: the data's tokenizer, which the DataModule passes and which gets the new tokens; else the model's.
        model_kwargs: more arguments for `from_pretrained`. A model that brings its own code is refused without
            `trust_remote_code: true` here.

    Raises:
        LoRAError: no such class, no such model, or weights that lack tensors of the backbone; or, with `on_meta`,
            weights that are quantized, random or not safetensors, or tokens to add.
    """
    cls = getattr(transformers, auto_class, None)
    if cls is None:
        known = [name for name in dir(transformers) if name.startswith("AutoModel")]
        raise LoRAError(f"transformers has no class '{auto_class}'{did_you_mean(auto_class, known)}")
    dtype = dtype or "float32"
    name, gguf = directory_and_file(resolve(pretrained_model_name_or_path))
    kwargs = {"trust_remote_code": False, **(model_kwargs or {})} | gguf
    if gguf and kwargs.get("quantization_config"):
        raise LoRAError(
            f"'{gguf['gguf_file']}' is a GGUF file, which transformers reads as plain numbers and does not quantize:"
            " use precision bf16-base, or name the model's safetensors directory or hub name"
        )
    if "cache_dir" not in kwargs:  # with which it may be in another place than the hub's cache
        refuse_not_there("model", name)
    if label_names:
        kwargs |= {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    labels = num_labels or len(label_names or ())
    given = {"num_labels": labels, "attn_implementation": attn_implementation, "revision": revision}
    kwargs |= {key: value for key, value in given.items() if value}
    build = _from_config if random_weights or builds_bare() else _load
    try:
        with quiet():
            if on_meta and not builds_bare():
                load = partial(build, cls, name, dtype, {**kwargs, "use_safetensors": True})
                model = load_on_meta(load, {**kwargs, "random_weights": random_weights, "add_tokens": add_tokens})
            else:
                model = build(cls, name, dtype, kwargs)
    except LoRAError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, SafetensorError, ImportError) as error:
        raise LoRAError(_fault(pretrained_model_name_or_path, error)) from error
    if gguf:
        # transformers still marks what it read as quantized, and would not save it.
        for mark in ("hf_quantizer", "quantization_method"):
            model.__dict__.pop(mark, None)
        model.config.__dict__.pop("quantization_config", None)
        model.is_quantized = False  # type: ignore[assignment]
        model.config.name_or_path = pretrained_model_name_or_path  # the file's is a title, such as Smollm2 135M
    if add_tokens:
        grow(model, add_tokens, tokenizer or load_tokenizer(pretrained_model_name_or_path))
    text = model.config.get_text_config()
    if pad_token_id is not None and "pad_token_id" in text.to_dict():
        text.pad_token_id = pad_token_id  # batches are padded with this one, so the last real token is found by it
    return model  # type: ignore[no-any-return]


def _fault(name: str, error: Exception) -> str:
    """Why transformers loads no model of this name."""
    if isinstance(error, ImportError):
        return f"'{name}' asks for a package: {first_line(error)}"
    if "trust_remote_code" in str(error):
        return (
            f"'{name}' brings code of its own, which is not run unasked: read it, and then give the backbone"
            " model_kwargs: {trust_remote_code: true}"
        )
    if Path(name).exists():
        return f"transformers cannot load '{name}': {first_line(error)}"
    return f"no model '{name}': neither a directory nor found on the hub ({first_line(error)})"


@torch.no_grad()
def grow(model: Any, tokens: list[str], tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Add tokens to a tokenizer, and their rows to the embedding and the head of a model.

    A new row is the mean of the old rows, rounded to bfloat16, so that every machine computes the same bits and the
    same fingerprint of W0. `model.added_tokens` maps the tokens to their numbers.

    Raises:
        LoRAError: a token is listed twice, or the tokenizer has more words than the model has rows.
    """
    if len(set(tokens)) < len(tokens):
        raise LoRAError(f"add_tokens holds a token twice: {tokens}")
    rows = model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert isinstance(ids, list)  # since `tokens` is a list
    numbers = dict(zip(tokens, map(int, ids), strict=True))
    fresh = [number for number in numbers.values() if number >= rows]
    if fresh and min(fresh) > rows:
        raise LoRAError(f"the tokenizer has {min(fresh)} words and the model {rows} rows: name its own tokenizer")
    if fresh:
        model.resize_token_embeddings(max(fresh) + 1, mean_resizing=False)
        head = model.get_output_embeddings()
        for module in (model.get_input_embeddings(), head):
            for tensor in () if module is None else (module.weight, getattr(module, "bias", None)):
                if tensor is not None and not tensor.is_meta:
                    tensor[rows:] = tensor[:rows].double().mean(0).to(torch.bfloat16).to(tensor.dtype)
    model.added_tokens = numbers


def _load(cls: Any, name: str, dtype: str, kwargs: dict[str, Any]) -> Any:
    # A head of another size becomes a new head, like one that the weights lack. transformers 5.25 would download
    # kernels that compute layers in place of their forward, which adapters are part of.
    kwargs = {"ignore_mismatched_sizes": True, "use_kernels": False, **kwargs}
    model, info = cls.from_pretrained(name, dtype=getattr(torch, dtype), output_loading_info=True, **kwargs)
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    model.new_keys = sorted({*info["missing_keys"], *mismatched})  # of a new head or pooler, or the weights lack them
    prefix = f"{model.base_model_prefix}."
    has_head = any(key.startswith(prefix) for key in model.state_dict())
    # Encoders trained on masked words come without a pooler.
    body = [k for k in model.new_keys if (k.startswith(prefix) or not has_head) and "pooler." not in k]
    if body:
        raise LoRAError(
            f"the weights have no values for {len(body)} tensors of {type(model).__name__}, first '{body[0]}': they are"
            " incomplete or belong to another architecture"
        )
    _unquantize(model, {key.rpartition(".")[0] for key in model.new_keys})
    return model


def _unquantize(model: nn.Module, new: set[str]) -> None:
    """Replace new layers that transformers made for quantization by plain ones: they have no quantization state."""
    for name in new:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear and scheme(layer) is None:
            parent, _, last = name.rpartition(".")
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.load_state_dict(layer.state_dict(), assign=True)
            setattr(model.get_submodule(parent), last, plain)


def _from_config(cls: Any, name: str, dtype: str, kwargs: dict[str, Any]) -> Any:
    attention = {k: kwargs.pop(k) for k in ("attn_implementation",) if k in kwargs}
    config = transformers.AutoConfig.from_pretrained(name, **kwargs)
    if cls.__name__.startswith("Auto"):
        return cls.from_config(config, dtype=getattr(torch, dtype), **attention)
    return cls(config).to(getattr(torch, dtype))
