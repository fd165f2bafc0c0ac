"""Checkpoints of loralib, the paper's own code, in: `x.lora_A` and `x.lora_B`, with biases or whole.

Such a file says neither r nor alpha nor which parts of a `MergedLinear` are adapted. r is the width of B and the number
of adapted parts follows from the shapes; alpha, and which parts, the user has to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import Bias, LoRAConfig
from lora_lightning.lora.errors import AdapterError, ConfigError, TargetError, did_you_mean, some
from lora_lightning.lora.formats.loralib_layers import Factors, conv_factors, embedding_factors, linear_factors
from lora_lightning.lora.formats.misfits import refuse_not_finite
from lora_lightning.lora.formats.peft.adapter import load_tensors, plain_again_on_error, refuse_meta, uncompiled
from lora_lightning.lora.formats.provenance import warn_of_no_fingerprint, warn_of_other_base
from lora_lightning.lora.formats.tensor_files import read_pickled, read_tensors
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import inject
from lora_lightning.lora.layers import LoRAConv1D, kind_of
from lora_lightning.lora.report import InjectionReport

WRAPPERS = ("state_dict", "model_state_dict", "model")


def load_loralib(
    model: nn.Module,
    path: str | Path,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    enable_lora: Sequence[bool] | Mapping[str, Sequence[bool]] | None = None,
    modules_to_save: list[str] | None = None,
    allow_other_base: bool = False,
) -> InjectionReport:
    """Adapt a plain `model` as a loralib checkpoint says and load it: `h = W0 x + (alpha / r) B A x`.

    The file is what `torch.save` or safetensors wrote of `loralib.lora_state_dict(model, bias=...)` or of a whole
    `model.state_dict()`, bare or under `state_dict`, `model_state_dict` or `model`. It is unpickled as tensors and
    nothing else. loralib's `Conv2d` reshapes its product over the kernel; the same update is loaded as a convolution's
    A and B of a larger rank.

    Args:
        r, alpha: as the loralib layers were made; the file holds neither, and r is checked against it.
        enable_lora: of `MergedLinear`, such as `[True, False, True]` for query and value of a fused projection; for
            several kinds by module name or dotted end of it. Not needed where every part is adapted.
        modules_to_save: modules that were trained in full beside A and B and are in the file, such as a head.
        allow_other_base: load A and B, with a warning, though weights of the base in the file are not this model's.
            A file that holds less than the whole base is loaded with a notice.

    Raises:
        AdapterError: the file is torn, or holds more than tensors or numbers that are not finite; keys are missing,
            left over or wrongly shaped; r contradicts the shapes; W0 in the file is another, or merged. The model is
            then as before.
    """
    model = uncompiled(model)
    refuse_meta(model)
    tensors = _read(Path(path), model)
    parts = _factors(tensors, model, r, enable_lora)
    saved = modules_to_save or []
    rest = {k: t for k, t in _by_our_names(tensors, parts).items() if not k.endswith((".lora_A", ".lora_B"))}
    biases = _check_rest(rest, parts, saved, model, r=r, alpha=alpha, allow_other_base=allow_other_base)
    with plain_again_on_error(model):
        try:
            config = _config(parts, r=r, alpha=float(alpha), dropout=dropout, bias=biases, saved=saved)
            report = inject(model, config, start=False, any_rank=True)
        except (ConfigError, TargetError) as error:
            raise AdapterError(f"the checkpoint {path} does not fit this model: {error}") from error
        load_tensors(model, _our_tensors(model, parts, rest))
    return report


def _read(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Tensors by names of the model."""
    tensors = read_tensors(path)[0] if path.suffix == ".safetensors" else read_pickled(path, wrappers=WRAPPERS)
    if any(".lora_A." in key or ".lora_embedding_A" in key for key in tensors):
        raise AdapterError(f"{path} is PEFT's, not loralib's: use load_adapter on the directory that it lies in")
    for wrapper in ("module.", "_orig_mod."):
        if all(key.startswith(wrapper) for key in tensors) and wrapper[:-1] not in model._modules:
            tensors = {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}
    if not any(key.endswith("lora_A") for key in tensors):
        raise AdapterError(f"{path} has no key that ends in lora_A: it is no loralib checkpoint")
    refuse_not_finite(tensors)
    return tensors


def _factors(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    r: int,
    enable_lora: Sequence[bool] | Mapping[str, Sequence[bool]] | None,
) -> dict[str, Factors]:
    """A and B of every adapted module in our form."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise AdapterError(f"r must be a whole number of at least 1, got {r!r}")
    names = _adapted_names(tensors, dict(model.named_modules()))
    if isinstance(enable_lora, Mapping):
        for entry in enable_lora:
            if not any(_ends_in(name, entry) for name in names):
                raise AdapterError(f"enable_lora: no adapted module matches '{entry}'{did_you_mean(entry, names)}")
    found = {}
    for name in names:
        enabled = enable_lora
        if isinstance(enabled, Mapping):
            enabled = next((parts for entry, parts in enabled.items() if _ends_in(name, entry)), None)
        A, B = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        found[name] = _one(name, model.get_submodule(name), A, B, r, enabled)
    return found


def _adapted_names(tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules with both factors in the file, in its order."""
    names = list(dict.fromkeys(k.rpartition(".")[0] for k in tensors if k.endswith((".lora_A", ".lora_B"))))
    if unknown := [name for name in names if name not in modules]:
        missing = some([f"'{name}'" for name in unknown], 10)
        raise AdapterError(f"the model has no module {missing}{did_you_mean(unknown[0], modules)}")
    lonely = [f"{n}.{x}" for n in names for x in ("lora_A", "lora_B") if f"{n}.{x}" not in tensors]
    if lonely:
        raise AdapterError(f"the checkpoint lacks {len(lonely)} tensors: {some(lonely, 10)}")
    return names


