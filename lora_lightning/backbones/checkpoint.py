"""The base's directory, read without loading the model: its class, its modules, its tensors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.peft.keys import PREFIX, canonical_keys
from lora_lightning.lora.formats.peft.load import AdapterFiles
from lora_lightning.lora.formats.tensor_files import DTYPES, Checkpoint

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
