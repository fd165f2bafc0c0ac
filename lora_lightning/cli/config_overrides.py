"""How `trainer.precision` sets a backbone's arguments before it is built.

A cast after loading would need memory for the float32 weights, and quantization happens on loading.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, get_args

from lora_lightning.backbones.tokenizers import TRUSTED
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.precision import BaseWord

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
"""QLoRA's settings (arXiv 2305.14314): 4-bit NormalFloat, its constants quantized too."""

HUGGINGFACE = ("lora_lightning.backbones.huggingface", "huggingface")
"""By name, so that not every command imports transformers."""


def set_precision(command: Any) -> None:
    """Give a `huggingface` backbone in a command's config the arguments for `trainer.precision`.

    The config's settings of dtype or quantization stay.

    Raises:
        LoRAError: quantization is requested and bitsandbytes is not installed.
    """
    backbone = command.get("model.backbone")
    module, _, name = str(getattr(backbone, "class_path", None) or "").rpartition(".")
    made_by = getattr(importlib.import_module(module), name, None) if module else None
    if (getattr(made_by, "__module__", ""), getattr(made_by, "__name__", "")) != HUGGINGFACE:
        return
    precision, args = command.get("trainer.precision"), backbone.init_args
    given = args.get("model_kwargs") or {}
    if given.get("trust_remote_code"):
        TRUSTED.add(str(args.pretrained_model_name_or_path))
    if precision not in get_args(BaseWord):
        return
    args["dtype"] = args.get("dtype") or "bfloat16"
    if precision == "nf4-base":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise LoRAError("precision nf4-base needs bitsandbytes: pip install 'lora_lightning[qlora]'")
        # Modules that train in full are not quantized; this list replaces transformers' default, the head.
        saved = command.get("model.lora.modules_to_save")
        skipped = {"llm_int8_skip_modules": [*saved, "lm_head"]} if saved else {}
        args["model_kwargs"] = {"quantization_config": NF4 | skipped, **given}
