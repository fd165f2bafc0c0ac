"""The laws of design.md, asked of every kind, option and dtype of `kinds.py`; families are in `test_families.py`."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import LoRAConfig, inject, merge
from lora_lightning.lora.inject import adapted_layers
from tests.lora.kinds import CASES, KINDS, batches, fields_of, square_loss
from tests.lora.laws import DTYPES, check_laws, check_meta, check_peft_opens_ours, check_we_open_pefts, relative, stir

FROM_DATA = {"eva", "lora_ga"}


def each(cases):
    return pytest.mark.parametrize(("kind", "option"), cases, ids=[", ".join(case) for case in cases])


def data_of(option):
    return (lambda dtype: {"data": batches(dtype), "loss": square_loss}) if option in FROM_DATA else None


def in_pairs(kind, option, dtype):
    """Every kind plain and every option of Linear in every dtype; the other pairs in the widest and the narrowest."""
    if dtype == torch.float64 and kind.endswith("_mm"):
        return False  # torch's grouped products have none
    return option == "plain" or kind == "Linear" or dtype != torch.float32


LAWS = [pytest.param(*case, d, id=f"{', '.join(case)}, {d}") for case in CASES for d in DTYPES if in_pairs(*case, d)]


@pytest.mark.parametrize(("kind", "option", "dtype"), LAWS)
def test_laws(kind, option, dtype, tmp_path):
    entry = KINDS[kind]
    check_laws(entry.make, entry.run, LoRAConfig(**fields_of(kind, option)), dtype, tmp_path, data=data_of(option))


@each([(kind, option) for kind, option in CASES if KINDS[kind].meta and option not in FROM_DATA])
def test_injection_on_the_meta_device_allocates_nothing_and_starts_when_filled(kind, option):
    check_meta(KINDS[kind].make, KINDS[kind].run, LoRAConfig(**fields_of(kind, option)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@each([case for case in CASES if KINDS[case[0]].peft])
def test_peft_opens_ours(kind, option, tmp_path):
    entry = KINDS[kind]
    check_peft_opens_ours(entry.make, entry.run, LoRAConfig(**fields_of(kind, option)), tmp_path, data=data_of(option))


PEFTS = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
NOT_PEFTS = FROM_DATA | {"dropout_pattern", "kaiming", "patterns"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@each([(k, o) for k, o in CASES if KINDS[k].peft == "both" and o not in NOT_PEFTS])
def test_we_open_pefts(kind, option, tmp_path):
    fields = {"target_modules": ["up", "down", "square"], **fields_of(kind, option)}
    fields["target_modules"] = [n for n in fields["target_modules"] if n not in fields.get("exclude_modules", [])]
    fields.pop("init", None)  # the saved tensors are an adapter's whatever they started from
    theirs = {PEFTS.get(name, name): value for name, value in fields.items()}
    chosen = peft.LoraConfig(**theirs, fan_in_fan_out=kind == "Conv1D")
    check_we_open_pefts(KINDS[kind].make, KINDS[kind].run, chosen, tmp_path)


# The formula, written out a second time and with no code of the package.


def rows_of(spec, part, out):
    """The rows of a part of a fused weight, counted one by one."""
    names, heads = spec["of"], spec.get("heads", 1)
    sizes = spec.get("sizes") or [out // heads // len(names)] * len(names)
    owner = [name for _ in range(heads) for name, size in zip(names, sizes, strict=True) for _ in range(size)]
    return [i for i, name in enumerate(owner) if name == part]


def updates(module, key, A, B, r, spec):
    """By the name of a weight: B A of `module`, whose adapter is called `key`."""
    if isinstance(module, nn.MultiheadAttention):
        if not spec and module._qkv_same_embed_dim:
            return {"in_proj_weight": B @ A}
        parts, width = [part for part in "qkv" if part in (spec or "qkv")], module.embed_dim
        sides = {"q": width, "k": module.kdim, "v": module.vdim}
        pairs = zip(B.split(width), A.split([sides[part] for part in parts], dim=1), strict=True)
        found = {part: b @ a for part, (b, a) in zip(parts, pairs, strict=True)}
        if not module._qkv_same_embed_dim:
            return {f"{part}_proj_weight": update for part, update in found.items()}
        return {"in_proj_weight": torch.cat([found.get(part, torch.zeros(width, width).to(A)) for part in "qkv"])}
    weight = getattr(module, key)
    if isinstance(module, nn.modules.conv._ConvNd):  # group g's outputs see group g's factors alone
        pairs = zip(A.chunk(module.groups), B.flatten(1).chunk(module.groups), strict=True)
        return {key: torch.cat([torch.einsum("or,r...->o...", b, a) for a, b in pairs])}
    if weight.dim() == 3:  # a stack: expert e has column e of each of r blocks
        count, transposed = len(weight), module.is_transposed
        parts = [sum(torch.outer(B[:, i * count + e], A[e * r + i]) for i in range(r)) for e in range(count)]
        return {key: torch.stack([part.T if transposed else part for part in parts])}
    if spec:
        flat = weight.T if isinstance(module, Conv1D) else weight
        update, row = torch.zeros_like(flat), 0
        for i, part in enumerate(name for name in spec["of"] if name in spec["take"]):
            rows = rows_of(spec, part, len(flat))
            b, row = B[row : row + len(rows)], row + len(rows)
            update = update.index_add(0, torch.tensor(rows), b @ A[r * i : r * (i + 1)])
        return {key: update.T if isinstance(module, Conv1D) else update}
    return {key: (B @ A).T if isinstance(module, nn.Embedding | Conv1D) else B @ A}


def directed(weight, module, magnitude):
    """DoRA's `m W / ||W||`, by output channels, the norm a constant (arXiv 2402.09353)."""
    by_channel = (lambda w: w.transpose(0, 1)) if isinstance(module, nn.Embedding | Conv1D) else (lambda w: w)
    moved = by_channel(weight)
    each = magnitude / moved.detach().flatten(1).norm(dim=1)
    return by_channel(moved * each.view(-1, *[1] * (moved.dim() - 1)))


