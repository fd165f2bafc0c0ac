"""FSDP1's units beside the model in one piece, bit for bit, and fits under it.

Run in several processes as `python -m tests.training.units WHAT FOLDER PROCESSES`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed, nn
from transformers import T5Config, T5ForConditionalGeneration

from lora_lightning import ExportAtEnd, FSDP1Strategy, LoRAConfig, LoRAModule, RunReport, inject
from lora_lightning.lora.frozen.fingerprint import fingerprint as of_one
from lora_lightning.lora.frozen.tensors import adapter_tensors, base_tensors
from lora_lightning.training import trainer as lightning_trainer
from lora_lightning.training.callbacks import RankTelemetry
from lora_lightning.training.distributed import gathered
from lora_lightning.training.fsdp1_units import shard_w0, units_of
from lora_lightning.training.strategies import fingerprint as sharded_w0
from tests.processes import in_processes
from tests.training import ragged, shards
from tests.training.sharded import Net, Told, at, ended, equality, figures, fit, stopped

CPU = torch.device("cpu")


def differing(case: shards.Case) -> list[str]:
    """What is not the same to the bit, of outputs, gradients, names and fingerprints; what the parts say of W0."""
    alone, model = shards.made(case), shards.made(case)
    want, names = shards.stepped(alone, case), [name for name, _ in model.named_modules()]
    keys, adapter = sorted(model.state_dict()), list(adapter_tensors(model))
    classes = [type(module) for module in model.modules()]
    if distributed.get_rank():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data + 1  # rank 0's are taken
    shard_w0(model, CPU)
    got = shards.stepped(model, case)
    if distributed.get_world_size() == 2:
        wrong = [name for name in want if not torch.equal(want[name], got[name])]
    else:
        wrong = [name for name in want if not torch.allclose(want[name], got[name], rtol=0, atol=1e-6)]
    if names != [name for name, _ in model.named_modules()] or keys != sorted(model.state_dict()):
        wrong.append("names")
    if adapter != list(adapter_tensors(model)) or classes != [type(module) for module in model.modules()]:
        wrong.append("classes")
    fresh = of_one(alone if isinstance(case[0](), shards.Pictures) else shards.made(case))
    if sharded_w0.fingerprint(model) != fresh:
        wrong.append("fingerprint")
    return wrong + what_is_held(model, alone)


def what_is_held(model: nn.Module, alone: nn.Module) -> list[str]:
    """Complaints of how much of W0 lies here, and where a write into one part was not seen by all."""
    wrong, parts, whole = [], base_tensors(model), base_tensors(alone)
    mine, all_of_it = (sum(t.numel() for t in tensors.values()) for tensors in (parts, whole))
    if not mine < 0.75 * all_of_it:
        wrong.append(f"{mine} of {all_of_it} numbers are held here")
    before = sharded_w0.of_own_parts(model)
    name = next((n for n, t in parts.items() if t.numel() and t.shape != whole[n].shape), "")
    if distributed.get_rank() == 1:
        parts[name].view(-1)[0] += 1
    if not sharded_w0.moved(before, sharded_w0.of_own_parts(model)):
        wrong.append("a write into one part was not seen by all")
    return wrong


def lets_go() -> list[int]:
    """Bytes of a block's weight while the block runs, after it, and while it runs backward."""
    model, sizes = shards.made(shards.CASES["siblings"]), list[int]()
    shard_w0(model, CPU)
    weights: list[torch.Tensor] = []

    def look(*_: Any) -> None:
        sizes.append(weights[0].untyped_storage().size())

    def keep(norm: Any, args: Any, out: torch.Tensor) -> None:
        weights.append(norm.weight)
        look()
        out.register_hook(look)

    kept = model.blocks[2].norm.register_forward_hook(keep)
    out = model(shards.IDS)
    look()
    out.square().mean().backward()
    look()
    kept.remove()
    return sizes


