"""A population: several fits over one W0 that take turns, each of which ends as it would alone."""

import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import timm
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import CausalLM, LoRAConfig, LoRAError, LoRAModule, LoRATrainer, Supervised, WarmupDecay
from lora_lightning.lora.frozen.quantization import hold_packing
from lora_lightning.lora.frozen.tensors import adapter_tensors, iter_base
from lora_lightning.training.checkpoints.resume import random_state, set_random_state
from lora_lightning.training.population.halving import Standing, choose_dropped, parse_rungs, replay, rung_steps
from lora_lightning.training.population.population import Halving, Interrupted, Population, copy_over_base
from lora_lightning.training.strategies.collectives import gather
from tests.factories import bert, llama
from tests.processes import in_processes
from tests.training.small import trainer_of
from tests.training.strategies import script

STEPS = 8


class Pooled(nn.Module):
    """A model of texts with a head: logits (n, 2) of token ids (n, length)."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).last_hidden_state.mean(1))


class Rows(LightningDataModule):
    """A few examples that a model can learn, shuffled by torch's own generator."""

    def __init__(self, make, rows=64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = make(rows, generator)
        self.rows = [(a, int(a.double().mean() > x.double().mean())) for a in x]

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=4)


def ids(rows, generator):
    return torch.randint(5, 30, (rows, 6), generator=generator)


def images(rows, generator):
    return torch.rand(rows, 3, 16, 16, generator=generator)


SIZES = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 2}
FAMILIES = {
    "bert": (lambda: Pooled(bert().bert, 16), ids),
    "llama": (lambda: Pooled(llama().model, 16), ids),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", **SIZES), images),
}


def family(name):
    make, data = FAMILIES[name]
    torch.manual_seed(0)
    return make().eval(), Rows(data)


def adam(lr):
    return functools.partial(torch.optim.AdamW, lr=lr)


ADAPTERS = {
    f"r={r}, lr={lr}": {
        "lora": LoRAConfig(r=r, dropout=0.1 if r > 1 else 0.0, modules_to_save=["head"]),
        "optimizer": adam(lr),
        "lr_scheduler": functools.partial(WarmupDecay, warmup=0.25),
    }
    for r in (1, 2, 4, 8)
    for lr in (1e-3, 1e-2)
}
HOT = {**ADAPTERS["r=8, lr=0.01"], "optimizer": adam(3.0)}
TASK = functools.partial(Supervised, loss=nn.CrossEntropyLoss())


def trainer(tmp_path, name, *callbacks, **options):
    given = {"max_epochs": -1, "max_steps": STEPS, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    given |= {"callbacks": list(callbacks), "enable_checkpointing": False, "limit_val_batches": 4} | options
    return trainer_of(tmp_path, LoRATrainer, **given)


def alone(backbone, data, options, tmp_path, **given):
    """The adapter that its own fit ends in."""
    module = LoRAModule(copy_over_base(backbone), TASK(), **options)
    trainer(tmp_path, "alone", **given).fit(module, datamodule=data)
    return {name: tensor.detach().clone() for name, tensor in adapter_tensors(module.backbone).items()}


def fitted(folder, backbone, data, adapters, *, make=None, halving=None, own=dict, **given):
    """A population after its fit. Each member that came to its end is in the bits in which its own fit ends.

    `own` makes options of one Trainer alone, such as a strategy.
    """
    start, make = random_state(), make or functools.partial(trainer, folder, **given)
    population = Population.of(backbone, TASK(), adapters, make, halving=halving)
    population.fit(data)
    for member in population.members:
        if member.state == "complete":
            set_random_state(start)
            wanted = alone(backbone, data, adapters[member.name], folder, **given, **own())
            got = adapter_tensors(member.module.backbone)
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[key], wanted[key]) for key in wanted), member.name
    return population


def states_of(population):
    return [member.state for member in population.members]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_of_eight_members_ends_in_the_bits_of_its_own_fit(name, tmp_path):
    """With dropout, clipping, accumulation, a warm-up and a head that trains in full."""
    assert states_of(fitted(tmp_path, *family(name), ADAPTERS)) == ["complete"] * 8


