"""A transformers model and its files, without loading it: its class, its tensors, and the model on the meta device.

transformers 5 renames keys on loading, adds or drops the base model's prefix, and fuses tensors, such as a mixture's
experts. `groups_of` applies transformers' rules and operations, in both directions.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.peft.keys import PREFIX, canonical_keys
from lora_lightning.lora.formats.peft.load import AdapterFiles
from lora_lightning.lora.formats.tensor_files import DTYPES, Checkpoint
from lora_lightning.lora.meta.key_mapping import Group, Tensors, base_of, keep_files

CONFIG = "config.json"

# PEFT's names of tasks.
TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


class BaseFiles:
    """The files of one base.

    Raises:
        LoRAError: there are none, or they are torn, quantized, or of no model that transformers has.
    """

    def __init__(self, directory: Path) -> None:
        self.checkpoint = Checkpoint(directory)
        self.config = _config(directory)

    def maker(self, files: AdapterFiles) -> tuple[Callable[[], PreTrainedModel], dict[str, Any]]:
        """A function that makes the plain model for this adapter on the meta device, and the config's new labels.

        The adapter's task decides the class, and the adapter's head the number of labels.

        Raises:
            LoRAError: transformers has no such class.
        """
        config, dtype = self.config, main_dtype(self.checkpoint)
        cls, heads = _model_class(config, str(files.peft.get("task_type"))), dict[str, Any]()

        def make() -> PreTrainedModel:
            with torch.device("meta"):
                # A copy, since a merge that unties two matrices changes the config.
                return cls._from_config(copy.deepcopy(config), dtype=dtype)  # type: ignore[no-any-return,no-untyped-call]

        plain = make()
        state, number = plain.state_dict(), plain.config.num_labels
        for key, tensor in canonical_keys(files.tensors, dict(plain.named_modules())).items():
            expected = state.get(key.removeprefix(PREFIX))
            if expected is None or not expected.dim() or expected.shape[1:] != tensor.shape[1:]:
                continue
            if expected.shape[0] == number != tensor.shape[0]:  # a head of another size
                config.num_labels = int(tensor.shape[0])
                heads = {name: getattr(config, name) for name in ("id2label", "label2id")}
                break
        return make, heads


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point dtype of most of the base's bytes, which a new head gets."""
    sizes = Counter({"F32": 0})
    for stored in checkpoint.stored.values():
        if stored.dtype in ("F64", "F32", "BF16", "F16"):
            sizes[stored.dtype] += stored.size
    return DTYPES[sizes.most_common(1)[0][0]]


def _config(base: Path) -> PretrainedConfig:
    if not (base / CONFIG).is_file():
        raise LoRAError(f"no file {base / CONFIG}: name the directory of a Hugging Face model")
    try:
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise LoRAError(f"{base / CONFIG} is no config of a transformers model ({error})") from error
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else type(quantized).__name__
        raise LoRAError(
            f"'{base}' is quantized ({method}), and rounding to its grid would lose most of the update: name the"
            f" unquantized base"
        )
    return config  # type: ignore[no-any-return]


def _model_class(config: PretrainedConfig, task: str) -> type[PreTrainedModel]:
    """The class of the adapter's task, else the one that the base's config names."""
    if task in TASKS:
        try:
            with torch.device("meta"):
                return type(getattr(transformers, TASKS[task]).from_config(copy.deepcopy(config)))
        except ValueError as error:
            raise LoRAError(
                f"the adapter's task is {task}, and transformers has no such {config.model_type} model"
            ) from error
    named = next(iter(config.architectures or []), "")
    if not hasattr(transformers, named):
        what = f"'{named}', which transformers does not have" if named else "no architecture"
        raise LoRAError(f"{CONFIG} names {what}: merge it in memory with load_adapter and merge")
    return getattr(transformers, named)  # type: ignore[no-any-return]