def generation() -> bool:
    """Whether texts of unlike length come out as from the whole model, which runs its encoder by itself."""
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    inject(model, LoRAConfig(r=2, target_modules=["q", "v"]))
    rank = distributed.get_rank()
    given = {"input_ids": shards.IDS + 3 * rank, "max_new_tokens": 3 + 4 * rank, "do_sample": False}
    want = model.generate(**given)
    shard_w0(model, CPU)
    return all(torch.equal(model.generate(**given), want) for _ in range(2))


def twice() -> nn.Module:
    """A layer that trains in two blocks."""
    model = shards.Stack(lambda: shards.Attention(8))
    model.blocks[1].q = model.blocks[0].q
    return model


MORE: dict[str, shards.Case] = {
    "a trained layer in two blocks": (
        twice,
        {"r": 2, "target_modules": ["q", "v"]},
        shards.IDS,
        torch.float32,
    ),
}
CASES = shards.CASES | MORE


def beside(folder: Path, processes: int) -> None:
    distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=processes)
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            found[name] = differing(case)
        except Exception as error:
            traceback.print_exc()
            found[name] = [f"{type(error).__name__}: {error}"]
    found["generation"], found["sizes"] = generation(), lets_go()
    every: list[Any] = [None] * processes
    distributed.all_gather_object(every, found)
    if distributed.get_rank() == 0:
        (folder / "beside.json").write_text(json.dumps(every))
    distributed.destroy_process_group()


def life(folder: Path, processes: int) -> None:
    """All that happens to a run; process 0 writes down what was found."""
    with pytest.MonkeyPatch.context() as patch:
        # It ends the processes that fail together, and these are to tell what each of them met.
        patch.setattr(lightning_trainer, "ending_together", lambda *_, **__: nullcontext())
        _life(folder, processes)


def _life(folder: Path, processes: int) -> None:
    many = {"devices": processes}
    equality(folder, processes, FSDP1Strategy)
    first = fit(folder / "whole", strategy=FSDP1Strategy(), **many)
    assert units_of(first.lightning_module.backbone) is not None
    found: dict[str, Any] = {"whole": ended(first), "figures": figures(first, at(folder / "whole", 9))}
    for step in (9, 14):  # in an epoch's middle and at an end
        again = fit(folder / f"from {step}", ckpt=at(folder / "whole", step), strategy=FSDP1Strategy(), **many)
        found[f"from {step}"] = ended(again)
    for name in ("one",):
        onward = fit(folder / f"of {name}", ckpt=folder / f"{name}.ckpt", strategy=FSDP1Strategy(), **many)
        found[f"of {name}"] = ended(onward)
    callbacks = [ExportAtEnd(), RunReport(), RankTelemetry(every_n_steps=1, amplification=True)]
    fit(folder / "bf16", *callbacks, strategy=FSDP1Strategy(), precision="bf16-mixed", max_steps=2, **many)
    found["starts"] = starts(processes)
    for what in ("w0 end", "loss"):
        found[f"stopped by {what}"] = stopped(folder / what, what, FSDP1Strategy(), processes)
    if first.is_global_zero:
        torch.save(found, folder / "found.pt")


def starts(processes: int) -> list[Any]:
    """The adapter of each process, which drew its own, after a step under DDP that sends no buffers."""
    torch.manual_seed(distributed.get_rank())
    lora = LoRAConfig(r=3, target_modules=["up", "down"], init="pissa_niter_1")
    made = LoRAModule(Net(), Told(), lora, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    strategy = DDPStrategy(broadcast_buffers=False, find_unused_parameters=True)
    return gathered(ragged.fit(2, made=made, strategy=strategy, devices=processes, max_steps=1)["adapter"])


if __name__ == "__main__":
    what, where, number = sys.argv[1:]
    limit = float(os.environ.get("LIMIT", "240"))
    sys.exit(max(map(abs, in_processes(int(number), globals()[what], Path(where), int(number), timeout=limit))))