def quantized(backbone):
    """Its encoder's layers in 4 bit."""
    for parent in [module for name, module in backbone.body.encoder.named_modules() if "layer" in name]:
        for name, old in parent.named_children():
            if isinstance(old, nn.Linear):
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type="nf4")
                new.load_state_dict(old.state_dict())
                setattr(parent, name, new)
    hold_packing(backbone)
    return backbone.to("cpu")  # bitsandbytes quantizes on the way to a device


WAYS = {
    "bf16-mixed": ({"precision": "bf16-mixed"}, {}, {}),
    "bf16-base": ({"precision": "bf16-base"}, {}, {}),
    "bf16-base, DoRA": ({"precision": "bf16-base"}, {"use_dora": True}, {}),
    "nf4-base": ({"precision": "nf4-base"}, {}, {}),
    "recompute": ({}, {}, {"activation_checkpointing": True}),
}
"""Options of the Trainer, of LoRAConfig and of the module."""


@pytest.mark.parametrize("way", WAYS)
def test_it_ends_in_the_bits_of_its_own_fit_in_each_precision_and_under_recomputation(way, tmp_path):
    backbone, data = family("bert")
    backbone = quantized(backbone) if way == "nf4-base" else backbone
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in backbone.state_dict().items()}
    given, lora, own = WAYS[way]
    config = {"dropout": 0.1, "modules_to_save": ["head"], **lora}
    adapters = {f"r={r}": {**ADAPTERS["r=4, lr=0.01"], "lora": LoRAConfig(r=r, **config), **own} for r in (2, 8)}
    population = fitted(tmp_path, backbone, data, adapters, **given)
    assert states_of(population) == ["complete"] * 2, [member.reason for member in population.members]
    first, other = ([place.tensor for place in iter_base(member.module.backbone)] for member in population.members)
    assert all(one is its for one, its in zip(first, other, strict=True))
    after = backbone.state_dict()
    assert all(tensor.dtype == dtype and torch.equal(after[name], tensor) for name, (dtype, tensor) in before.items())


def ddp():
    return {"devices": 2, "strategy": DDPStrategy(broadcast_buffers=False, find_unused_parameters=True)}


def in_two(folder):
    """In each of two processes: of four members one fails, and one is dropped."""
    fails = "r=8, lr=0.001"
    adapters = {name: ADAPTERS[name] for name in ("r=1, lr=0.001", "r=2, lr=0.01", fails)} | {"hot": HOT}
    backbone, data = family("bert")
    halving = Halving(2, ["1/4", "1/2"], "val/loss", "min")

    def make(name):
        return trainer(folder, name, *([Spoil()] if name == fails else []), **ddp())

    population = fitted(folder, backbone, data, adapters, make=make, halving=halving, own=ddp)
    members = population.members
    assert sorted(states_of(population)) == ["complete", "complete", "dropped", "failed"]
    assert len(members[0].standing.values) == 4  # of the batches of one, for this data's loader gives all to both
    bases = [[id(place.tensor) for place in iter_base(member.module.backbone)] for member in members]
    assert all(base == bases[0] for base in bases)
    (gone,) = [member for member in members if member.state == "dropped"]
    (anew,) = trainer(folder, "anew", **ddp()).validate(gone.module, data, verbose=False)  # which divides the examples
    assert float(gone.trainer.callback_metrics["val/loss"]) == anew["val/loss"]
    left = [adapter_tensors(member.module.backbone) for member in members if member.state == "complete"]
    said = [states_of(population), population.decisions, [t.tolist() for own in left for t in own.values()]]
    assert len(set(gather(repr(said)))) == 1, "each process has another population"


def test_two_processes_end_each_member_in_the_bits_of_its_own_fit_there_and_drop_the_same(tmp_path):
    script("in_two", tmp_path, 2, "test_population")