FORMULA = ("plain", "rslora", "patterns", "dora", "dora-rslora")


@each([(k, o) for k, o in CASES if KINDS[k].formula and o in FORMULA])
def test_output_gradients_and_merged_weights_are_the_formulas(kind, option):
    entry, fields = KINDS[kind], fields_of(kind, option)
    plain = entry.make().double().eval().requires_grad_(False)
    model = copy.deepcopy(plain)
    injected = inject(model, LoRAConfig(**fields))
    stir(model)
    weights, ours, leaves = {}, [], []
    for name, layer in adapted_layers(model):
        owner, _, end = name.rpartition(".")
        key = end.removeprefix("lora_of_")
        if key == end:
            owner, key = name, "weight"
        module = plain.get_submodule(owner)
        r = fields.get("rank_pattern", {}).get(end.removeprefix("lora_of_"), fields["r"])
        alpha = fields.get("alpha_pattern", {}).get(end, fields["alpha"])
        trained = [layer.lora_A, layer.lora_B, *([layer.lora_magnitude_vector] if fields.get("use_dora") else [])]
        A, B, *magnitude = copies = [t.detach().clone().requires_grad_() for t in trained]
        spec = fields.get("slices", {}).get(name)
        for part, update in updates(module, key, A, B, r, spec).items():
            full = f"{owner}.{part}" if owner else part
            weights[full] = getattr(module, part) + alpha / (r**0.5 if fields.get("use_rslora") else r) * update
            if magnitude:
                weights[full] = directed(weights[full], module, *magnitude)
        ours += trained
        leaves += copies
    with_weights = copy.deepcopy(plain)
    with_weights.register_parameter("of_that_dtype", nn.Parameter(torch.zeros(1).double()))
    for name, weight in weights.items():
        owner, _, key = name.rpartition(".")
        delattr(with_weights.get_submodule(owner), key)
        setattr(with_weights.get_submodule(owner), key, weight)
    got, wanted = entry.run(model), entry.run(with_weights)
    assert relative(got, wanted) < 1e-12
    assert relative(got, entry.run(plain)) > 1e-3
    up = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad((wanted * up).sum(), leaves)
    for one, other in zip(torch.autograd.grad((got * up).sum(), ours), wanted_grads, strict=True):
        assert relative(one, other) < 1e-11
    report = merge(model)
    for name, weight in weights.items():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-13, atol=1e-13, check_stride=False)
    assert report.kept.keys() == {row.module for row in injected.modules}
    assert min(report.kept.values()) > 1 - 1e-12
