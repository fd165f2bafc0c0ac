"""Fits under tensor parallelism. Run in several processes as `python -m tests.training.split WHAT FOLDER PROCESSES`."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from lora_lightning import CausalLM, LoRAConfig, LoRAError, LoRAModule, huggingface, inject
from lora_lightning.lora.frozen.fingerprint import fingerprint as of_one
from lora_lightning.lora.frozen.tensors import base_tensors
from lora_lightning.lora.inject import disabled
from lora_lightning.training import trainer as lightning_trainer
from lora_lightning.training.callbacks import PredictionWriter, RankTelemetry, RunReport
from lora_lightning.training.distributed import gathered
from lora_lightning.training.strategies import fingerprint as sharded_w0
from lora_lightning.training.strategies.fsdp2 import FSDP2Strategy
from lora_lightning.training.strategies.wrapping import as_stored, shard
from lora_lightning.training.tensor_parallel import TensorParallel
from lora_lightning.training.tensor_plan import plan_of
from lora_lightning.training.tensor_refusals import refuse
from tests.processes import in_processes
from tests.tiny_lm import make_model
from tests.training import ragged, sharded
from tests.training.ragged import VOCABULARY
from tests.training.sharded import Told

PLAN = {"*.up": "colwise", "*.down": "rowwise"}


class Block(nn.Module):
    """A norm and two layers around it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


class Net(nn.Module):
    """A user's own, which no plan of transformers fits. Its widths are those of no multiple of four processes."""

    def __init__(self, width: int = 10, inner: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width, inner) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def module(dtype: torch.dtype = torch.float64, activation_checkpointing: bool = False, **config: Any) -> LoRAModule:
    torch.manual_seed(0)
    more = {"activation_checkpointing": activation_checkpointing}
    lora = LoRAConfig(**{"r": 3, "alpha": 6, "target_modules": ["up", "down"], "modules_to_save": ["norm"]} | config)
    return LoRAModule(Net().to(dtype), Told(), lora, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02), **more)


FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "mistral", "phi3")