def test_a_member_that_ends_takes_w0_from_nobody(tmp_path, monkeypatch):
    """Lightning moves a module to the CPU at a fit's end."""
    moved = []
    monkeypatch.setattr(LoRAModule, "cpu", lambda self: moved.append(self) or self)
    backbone, data = family("bert")
    adapters = dict(list(ADAPTERS.items())[:2])
    Population.of(backbone, TASK(), adapters, functools.partial(trainer, tmp_path)).fit(data)
    assert moved == []


class Interrupt(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_members_that_save_nothing_too(tmp_path):
    backbone, data = family("bert")
    adapters = dict(list(ADAPTERS.items())[:2])
    population = Population.of(backbone, TASK(), adapters, lambda name: trainer(tmp_path, name, Interrupt()))
    with pytest.raises(Interrupted, match="SIGINT"):
        population.fit(data)
    assert all(member.trainer.global_step < STEPS for member in population.members)


def test_halving_leaves_the_bits_of_those_who_go_on_and_the_figures_of_their_rung_to_the_dropped(tmp_path):
    """The evaluation at a rung moves neither random states nor modes."""
    backbone, data = family("bert")
    halving = Halving(2, ["1/4", "1/2"], "val/loss", "min")
    adapters = {**dict(list(ADAPTERS.items())[:3]), "hot": HOT}
    population = fitted(tmp_path, backbone, data, adapters, halving=halving, limit_val_batches=0.6)
    assert [decision["step"] for decision in population.decisions] == [2, 4]
    assert set(states_of(population)) == {"complete", "dropped"}
    for member in population.members:
        told = [member.name in decision["dropped"] for decision in population.decisions]
        assert any(told) == (member.state == "dropped") == (member.trainer.global_step < STEPS)
        if any(told):
            (anew,) = trainer(tmp_path, "anew", limit_val_batches=0.6).validate(member.module, data, verbose=False)
            assert float(member.trainer.callback_metrics["val/loss"]) == anew["val/loss"]
            assert anew["val/loss"] == pytest.approx(member.standing.value, rel=1e-6)


def test_weights_that_have_moved_since_their_rung_are_evaluated_anew():
    """As by a callback that validates an average of them."""
    backbone, data = family("bert")
    module = LoRAModule(backbone, TASK(), **ADAPTERS["r=1, lr=0.001"])
    batch = next(iter(data.val_dataloader()))
    known = module.task.evaluate(module.backbone, batch)
    replay(module, [dataclasses.replace(known, loss=torch.tensor(7.0))] * 2)
    assert module.task.evaluate(module.backbone, batch).loss == 7
    with torch.no_grad():
        next(p for p in module.parameters() if p.requires_grad).add_(1)
    assert module.task.evaluate(module.backbone, batch).loss != 7


def test_members_are_compared_by_a_figure_that_is_counted_from_something_else_than_predictions(tmp_path):
    backbone, data = llama().eval(), Rows(ids)
    data.rows = [{"input_ids": row, "labels": row} for row, _ in data.rows]
    halving = Halving(2, ["1/2"], "val/perplexity", "min")
    adapters = {name: {"lora": LoRAConfig(r=2), "optimizer": adam(lr)} for name, lr in (("a", 1e-3), ("b", 1e-1))}
    task = CausalLM()
    population = Population.of(backbone, task, adapters, functools.partial(trainer, tmp_path), halving=halving)
    population.fit(data)
    (decision,) = population.decisions
    assert decision["values"] == pytest.approx({name: math.exp(loss) for name, loss in decision["losses"].items()})
    assert decision["values"].keys() == {"a", "b"}


class Spoil(Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step == 3:
            raise LoRAError("the loss is not finite")


def test_what_ends_one_member_ends_that_one_alone(tmp_path):
    backbone, data = family("bert")
    names = list(ADAPTERS)[:3]

    def make(name):
        return trainer(tmp_path, name, *([Spoil()] if name == names[1] else []))

    population = fitted(tmp_path, backbone, data, {name: ADAPTERS[name] for name in names}, make=make)
    assert states_of(population) == ["complete", "failed", "complete"]
    assert "not finite" in population.members[1].reason


def test_members_of_different_bases_are_refused(tmp_path):
    backbone, _ = family("bert")
    population = Population.of(backbone, TASK(), dict(list(ADAPTERS.items())[:2]), functools.partial(trainer, tmp_path))
    other = copy_over_base(population.members[1].module.backbone)
    place = next(iter(iter_base(other)))
    place.module._parameters[place.key] = nn.Parameter(place.tensor + 1, requires_grad=False)
    population.members[1].module.backbone = other
    with pytest.raises(LoRAError, match=f"backbones differ, first in '{place.name}'"):
        Population(population.members)


def standings(**values):
    """Members whose metric is the mean of the given blocks, and whose loss follows it."""
    found = {}
    for name, blocks in values.items():
        without = [(sum(blocks) - one) / (len(blocks) - 1) for one in blocks]
        mean = sum(blocks) / len(blocks)
        found[name] = Standing(value=mean, loss=1 - mean, values=without, losses=[1 - one for one in without])
    return found


def test_who_is_clearly_behind_is_dropped_and_a_rung_that_cannot_tell_drops_nobody():
    found = standings(a=[0.9, 0.8, 0.9, 0.8], b=[0.8, 0.7, 0.8, 0.7], c=[0.2, 0.1, 0.2, 0.1], d=[0.3, 0.2, 0.3, 0.2])
    assert set(choose_dropped(found, 2, "max")) == {"c", "d"}
    assert set(choose_dropped(found, 2, "min")) == {"a", "b"}
    unknown = found | standings(a=[math.nan] * 4)  # such as the correlation of predictions that are all one
    assert set(choose_dropped(unknown, 2, "max")) == {"a", "c"}
    assert choose_dropped(standings(a=[0.9, 0.1, 0.8, 0.2], b=[0.1, 0.9, 0.2, 0.79]), 1, "max") == {}


def test_where_the_metric_ties_the_loss_decides():
    """All at the majority's share: the members are told apart by their losses, and where these tie too, not at all."""
    tied = standings(a=[0.6, 0.5], b=[0.6, 0.5], c=[0.6, 0.5])
    assert choose_dropped(tied, 1, "max") == {}
    behind = Standing(value=tied["c"].value, loss=0.9, values=tied["c"].values, losses=[0.91, 0.89])
    assert set(choose_dropped({**tied, "c": behind}, 2, "max")) == {"c"}


def test_the_standard_error_is_that_of_the_paired_difference():
    """Of means over blocks of one size the jackknife is the classical error of a mean."""
    a, b = [0.9, 0.7, 0.8, 0.6, 0.95], [0.5, 0.6, 0.4, 0.3, 0.7]
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(differences) / 5
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 4 / 5)
    assert f"standard error {error:.4f}" in choose_dropped(standings(a=a, b=b), 1, "max")["b"]


def test_rungs_are_ascending_shares_and_each_has_a_step():
    for texts in (["0"], ["1"], ["1/2", "1/4"], ["half"], []):
        with pytest.raises(LoRAError, match="ascending shares"):
            parse_rungs(texts)
    rungs = parse_rungs(["1/8", "1/4", "1/2"])
    assert rung_steps(rungs, 96) == [12, 24, 48]
    for steps in (1, float("inf")):
        with pytest.raises(LoRAError, match="step for each of the rungs"):
            rung_steps(rungs, steps)


HEAP = """
import resource
import torch
from lora_lightning.training.checkpoints.resume import random_state
from lora_lightning.training.population.population import Turns

def fit(number):
    for _ in range(3):
        kept = [torch.ones(50_000) for _ in range(500)]
        del kept
        fits[number].pause()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before, fits = peak(), []
for number in range(6):
    fits.append(Turns(lambda number=number: fit(number), random_state()))
while waiting := [one for one in fits if not one.is_over]:
    for one in waiting:
        one.resume()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no heap for each thread")
def test_fits_that_take_turns_need_the_memory_of_one():
    """Each has 100 MB while it is its turn; what one has freed the next takes."""
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 250


if __name__ == "__main__":
    sys.exit(max(map(abs, in_processes(2, in_two, Path(sys.argv[2]), timeout=400))))
