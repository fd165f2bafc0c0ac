"""Load checkpoints of loralib, the paper's code: `x.lora_A` and `x.lora_B`, with biases or with the whole model.

Such a file has neither r nor alpha nor the adapted parts of a `MergedLinear`. The shapes give r, the width of B, and
the number of adapted parts; the user gives alpha, and which parts. The layers here have the same update, from the same
numbers in another arrangement. Shapes: r the rank, V rows of an embedding of width d, k the side of a square kernel.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import Bias
from lora_lightning.lora.errors import AdapterError, did_you_mean, first_few
from lora_lightning.lora.formats.peft.load import exact_config, inject_and_fill, refuse_meta, refuse_not_finite
from lora_lightning.lora.formats.provenance import warn_of_no_fingerprint, warn_of_other_base
from lora_lightning.lora.formats.tensor_files import read_pickled, read_tensors
from lora_lightning.lora.frozen.tensors import adapter_tensors, get_module, named_modules, plain_state
from lora_lightning.lora.layers import LoRAConv1D, kind_of
from lora_lightning.lora.report import InjectionReport


def load_loralib(
    model: nn.Module,
    path: str | Path,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    enable_lora: Sequence[bool] | None = None,
    modules_to_save: list[str] | None = None,
    allow_other_base: bool = False,
) -> InjectionReport:
    """Adapt a plain `model` as in a loralib checkpoint and load it: `h = W0 x + (alpha / r) B A x`.

    `torch.save` or safetensors wrote the file, of `loralib.lora_state_dict(model, bias=...)` or of a whole
    `model.state_dict()`, bare or under `state_dict`, `model_state_dict` or `model`. Nothing but tensors is unpickled.
    loralib's `Conv2d` reshapes its product over the kernel; the same update is loaded as a convolution's A and B of a
    larger rank.

    Args:
        r, alpha: of the loralib layers; the file holds neither, and r is checked against the shapes.
        enable_lora: of every `MergedLinear`, such as `[True, False, True]` for query and value of a fused projection.
            Not needed where each part is adapted.
        modules_to_save: modules that trained in full beside A and B and are in the file, such as a head.
        allow_other_base: load A and B, with a warning, though the file holds other base weights than this model's.
            A file that does not hold the whole base is loaded with a warning.

    Raises:
        AdapterError: the file is torn, or holds more than tensors or numbers that are not finite; keys are missing,
            left over or wrongly shaped; r contradicts the shapes; W0 in the file is another, or merged; a convolution
            has groups, whose channels loralib's product runs across. The model is then unchanged.
    """
    refuse_meta(model)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise AdapterError(f"r must be a whole number of at least 1, got {r!r}")
    if isinstance(enable_lora, Mapping):
        raise AdapterError("enable_lora is one list for every MergedLinear, such as [True, False, True], got names")
    tensors = _read(Path(path), model)
    factors = _find_factors(tensors, model, r, enable_lora)
    rest = {key: tensor for key, tensor in tensors.items() if not key.endswith((".lora_A", ".lora_B"))}
    for name in (name for name, pair in factors.items() if pair.A.dim() == 4):  # which hold the plain one as `conv`
        rest = {re.sub(rf"^{re.escape(name)}\.conv\.", f"{name}.", key): tensor for key, tensor in rest.items()}
    saved = modules_to_save or []
    bias = _check_rest(rest, factors, saved, model, allow_other_base=allow_other_base)
    return inject_and_fill(
        model,
        f"the checkpoint {path}",
        lambda: exact_config(
            {name: pair.r for name, pair in factors.items()},
            {name: float(alpha) * pair.r / r for name, pair in factors.items()},
            {name: pair.slices for name, pair in factors.items() if pair.slices is not None},
            dropout=dropout,
            modules_to_save=saved or None,
            bias=bias,
        ),
        lambda: _our_tensors(model, factors, rest),
    )


def _read(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read the tensors, and remove a wrapper's prefix from their names."""
    wrappers = ("state_dict", "model_state_dict", "model")
    tensors = read_tensors(path)[0] if path.suffix == ".safetensors" else read_pickled(path, wrappers=wrappers)
    if any(".lora_A." in key or ".lora_embedding_A" in key for key in tensors):
        raise AdapterError(f"{path} is PEFT's, not loralib's: use load_adapter on the directory that it lies in")
    for wrapper in ("module.", "_orig_mod."):
        if all(key.startswith(wrapper) for key in tensors) and wrapper[:-1] not in get_module(model, "")._modules:
            tensors = {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}
    if not any(key.endswith("lora_A") for key in tensors):
        raise AdapterError(f"{path} has no key that ends in lora_A: it is no loralib checkpoint")
    refuse_not_finite(tensors)
    return tensors