def language_model(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny one with random weights, of four heads that share two keys."""
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "num_attention_heads": 4, "head_dim": 4}
    made: PreTrainedModel = make_model(family, **sizes, initializer_range=0.5 if dtype == torch.float64 else 0.02)
    return exact(made.double()) if dtype == torch.float64 else made.to(dtype)


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """With norms that compute in the dtype of the model, and not in float32."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        eps = norm.eps if "Gemma" in type(norm).__name__ else norm.variance_epsilon
        weight = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = functools.partial(forward, norm)
    return model


def of_family(
    family: str, dtype: torch.dtype = torch.float64, optimizer: Any = None, heads: Sequence[str] = ()
) -> LoRAModule:
    lora = LoRAConfig(r=4, modules_to_save=list(heads))
    chosen = optimizer or (lambda p: torch.optim.AdamW(p, lr=0.02))
    return LoRAModule(language_model(family, dtype), CausalLM(), lora, optimizer=chosen)


# Pieces alone, in float64.

IDS = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
Case = tuple[Callable[[], nn.Module], dict[str, Any], dict[str, str] | None]
CASES: dict[str, Case] = {
    "plain": (Net, {"r": 3}, PLAN),
    "rank-stabilised": (Net, {"r": 3, "use_rslora": True}, PLAN),
    "a bias of B": (Net, {"r": 3, "lora_bias": True}, PLAN),
    "biases": (Net, {"r": 3, "bias": "lora_only"}, PLAN),
    "copies": (Net, {"r": 3, "modules_to_save": ["norm", "head"]}, PLAN),
    "whole on the outside": (Net, {"r": 3}, {"*.up": "colwise_rep", "*.down": "rowwise_rep"}),
    "one layer of two": (Net, {"r": 3}, {"*.up": "colwise_gather_output"}),
    "a head and the rest": (Net, {"r": 3, "target_modules": ["head", "up"]}, PLAN),
    "no adapter in some": (Net, {"r": 3, "target_modules": ["layers.0.up", "layers.1.down"]}, PLAN),
    "dropout": (Net, {"r": 3, "dropout": 0.3}, PLAN),
    **{family: (functools.partial(language_model, family), {"r": 3}, None) for family in FAMILIES},
    "with a head": (functools.partial(language_model, "llama"), {"r": 3}, {"lm_head": "replicate"}),
}


def made(case: Case) -> nn.Module:
    """Injected, with a B that is not zero."""
    build, config, _ = case
    torch.manual_seed(3)
    model = build().double()
    inject(model, LoRAConfig(**config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def stepped(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Outputs in training and in evaluation, and the gradients of two steps together."""
    found = {}
    for step in range(2):
        torch.manual_seed(step)
        out = model(ids)
        out = out if isinstance(out, Tensor) else out.logits
        found[f"out {step}"] = out.detach()
        out.square().mean().backward()
    model.eval()
    with torch.no_grad():
        out = model(ids)
        found["eval"] = out if isinstance(out, Tensor) else out.logits
    model.reshard() if hasattr(model, "reshard") else None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = ragged.whole(parameter.grad)
    return found


def split(model: nn.Module, own: dict[str, str] | None, groups: int = 1) -> None:
    count = distributed.get_world_size() // groups
    mesh = init_device_mesh("cpu", (groups, count), mesh_dim_names=("data_parallel", "tensor_parallel"))
    plan = plan_of(model, own)
    refuse(model, plan, count)
    splitting = TensorParallel(model, plan, mesh["tensor_parallel"])
    shard(model, mesh["data_parallel"], torch.device("cpu"), split=splitting.split)


def far(want: Tensor, got: Tensor) -> float:
    """The largest difference, of the largest number."""
    assert want.shape == got.shape, (want.shape, got.shape)
    return float((want - got).abs().max() / want.abs().max().clamp(min=1e-30))


def pieces(case: Case, groups: int) -> dict[str, Any]:
    """How far outputs and gradients are from one process's, and what the parts say of W0."""
    alone, model = made(case), made(case)
    want = stepped(alone, IDS)
    if distributed.get_rank():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data + 1  # rank 0's are taken
    split(model, case[2], groups)
    with as_stored(model):
        model._get_fsdp_state()._lazy_init()
    got = stepped(model, IDS)
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    found: dict[str, Any] = {name: far(want[name], got[name]) for name in want}
    found = {"far": max(found.values()), "farthest": max(found, key=lambda name: found[name])}
    found["fingerprint"] = sharded_w0.fingerprint(model) == of_one(made(case))
    before = sharded_w0.of_own_parts(model)
    name, tensor = next((n, t) for n, t in base_tensors(model).items() if isinstance(t, DTensor) and t.ndim == 2)
    if distributed.get_rank() == 1:
        tensor.to_local().view(-1)[0] += 1
    found["moved"] = name in sharded_w0.moved(before, sharded_w0.of_own_parts(model))
    return found


def fresh(case: Case) -> bool:
    """Law 1: whether a fresh adapter gives the split model's own outputs, bit for bit."""
    build, config, own = case
    torch.manual_seed(3)
    model = build().double()
    inject(model, LoRAConfig(**config))
    split(model, own)
    model._get_fsdp_state()._lazy_init()
    outs = []
    with torch.no_grad():
        for off in (nullcontext(), disabled(model)):
            with off:
                out = model(IDS)
                outs.append(out if isinstance(out, Tensor) else out.logits)
    return torch.equal(*outs)


def alone(folder: Path, processes: int, groups: int = 1) -> None:
    """All cases."""
    rank = int(os.environ["LOCAL_RANK"])
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", rank=rank, world_size=processes)
    found: dict[str, Any] = {name: pieces(case, groups) for name, case in CASES.items()}
    if groups == 1:
        found["fresh"] = {name: fresh(CASES[name]) for name in ("a bias of B", "copies", "llama", "phi3")}
    every = gathered(found)
    if rank == 0:
        torch.save(every, folder / "pieces.pt")
    distributed.destroy_process_group()


def alone_in_groups(folder: Path, processes: int) -> None:
    alone(folder, processes, 2)


# Whole fits.


def strategy(**options: Any) -> FSDP2Strategy:
    return FSDP2Strategy(tensor_parallel_size=2, **{"tensor_parallel_plan": PLAN} | options)


SGD = functools.partial(torch.optim.SGD, lr=0.2)
"""For float32: AdamW makes steps of the size of lr out of gradients that are rounding."""
QUICK = ("accumulate 3", "recomputed", "qwen3", "llama in float32")
"""Of the fits."""


FITS = ("accumulate 1", "dropout", "trained head", *QUICK, *(family for family in FAMILIES if family not in QUICK))


class Seeded(Callback):
    """Draws alike, whatever was drawn while the model was laid out."""

    def on_train_start(self, *_: Any) -> None:
        torch.manual_seed(5)


class Drawn(Callback):
    """A number that was drawn when training began."""

    numbers: Any = None

    def on_train_start(self, *_: Any) -> None:
        self.numbers = float(torch.rand(()))


def fit(name: str, batch: int, **options: Any) -> dict[str, Any]:
    """Train for 20 steps or more, with the trainer's options."""
    if name.startswith("accumulate"):
        return ragged.fit(batch, made=module(), accumulate_grad_batches=int(name[-1]), **options)
    if name in ("dropout", "recomputed"):
        made = module(activation_checkpointing=name == "recomputed", dropout=0.2)
        return ragged.fit(batch, Seeded(), made=made, max_steps=20, **options)
    if name == "trained head":
        of_name = of_family("llama", heads=["lm_head"])
    else:
        of_name = of_family("llama", torch.float32, SGD) if name == "llama in float32" else of_family(name)
    return ragged.fit(0, made=of_name, data=sharded.Sentences(batch), max_steps=20, **options)


def equality(folder: Path, processes: int, names: Sequence[str] = FITS) -> None:
    """The same fits as one process's, whose batches are as large as those of all readers together."""
    alike = []
    for name in names:
        split = strategy(
            tensor_parallel_plan=PLAN if name in ("accumulate 1", "accumulate 3", "dropout", "recomputed") else None
        )
        found = fit(name, 8 // processes, file=folder / f"{name}.pt", strategy=split, devices=processes)
        held = gathered(found["adapter"])
        alike.append(all(torch.equal(one[key], held[0][key]) for one in held for key in one))
    if int(os.environ["LOCAL_RANK"]) == 0:
        torch.save(alike, folder / "alike.pt")


# A run's life.


def trained(**config: Any) -> LoRAModule:
    return module(torch.float32, **{"dropout": 0.2} | config)


def life(folder: Path, processes: int) -> None:
    """All that happens to a run, in both forms of checkpoints; process 0 writes down what was found."""
    with pytest.MonkeyPatch.context() as patch:
        # It ends the processes that fail together, and these are to tell what each of them met.
        patch.setattr(lightning_trainer, "ending_together", lambda *_, **__: nullcontext())
        _life(folder, functools.partial(sharded.fit, made=trained, devices=processes), processes)


def _life(folder: Path, fit: Callable[..., Any], processes: int) -> None:
    found: dict[str, Any] = {}
    for form in ("file", "folder"):
        new = functools.partial(strategy, save_distributed_checkpoint=form == "folder")
        first = fit(folder / form, PredictionWriter(), strategy=new())
        found[f"{form} whole"] = sharded.ended(first)
        found[f"{form} figures"] = figures(first, sharded.at(folder / form, 9))
        for step in (9, 14) if form == "file" else (9,):  # in an epoch's middle and at an end
            again = fit(folder / f"{form} {step}", ckpt=sharded.at(folder / form, step), strategy=new())
            found[f"{form} from {step}"] = sharded.ended(again)
    one = fit(folder / "of one", ckpt=folder / "one.ckpt", strategy=strategy())
    found["of one process"] = sharded.ended(one)
    callbacks, half = (RankTelemetry(), RunReport()), {"precision": "bf16-mixed", "max_steps": 2}
    fit(folder / "bf16", *callbacks, strategy=strategy(), **half)
    for what in ("w0", "loss"):
        found[f"stopped by {what}"] = sharded.stopped(folder / what, what, strategy(), processes, made=trained)
    if first.is_global_zero:
        torch.save(found, folder / "found.pt")


def figures(trainer: Any, checkpoint: Path) -> dict[str, Any]:
    """Metrics of a test and a validation from a checkpoint, and this process's predictions."""
    given: Any = {"datamodule": sharded.Shuffled(), "ckpt_path": str(checkpoint)}
    module = trainer.lightning_module
    found = {**trainer.test(module, verbose=False, **given)[0], **trainer.validate(module, verbose=False, **given)[0]}
    predicted = trainer.predict(module, **given)
    return {**found, "predicted": torch.cat([batch["logits"] for batch in predicted])}


def from_files(folder: Path, processes: int) -> None:
    """A fit on a base that is filled after it was split, and on one that was loaded before: fingerprint and adapter."""
    found = []
    for on_meta in (True, False):
        base = huggingface(str(folder / "base"), auto_class="AutoModelForCausalLM", on_meta=on_meta)
        torch.manual_seed(0)
        made = LoRAModule(base, CausalLM(), LoRAConfig(r=4), optimizer=SGD)
        many = {"strategy": strategy(tensor_parallel_plan=None), "devices": processes, "max_steps": 3}
        rank, drawn = int(os.environ["LOCAL_RANK"]), Drawn()
        torch.manual_seed(rank)
        fitted = ragged.fit(0, drawn, made=made, data=sharded.Sentences(4), **many)
        found.append((made.w0_fingerprint().digest, fitted["adapter"]))
        drawn.numbers = gathered(drawn.numbers)
    counted = made.task.losses["val_"]
    assert isinstance(counted, MeanMetric)
    further = copy.deepcopy(counted)  # as of a second set
    further.reset()
    further.update(1.0, 3)
    with further.sync_context(dist_sync_fn=further.dist_sync_fn):
        units = float(further.weight)
    if rank == 0:
        torch.save([*found, {"drawn": drawn.numbers, "units": units}], folder / "from files.pt")


def past(folder: Path, processes: int) -> None:
    """What is said where the head alone trains."""
    made = LoRAModule(language_model("llama", torch.float32), CausalLM(), LoRAConfig(r=4, target_modules=["lm_head"]))
    many = {"strategy": strategy(tensor_parallel_plan=None), "devices": processes, "max_steps": 1}
    with pytest.raises(LoRAError) as refused:
        ragged.fit(0, made=made, data=sharded.Sentences(4), **many)
    if int(os.environ["LOCAL_RANK"]) == 0:
        torch.save(str(refused.value), folder / "past.pt")


def quick(folder: Path, processes: int) -> None:
    """All that two processes show soon, after one import."""
    past(folder, processes)
    equality(folder, processes, QUICK)
    from_files(folder, processes)
    alone(folder, processes)


if __name__ == "__main__":
    what, where, number = sys.argv[1:]
    limit = float(os.environ.get("LIMIT", "240"))
    sys.exit(max(map(abs, in_processes(int(number), globals()[what], Path(where), int(number), timeout=limit))))