def _one(name: str, module: nn.Module, A: Tensor, B: Tensor, r: int, enabled: Sequence[bool] | None) -> Factors:
    if A.dim() != 2 or B.dim() != 2:
        raise AdapterError(f"'{name}': lora_A and lora_B must be matrices, got {tuple(A.shape)} and {tuple(B.shape)}")
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return conv_factors(name, module, A, B, r)
    if isinstance(module, nn.Embedding):
        return embedding_factors(name, module, A, B, r)
    kind = kind_of(module)
    if kind is None or not kind.linear_like:
        raise AdapterError(f"'{name}', a {type(module).__name__}, is of no kind that loralib adapts")
    out, width = module.get_parameter("weight").shape
    return linear_factors(name, (width, out) if kind is LoRAConv1D else (out, width), A, B, r, enabled)


def _by_our_names(tensors: Mapping[str, Tensor], parts: Mapping[str, Factors]) -> dict[str, Tensor]:
    """loralib's convolutions hold the plain one as `conv`."""
    inner = {f"{name}.conv.": f"{name}." for name, part in parts.items() if part.A.dim() == 4}
    renamed = {}
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in inner if key.startswith(prefix)), "")
        renamed[inner[prefix] + key.removeprefix(prefix) if prefix else key] = tensor
    return renamed


def _check_rest(
    rest: Mapping[str, Tensor],
    parts: Mapping[str, Factors],
    saved: list[str],
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    allow_other_base: bool,
) -> Bias:
    """Compare what is of the base with the model's W0, and tell which biases were trained.

    Raises:
        AdapterError: keys that the model does not have, or weights that are not its own.
    """
    own = model.state_dict()
    rest = {k: t for k, t in rest.items() if not any(_within(k, name) for name in saved)}
    if strangers := [key for key in rest if key not in own]:
        hint = did_you_mean(strangers[0], own)
        raise AdapterError(f"the checkpoint has {len(strangers)} keys left over: {some(strangers, 10)}{hint}")
    moved = [key for key, tensor in rest.items() if not _same(tensor, own[key])]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    biases = [key for key in moved if key.rpartition(".")[2] == "bias" and key in parameters]
    others = [key for key in moved if key not in biases]
    if others and allow_other_base:
        warn_of_other_base(f"{len(others)} weights in the checkpoint are not this model's: {some(others)}", 4)
    elif others:
        merged = [key for key in others if _is_merged(key, rest[key], own[key], parts, alpha / r)]
        why = (
            "loralib folds the update into W0 in eval() mode and this was saved so: W0 + (alpha / r) B A"
            if merged == others
            else "the base is another, or these were trained too (then name them in modules_to_save), or the file was"
            " saved in eval() mode, trained on and so holds an older update in W0"
        )
        raise AdapterError(
            f"{len(others)} weights in the checkpoint are not this model's: {some(others, 10)}; {why}."
            f" Pass allow_other_base=True to put A and B on this model's own weights"
        )
    if not own.keys() - rest.keys() <= {key for key in own if any(_within(key, name) for name in saved)}:
        warn_of_no_fingerprint(4)
    if not biases:
        return "none"
    return "lora_only" if all(key.rpartition(".")[0] in parts for key in biases) else "all"


def _is_merged(key: str, tensor: Tensor, own: Tensor, parts: Mapping[str, Factors], scale: float) -> bool:
    part = parts.get(key.removesuffix(".weight"))
    if part is None or tensor.shape != own.shape:
        return False
    delta = part.delta()
    merged = own.double().cpu() + scale * (delta if delta.shape == own.shape else delta.T)
    return torch.allclose(merged, tensor.double(), rtol=1e-4, atol=1e-5 * float(own.abs().max()))


def _config(
    parts: Mapping[str, Factors], *, r: int, alpha: float, dropout: float, bias: Bias, saved: list[str]
) -> LoRAConfig:
    exactly = {name: f"^{re.escape(name)}$" for name in parts}
    return LoRAConfig(
        r=r,
        alpha=alpha,
        dropout=dropout,
        target_modules="|".join(re.escape(name) for name in parts),
        slices={exactly[n]: part.slices for n, part in parts.items() if part.slices is not None},
        rank_pattern={exactly[n]: part.r for n, part in parts.items() if part.r != r},
        alpha_pattern={exactly[n]: alpha * part.r / r for n, part in parts.items() if part.r != r},
        modules_to_save=saved or None,
        bias=bias,
    )


def _our_tensors(model: nn.Module, parts: Mapping[str, Factors], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours, missing = dict[str, Tensor](), list[str]()
    convs = {name for name, part in parts.items() if part.A.dim() == 4}  # loralib's `lora_only` leaves theirs frozen
    for name, part in parts.items():
        ours |= {f"{name}.lora_A": part.A, f"{name}.lora_B": part.B}
    for key, own in adapter_tensors(model).items():
        theirs = key.replace(".lora_copy.", ".").replace(".lora_trained_bias", ".bias")
        if key not in ours and theirs in rest:
            ours[key] = rest[theirs]
        elif theirs.removesuffix(".bias") in convs:
            ours[key] = own
        elif key not in ours:
            missing.append(theirs)
    if missing:
        raise AdapterError(f"the checkpoint lacks {len(missing)} tensors: {some(missing, 10)}")
    return ours


def _same(tensor: Tensor, own: Tensor) -> bool:
    return tensor.shape == own.shape and torch.equal(tensor.to(own.dtype), own.cpu())


def _ends_in(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _within(key: str, name: str) -> bool:
    return key.startswith(f"{name}.") or f".{name}." in key