class Factors(NamedTuple):
    """A and B of one module in our layer's layout."""

    A: Tensor
    B: Tensor
    r: int
    slices: dict[str, Any] | None = None
    """The adapted parts of a `MergedLinear`."""


def _find_factors(
    tensors: Mapping[str, Tensor], model: nn.Module, r: int, enable_lora: Sequence[bool] | None
) -> dict[str, Factors]:
    """A and B of every adapted module in our layout, in the file's order."""
    modules, factors = dict(named_modules(model)), dict[str, Factors]()
    names = list(dict.fromkeys(k.rpartition(".")[0] for k in tensors if k.endswith((".lora_A", ".lora_B"))))
    if unknown := [name for name in names if name not in modules]:
        missing = first_few([f"'{name}'" for name in unknown], 10)
        raise AdapterError(f"the model has no module {missing}{did_you_mean(unknown[0], modules)}")
    if lonely := [f"{n}.{x}" for n in names for x in ("lora_A", "lora_B") if f"{n}.{x}" not in tensors]:
        raise AdapterError(f"the checkpoint lacks {len(lonely)} tensors: {first_few(lonely, 10)}")
    for name in names:
        module, A, B = modules[name], tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        kind = kind_of(module)
        if A.dim() != 2 or B.dim() != 2:
            both = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise AdapterError(f"'{name}': lora_A and lora_B must be matrices, got {both}")
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            factors[name] = _conv_factors(name, module, A, B, r)
        elif isinstance(module, nn.Embedding):  # h = W0[x] + s B A[:, x] in both: A is (r, V), B is (d, r)
            _expect(name, A, B, (r, module.num_embeddings), (module.embedding_dim, r), r)
            if module.max_norm is not None:
                raise AdapterError(
                    f"'{name}' has max_norm, under which loralib rewrites A as it looks rows up: no form here"
                )
            factors[name] = Factors(A, B, r)
        elif kind is not None and kind.linear_like:
            out, width = module.get_parameter("weight").shape
            shape = (width, out) if kind is LoRAConv1D else (out, width)
            factors[name] = _linear_factors(name, shape, A, B, r, enable_lora)
        else:
            raise AdapterError(f"'{name}', a {type(module).__name__}, is of no kind that loralib adapts")
    return factors


