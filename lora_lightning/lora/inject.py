"""Put adapters into a model, switch them off for a while, and give the model back without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.quantization import allow_packing, hold_packing
from lora_lightning.lora.frozen.tensors import named_modules
from lora_lightning.lora.init.from_data import Loss, init_from_data, refuse_data
from lora_lightning.lora.layers import AdaptedLayer, Grafted, SavedCopy, TokenRows, TrainedBias, graft, take_out
from lora_lightning.lora.layers.attention import hold_kernels_off
from lora_lightning.lora.layers.trained.frozen_norm import FrozenStatistics
from lora_lightning.lora.report import AdaptedModule, InjectionReport, warn_of_stacks
from lora_lightning.lora.targets.conflicts import refuse_one_place, refuse_shared_weights
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.lora.targets.select import Selection, Target, select

Kind = TypeVar("Kind", bound=Grafted)


def inject(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    data: Any = None,
    loss: Loss | None = None,
    run_init: bool = True,
    any_rank: bool = False,
) -> InjectionReport:
    """Adapt `model` in place: `h = W0 x + s B A x` in every selected layer, all else frozen.

    Only A and B (and copies of `modules_to_save`) are allocated; every key, hook, mode and reference of the
    model survives, and its output does not change until B moves (but for `init: loftq`, which is there to
    change it). Works on the meta device.

    Args:
        data: what the inits eva and lora_ga measure (batches: a mapping or a list is unpacked into the model's
            arguments) or what loftq approximates (the model before quantization or its state dict).
        loss: a function of (model, batch) for lora_ga, where the model returns no loss itself.
        run_init: False where an adapter's tensors will be loaded next: A and B are then random, without the cost or
            the data of `config.init`.
        any_rank: allow an r above the smaller side of a weight, and `lora_bias` on a layer without a bias, which no
            merge can fold: for an adapter that was trained elsewhere.

    Raises:
        TargetError: the config does not fit this model; the model is then unchanged.
        LoRAError: the model is adapted already, or the init lacks its data; the model is then unchanged.
    """
    config = config or LoRAConfig()
    if not isinstance(model, nn.Module):
        raise LoRAError(f"inject expects an nn.Module, got {type(model).__name__}")
    modules = list(model.modules())
    if any(isinstance(module, Grafted) for module in modules):
        raise LoRAError("this model is adapted already: merge(model) or remove(model) first")
    if kind := next((type(m).__name__ for m in modules if "lora_A" in m._parameters or "lora_A" in m._modules), None):
        raise LoRAError(f"this model has LoRA layers of another library ({kind}): load its plain form")
    if run_init:
        refuse_data(config.init, data)
    selection = select(model, config, any_rank=any_rank)
    refuse_shared_weights(selection)
    refuse_one_place(model, selection)
    if not any_rank:
        warn_of_stacks(model, selection.skipped)
    trained_before = [p for module in modules for p in module._parameters.values() if p is not None and p.requires_grad]
    try:
        for parameter in trained_before:
            parameter.requires_grad_(False)
        rows = _graft_all(model, selection, run_init=run_init)
        if data is not None and run_init:
            init_from_data(model, adapted_layers(model), config.init, data, loss)
        copies: dict[int, nn.Parameter] = {}
        for module in selection.biases:  # last, so that its class is the outermost one
            TrainedBias.attach(module, copies)
        guard_saving(model, is_adapted=True)
        return InjectionReport.of_model(model, rows, selection.skipped)
    except BaseException:
        remove(model)
        for parameter in trained_before:
            parameter.requires_grad_(True)
        raise


_SAVING = (
    "save_pretrained would write W0 with stray lora_ keys that nothing opens: save_adapter(model, directory) writes"
    " the adapter, and merge(model) makes a model that save_pretrained writes"
)
_RESIZING = (
    "resize_token_embeddings would drop what is trained of the embedding or the output head: resize the plain"
    " model, then inject(model, config)"
)


def guard_saving(model: nn.Module, *, is_adapted: bool) -> None:
    """Make `save_pretrained` of the transformers models in `model` raise while there is an adapter.

    So does `resize_token_embeddings` where something of the embedding or the output head is trained: it would put a
    plain layer in its place, or resize W0 without the adapter. Both are replaced on the instance: transformers
    looks up settings by a model's class, which must not change.
    """
    for module in model.modules():
        if is_a(module, HF_MODEL):
            for name, message in (("save_pretrained", _SAVING), ("resize_token_embeddings", _RESIZING)):
                module.__dict__.pop(name, None)
                if is_adapted and (message is _SAVING or _resizes_adapter(module)):
                    module.__dict__[name] = partial(_refuse, message)


def _resizes_adapter(model: Any) -> bool:
    """Whether a transformers model's embedding or output head is adapted, or trains in full or in some rows."""
    try:
        tables = {model.get_input_embeddings(), model.get_output_embeddings()}
    except NotImplementedError:  # a model without tokens
        return False
    trained = [module for module in model.modules() if isinstance(module, AdaptedLayer | SavedCopy | TokenRows)]
    return any(tables.intersection(module.modules()) for module in trained)


def _refuse(message: str, *args: Any, **kwargs: Any) -> None:
    raise LoRAError(message)


def _graft_all(model: nn.Module, selection: Selection, *, run_init: bool) -> list[AdaptedModule]:
    hold_packing(model)
    rows = [_adapt(target, run_init=run_init) for target in selection.targets]
    for token in selection.tokens:
        TokenRows.attach(token.module, token.token_ids, token.tied)
    twins: dict[int, Any] = {}  # shared, so that tied modules get tied copies
    for _, module in selection.saved:
        SavedCopy.attach(module, twins)
    inside_saved = {m for _, saved in selection.saved for m in saved.modules()}
    modules = list(model.modules())
    for module in modules:
        if FrozenStatistics.is_needed(module) and module not in inside_saved:
            graft(module, FrozenStatistics)
    hold_kernels_off(modules, [t.module for t in selection.targets] + [module for _, module in selection.saved])
    return rows


def remove(model: nn.Module) -> nn.Module:
    """Take the adapters out in place: the plain model with W0, its classes and keys as before `inject`.

    Parameters stay frozen. Returns the model.
    """
    for _, module in grafted_modules(model):
        take_out(module)
    allow_packing(model)
    guard_saving(model, is_adapted=False)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes as before `inject`: a reference model that costs no memory."""
    with ExitStack() as switches:
        for module in model.modules():
            if isinstance(module, Grafted):
                switches.enter_context(module.lora_disabled())
        yield


def grafted_modules(model: nn.Module) -> list[tuple[str, Grafted]]:
    """Every module onto which a class was grafted, with its full name, once each."""
    return modules_of_kind(model, Grafted)


def modules_of_kind(model: nn.Module, kind: type[Kind]) -> list[tuple[str, Kind]]:
    """Every module of this class, with its full name, once each."""
    return [(name, module) for name, module in named_modules(model) if isinstance(module, kind)]


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """Every layer with A and B, with its full name, once each."""
    return modules_of_kind(model, AdaptedLayer)


def _adapt(target: Target, *, run_init: bool) -> AdaptedModule:
    layer, parts = target.kind.attach(target.module, target.settings), target.settings.slices
    layer.reset_lora_parameters(from_w0=run_init)
    return AdaptedModule(
        module=target.name,
        kind=layer.kind if parts is None else f"{layer.kind}[{', '.join(parts.taken)}]",
        r=target.settings.r,
        alpha=target.settings.alpha,
        dropout=target.settings.dropout,
        parameters=sum(t.numel() for t in layer.lora_tensors().values() if t.requires_grad),
        why=target.why,
    )
