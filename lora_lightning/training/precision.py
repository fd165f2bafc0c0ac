"""Precision in one word: Lightning's, and the two that suit LoRA, in which only W0 is narrow.

`bf16-base`: W0 in bfloat16, A, B and `modules_to_save` in float32, products in bfloat16 by autocast. `nf4-base`: the
same over a W0 that was quantized when it was loaded (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import nn

from lora_lightning.lora.errors import LoRAError, first_line
from lora_lightning.lora.frozen.dtype import cast_base
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.frozen.tensors import full_name
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers.class_swap import own_class
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a

BaseWord = Literal["bf16-base", "nf4-base"]
Word = Literal["auto", "float32", BaseWord]
"""Values that this package adds to Lightning's."""
LightningsWord = (
    Literal["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]
    | Literal["transformer-engine", "transformer-engine-float16", "16", "32", "64", "bf16", 16, 32, 64]
)
"""Values of Lightning's Trainer."""

INSTEAD = "use bf16-base: W0 in that precision, A and B in float32"
REFUSED = {
    **dict.fromkeys(("bf16-true", "16-true"), f"would round A and B too, to steps too coarse to train in: {INSTEAD}"),
    **dict.fromkeys(
        ("transformer-engine", "transformer-engine-float16"),
        f"would put other layers in place of adapted ones: {INSTEAD}",
    ),
}
MIXED_UP = re.compile("mixed dtype|the same dtype|expected scalar type|Type promoting not supported")
"""Errors of torch's operations where float32 meets bfloat16."""


class HalfBase(MixedPrecision):
    """Rounds W0 to bfloat16 when a module is set up, and computes under bfloat16 autocast.

    For `Trainer(plugins=[HalfBase()])`; `LoRATrainer(precision="bf16-base")` and the command's
    `--trainer.precision bf16-base` do the same.

    Args:
        word: `nf4-base` also requires that the backbone was loaded in 4 bit.
        device: the kind of device that the autocast is for; by default the GPU where there is one.
    """

    def __init__(self, word: BaseWord = "bf16-base", device: str | None = None) -> None:
        super().__init__("bf16-mixed", device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = word  # type: ignore[assignment]

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast W0 in place; for `nf4-base` something must be quantized."""
        if self.precision == "nf4-base" and not any(scheme(m) == "bitsandbytes 4-bit" for m in module.modules()):  # type: ignore[comparison-overlap]
            raise LoRAError(
                "precision nf4-base is for a backbone that is quantized as it is loaded, and this one is not: name"
                " lora_lightning.huggingface in the config, give it model_kwargs.quantization_config, put"
                " bitsandbytes.nn.Linear4bit into your own model, or use bf16-base"
            )
        cast_base(module, torch.bfloat16, load_dtypes(module, torch.bfloat16))
        return module

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, cache_enabled=False)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast, with a clear error where the model cannot compute in bfloat16."""
        with self.autocast_context_manager():
            try:
                yield
            except RuntimeError as error:
                if not MIXED_UP.search(str(error)):
                    raise
                reason = first_line(error)
                raise LoRAError(
                    f"the backbone brings float32 to weights in bfloat16, which torch refuses here ({reason}): use"
                    " precision bf16-mixed, which keeps W0 in float32"
                ) from error


def lightning_precision(word: Any, accelerator: str) -> Any:
    """Lightning's value of `precision` for this word; raises where it would take the adapter out of float32."""
    if word in REFUSED:
        raise LoRAError(f"precision {word} {REFUSED[word]}")
    if word == "auto":  # bfloat16 where the hardware has its products; on other CPUs they are slower than float32's
        if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has = torch.cpu.get_capabilities()
            is_fast = bool(has.get("avx512_bf16") or has.get("amx_tile"))
        return "bf16-mixed" if is_fast else "32-true"
    return {"float32": "32-true", **dict.fromkeys(get_args(BaseWord), "bf16-mixed")}.get(word, word)


def narrow_base(trainer: Trainer, word: BaseWord) -> None:
    """Put `HalfBase` in the place of the trainer's bfloat16 autocast, unless the strategy handles dtypes itself."""
    plugin = trainer.precision_plugin
    if type(plugin) is not MixedPrecision:
        raise LoRAError(
            f"precision {word} is for one device, DDP and FSDP2;"
            f" {type(trainer.strategy).__name__} has a way of its own with dtypes: use bf16-mixed there"
        )
    trainer.strategy.precision_plugin = HalfBase(word, plugin.device)


def convert(module: LightningModule, plugin: Precision) -> None:
    """Let the precision plugin cast the module before anything reads W0.

    Lightning does so only after a checkpoint was compared with W0; its second cast changes nothing.
    """
    before = len(grafted_modules(module))
    plugin.convert_module(module)
    if len(grafted_modules(module)) < before:
        raise LoRAError(
            f"{type(plugin).__name__} put layers of its own in the place of adapted ones: quantize the backbone before"
            " it is adapted, or use precision nf4-base"
        )


def precision_of(module: LightningModule) -> str | None:
    """The precision of the module's trainer; None without one."""
    trainer = trainer_of(module)
    return None if trainer is None else str(trainer.precision)


def trainer_of(module: LightningModule) -> Trainer | None:
    """The module's trainer; the public property raises where there is none."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def load_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Keys of the transformers models in `model` that `from_pretrained(dtype=dtype)` would load in another dtype.

    An architecture may keep a router's bias and the like in float32. So W0 has the same bits, and the same
    fingerprint, whether it was loaded in `dtype` or cast to it.
    """
    dtypes: dict[str, torch.dtype] = {}
    inside: tuple[str, ...] = ()
    hf_models: list[tuple[str, Any]] = [(path, m) for path, m in model.named_modules() if is_a(m, HF_MODEL)]
    for path, part in hf_models:
        if path.startswith(inside):
            continue
        inside = (*inside, f"{path}." if path else "")
        # By the model that transformers makes in `dtype` from the config, on the meta device, and by its patterns.
        config = copy.deepcopy(part.config)
        for name in ("quantization_config", "_pre_quantization_dtype"):
            vars(config).pop(name, None)
        try:
            with torch.device("meta"):
                made: nn.Module = own_class(type(part))._from_config(config, dtype=dtype)  # type: ignore[attr-defined]
        except Exception:  # a class that is not made from a config
            made = nn.Module()
        other = {key: t.dtype for key, t in made.state_dict().items() if t.is_floating_point() and t.dtype != dtype}
        patterns = [*(part._keep_in_fp32_modules_strict or ())]
        patterns += (part._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()
        wide = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns) or "(?!)")
        other |= {key: torch.float32 for key in part.state_dict() if wide.search(key)}
        dtypes |= {full_name(path, key): expected for key, expected in other.items()}
    return dtypes