def _linear_factors(
    name: str, shape: tuple[int, int], A: Tensor, B: Tensor, r: int, enabled: Sequence[bool] | None
) -> Factors:
    """`Linear`: A (r, in), B (out, r). `MergedLinear` of n parts, p of them adapted: A (p r, in), B (p out / n, r).

    The parts' A are stacked in order, and so are their B, as for `slices` here.
    """
    (out, width), rows, count = shape, B.shape[0], max(A.shape[0] // r, 1)
    _expect(name, A, B, (count * r, width), (rows, r), r)
    if count == 1 and rows == out:
        return Factors(A, B, r)
    total = out * count // rows if rows else 0
    if rows * total != out * count or rows % count or count > total:
        raise AdapterError(f"'{name}': lora_B of {rows} rows fits no {count} equal parts of {out} outputs")
    if enabled is None and count != total:
        example = [True] * (count - 1) + [False] * (total - count) + [True]
        raise AdapterError(
            f"'{name}' is a MergedLinear with {count} of {total} parts adapted, and the file does not say which: pass"
            f" enable_lora as the layer had it, such as {example}"
        )
    flags = list(enabled) if enabled is not None else [True] * total
    if len(flags) != total or sum(map(bool, flags)) != count:
        raise AdapterError(f"enable_lora: '{name}' has {count} of {total} parts adapted by its shapes, got {flags}")
    parts = ["q", "k", "v"] if total == 3 else [f"part{i}" for i in range(total)]
    return Factors(A, B, r, {"of": parts, "take": list(itertools.compress(parts, flags))})


def _conv_factors(name: str, module: nn.Module, A: Tensor, B: Tensor, r: int) -> Factors:
    """`Conv2d`: the update is `(B A).view(out, in, k, k)` of A (r k, in k) and B (out k, r k).

    The k rows of B A that make up an output channel are k segments of its kernel, one after the other. So A at each
    segment, zero elsewhere, and B's k rows side by side are a convolution's A (r k^2, in, k, k) and B (out, r k^2).
    """
    if not isinstance(module, nn.Conv2d):
        raise AdapterError(f"'{name}' is a {type(module).__name__}: in loralib only Conv2d can run")
    k, out, width = module.kernel_size[0], module.out_channels, module.in_channels
    if module.kernel_size != (k, k) or module.groups != 1:
        raise AdapterError(
            f"'{name}' has the kernel {module.kernel_size} and {module.groups} groups: loralib adapts square kernels,"
            " and under groups its update has no form here; merge it in loralib (model.eval()) and load it as W0"
        )
    _expect(name, A, B, (r * k, width * k), (out * k, r * k), r, k)
    placed = A.new_zeros(k, r * k, k, width * k)
    segments = torch.arange(k)
    placed[segments, :, segments] = A
    return Factors(placed.reshape(-1, width, k, k), B.reshape(out, r * k * k, 1, 1), r * k * k)


def _expect(
    name: str, A: Tensor, B: Tensor, shape_a: tuple[int, int], shape_b: tuple[int, int], r: int, k: int = 1
) -> None:
    """Raise an AdapterError unless B has the width r (times a kernel's side) and both have their shapes."""
    if B.shape[1] != r * k:
        raise AdapterError(f"'{name}': lora_B says r={B.shape[1] / k:g}, expected the r that was given, {r}")
    for what, tensor, shape in (("lora_A", A, shape_a), ("lora_B", B, shape_b)):
        if tuple(tensor.shape) != shape:
            raise AdapterError(f"'{name}.{what}' has shape {tuple(tensor.shape)}, expected {shape}")


def _check_rest(
    rest: Mapping[str, Tensor],
    factors: Mapping[str, Factors],
    saved: list[str],
    model: nn.Module,
    *,
    allow_other_base: bool,
) -> Bias:
    """Compare the file's base weights with W0 (an AdapterError where they differ); returns which biases trained."""
    state, rest = (
        {key: tensor for key, tensor in each.items() if not any(f".{name}." in f".{key}" for name in saved)}
        for each in (plain_state(model), rest)
    )
    if strangers := [key for key in rest if key not in state]:
        hint = did_you_mean(strangers[0], state)
        raise AdapterError(f"the checkpoint has {len(strangers)} keys left over: {first_few(strangers, 10)}{hint}")
    moved = [k for k, tensor in rest.items() if not torch.equal(tensor.to(state[k].dtype), state[k].cpu())]
    biases = [key for key in moved if key.rpartition(".")[2] == "bias" and isinstance(state[key], nn.Parameter)]
    others = [key for key in moved if key not in biases]
    if others and not allow_other_base:
        raise AdapterError(
            f"{len(others)} weights in the checkpoint are not this model's: {first_few(others, 10)}; it was saved in"
            " eval() mode, in which loralib folds the update into W0, or the base is another, or these were trained too"
            " (then name them in modules_to_save). Pass allow_other_base=True to put A and B on this model's weights"
        )
    if others:
        warn_of_other_base(f"{len(others)} weights in the checkpoint are not this model's: {first_few(others)}")
    if state.keys() - rest.keys():
        warn_of_no_fingerprint()
    if not biases:
        return "none"
    return "lora_only" if all(key.rpartition(".")[0] in factors for key in biases) else "all"


def _our_tensors(model: nn.Module, factors: Mapping[str, Factors], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = {f"{name}.lora_A": pair.A for name, pair in factors.items()}
    ours |= {f"{name}.lora_B": pair.B for name, pair in factors.items()}
    others = {key: tensor for key, tensor in adapter_tensors(model).items() if key not in ours}
    theirs = {key: key.replace(".lora_copy.", ".").replace(".lora_trained_bias", ".bias") for key in others}
    # loralib's `lora_only` leaves the biases of convolutions frozen.
    frozen = {f"{name}.bias" for name, pair in factors.items() if pair.A.dim() == 4}
    if missing := [key for key in theirs.values() if key not in rest and key not in frozen]:
        raise AdapterError(f"the checkpoint lacks {len(missing)} tensors: {first_few(missing, 10)}")
    return ours | {key: rest.get(theirs[key], tensor) for key, tensor in others.items()}