def groups_of(model: PreTrainedModel, checkpoint: Checkpoint, *, to_write: bool = True) -> list[Group]:
    """The groups of file keys that make up tensors of the model; keys without a place in it are left out.

    Args:
        to_write: whether the tensors will be written back too.

    Raises:
        LoRAError: loading fuses tensors by a rule that cannot be reversed, and `to_write` is True.
    """
    renamings, converters = _rules(model)
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state: dict[str, Any] = model.state_dict()
    groups: list[Group] = []
    fusions: dict[str, _Fusion] = {}
    for key in sorted(checkpoint.stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name in state and pattern is None:
            groups.append(Group([key], [name]))
        elif name in state and pattern is not None:
            fusion = fusions.setdefault(name, _Fusion([], [name], model, of_pattern[pattern]))
            fusion.stored.append(key)
            fusion.patterns.append(pattern)
            fusion.keys[_bare(apply_renamings(key, renamings), model)] = key
    for fusion in fusions.values():
        fusion.check(checkpoint, state, to_write=to_write)
    return [*groups, *fusions.values()]


def name_of(model: PreTrainedModel, key: str) -> str:
    """The name in the model of the tensor that a file holds under `key`."""
    return rename_source_key(key, *_rules(model), model.base_model_prefix, model.state_dict())[0]


def _rules(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """transformers' rules for this model: those that rename keys, and those that fuse tensors."""
    rules = get_model_conversion_mapping(model)
    return [r for r in rules if isinstance(r, WeightRenaming)], [r for r in rules if isinstance(r, WeightConverter)]


@dataclass(eq=False)
class _Fusion(Group):
    """The tensors that one rule fuses from tensors in the files."""

    model: PreTrainedModel
    rule: WeightConverter
    patterns: list[str] = field(default_factory=list)
    """For each key in the files, the pattern of the rule that matched it."""
    keys: dict[str, str] = field(default_factory=dict)
    """The files' keys by their names without prefix and renaming."""
    is_alone: ClassVar[bool] = False

    def load(self, tensors: Tensors) -> Tensors:
        converter, name = copy.deepcopy(self.rule), self.names[0]
        for key, pattern in zip(self.stored, self.patterns, strict=True):  # `pop`, so that fused pieces are freed
            converter.add_tensor(name, key, pattern, tensors.pop(key))  # type: ignore[arg-type]
        return self._convert(converter, name)

    def store(self, tensors: Tensors) -> Tensors:
        reverse, first = self.rule.reverse_transform(), ""
        assert isinstance(reverse, WeightConverter)
        for name in sorted(tensors, key=dot_natural_key):
            renamed, pattern = apply_converters(name, [reverse])
            first = first or renamed
            reverse.add_tensor(renamed, name, pattern or "", tensors[name])  # type: ignore[arg-type]
        made = self._convert(reverse, first)
        return {self.keys[_bare(name, self.model)]: tensor for name, tensor in made.items()}

    def _convert(self, converter: WeightConverter, name: str) -> Tensors:
        made = converter.convert(name, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def check(self, checkpoint: Checkpoint, state: Mapping[str, Tensor], *, to_write: bool) -> None:
        """Run the rule on the meta device, in both directions if `to_write`, and learn the names that it makes."""
        stored = {key: checkpoint.stored[key] for key in self.stored}
        before = {
            key: torch.empty(at.shape, dtype=DTYPES.get(at.dtype, torch.uint8), device="meta")
            for key, at in stored.items()
        }
        try:
            made = self.load(dict(before))
            after = self.store(made) if to_write else before
        except (RuntimeError, KeyError, ValueError, NotImplementedError) as error:
            raise LoRAError(
                f"the tensors that make up '{self.names[0]}' cannot be fused or parted again ({error})"
            ) from error
        same = after.keys() == before.keys() and all(after[key].shape == before[key].shape for key in before)
        if not same or any(n not in state or state[n].shape != tensor.shape for n, tensor in made.items()):
            raise LoRAError(
                f"'{self.names[0]}' is stored as {len(before)} tensors, first '{self.stored[0]}', in a form that cannot"
                f" be {'written back: load the model and merge it in memory' if to_write else 'read tensor by tensor'}"
            )
        self.names = list(made)


def _bare(name: str, model: PreTrainedModel) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


NOT_ON_META = (
    "random_weights", "add_tokens", "gguf_file", "quantization_config", "device_map", "key_mapping",
    "tp_plan", "tp_size", "distributed_config",
)  # fmt: skip


def load_on_meta(load: Callable[[], PreTrainedModel], given: Mapping[str, Any]) -> PreTrainedModel:
    """The result of `load`, a call of `from_pretrained` with the `given` arguments, which reads no values.

    transformers finds the files, renames and fuses their tensors, chooses each dtype, checks keys and shapes, and
    initializes what the files lack; the safetensors files that it opens give it tensors on the meta device. Tensors
    that loading ties if their values are equal are tied, and the model records where its weights are.

    Raises:
        LoRAError: an argument makes weights, or prevents that they are read one by one; the weights are quantized, or
            were read in another way.
    """
    if conflict := next((name for name in NOT_ON_META if given.get(name)), None):
        raise LoRAError(f"on_meta reads plain safetensors files and goes with no {conflict}: leave one of the two out")
    files: list[Path] = []

    def opened(file: str, *args: Any, **kwargs: Any) -> _Headers:
        files.append(Path(file))
        return _Headers(safe_open(file, framework="pt"))

    with patch.object(modeling_utils, "safe_open", opened):
        model = load()
    if getattr(model, "hf_quantizer", None) is not None:
        raise LoRAError("on_meta fills plain weights, and these are quantized: leave on_meta out")
    if not files or not any(p.is_meta for p in model.parameters()):
        raise LoRAError(
            f"{type(model).__name__} was not built on the meta device: its weights are no safetensors files, or this"
            " version of transformers opens them in another way; leave on_meta out"
        )
    keep_files(model, list(dict.fromkeys(files)), partial(groups_of, to_write=False))
    _tie_equal(model)
    return model


class _Headers:
    """A safetensors file that gives shapes and dtypes only."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def get_slice(self, key: str) -> _Bare:
        return _Bare(self.file.get_slice(key))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class _Bare:
    """A tensor of a file without its values, with the operations that transformers applies to it."""

    def __init__(self, part: Any) -> None:
        self.get_shape, self.get_dtype = part.get_shape, part.get_dtype

    def __getitem__(self, index: Any) -> _Bare:
        assert index is Ellipsis, index
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return an empty tensor on the meta device, whatever `device` says."""
        return torch.empty(self.get_shape(), dtype=dtype or DTYPES.get(self.get_dtype(), torch.uint8), device="meta")


def _tie_equal(model: PreTrainedModel) -> None:
    """Tie weights that the files hold equal under both names, as `PreTrainedModel.tie_weights` does in memory."""
    base = base_of(model)
    assert base is not None
    keys: dict[str, str] = model.all_tied_weights_keys
    equal: set[str] = set()
    for target, source in list(keys.items()):
        if model.get_parameter(target) is model.get_parameter(source):
            continue
        dtype, both = model.get_parameter(target).dtype, (base.place(target), base.place(source))
        if all(base.of_name[n].is_alone for n in (target, source)) and len({(at.shape, at.dtype) for at in both}) == 1:
            pairs: Iterable[Any] = zip(base.blocks(target), base.blocks(source), strict=True)
        else:
            pairs = [[base.load(base.of_name[name])[name] for name in (target, source)]]
        if all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in pairs):
            equal.add(target)
        else:
            keys.pop(target)
    base.forget()
    if equal:
        model.tie_weights(missing_keys=equal, recompute_mapping=False)
