"""Models that lie in parts beside the same in one piece, bit for bit: `python -m tests.training.shards run FILE N`.

All processes see the same batch, so the mean of their gradients is each one's own, of two to the bit.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration

from lora_lightning import LoRAConfig, inject
from lora_lightning.lora.frozen.fingerprint import fingerprint as of_one
from lora_lightning.lora.frozen.tensors import base_tensors
from lora_lightning.training.strategies import base as sharded_w0
from lora_lightning.training.strategies.fsdp2 import shard
from tests.processes import in_processes
from tests.training.resuming import whole


class Attention(nn.Module):
    """Four siblings over one input, and an odd width between."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 13), nn.Linear(13, d)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        a = (self.q(y) @ self.k(y).mT).softmax(-1) @ self.v(y)
        x = x + self.o(a)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Stack(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, block: Callable[[], nn.Module], *, checkpointed: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.temperature, self.checkpointed = nn.Parameter(torch.tensor(0.7)), checkpointed
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x) * self.temperature


class Shared(nn.Module):
    """A block whose table is all blocks' own."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.table, self.net = table, nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x + self.table)


def attention(**options: Any) -> nn.Module:
    return Stack(lambda: Attention(8), **options)


def encoder() -> nn.Module:
    return Stack(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0))


def table() -> nn.Module:
    shared = nn.Parameter(torch.randn(8))
    return Stack(lambda: Shared(shared))


def pictures() -> nn.Module:
    """Convolutions and batch statistics."""
    stages = [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(3)]
    named = {"stem": nn.Conv2d(3, 6, 3), "stages": nn.Sequential(*stages), "pool": nn.AdaptiveAvgPool2d(1)}
    return nn.Sequential(OrderedDict(named, flat=nn.Flatten(), head=nn.Linear(6, 5)))


def flat() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 3))


IDS, IMAGES = torch.arange(10).view(2, 5) % 11, torch.linspace(-1, 1, 2 * 3 * 36).view(2, 3, 6, 6)
ALL = {"target_modules": "all-linear"}
EVERYTHING = ALL | {"r": 3, "use_dora": True, "bias": "lora_only", "modules_to_save": ["head"]}
OF_TORCH = {"r": 2, "target_modules": ["self_attn", "out_proj", "linear1"]}
CONVOLUTIONS = {"r": 2, "target_modules": ["stem", "stages.0.0", "stages.2.0"], "modules_to_save": ["head"]}
checkpointed = functools.partial(attention, checkpointed=True)


@dataclass(frozen=True)
class Case:
    """A model, what LoRAConfig is made of, and an input."""

    build: Callable[[], nn.Module]
    config: dict[str, Any]
    inputs: Tensor = IDS
    dtype: torch.dtype = torch.float32


CASES = {
    "siblings": Case(attention, ALL | {"r": 3, "dropout": 0.2}),
    "rank one": Case(attention, ALL | {"r": 1}, dtype=torch.float64),
    "bf16 base": Case(attention, ALL | {"r": 3, "modules_to_save": ["head"]}, dtype=torch.bfloat16),
    "DoRA": Case(attention, ALL | {"r": 3, "use_dora": True}),
    "bias and a moved start": Case(attention, ALL | {"r": 3, "bias": "lora_only", "init": "pissa"}),
    "checkpointed with options": Case(checkpointed, EVERYTHING),
    "checkpointed": Case(checkpointed, ALL | {"r": 3}),
    "tied": Case(functools.partial(attention, tied=True), ALL | {"r": 3, "exclude_modules": ["head"]}),
    "embedding and head": Case(attention, {"r": 3, "target_modules": ["embed", "q"], "modules_to_save": ["head"]}),
    "attention of torch": Case(encoder, OF_TORCH),
    "bare parameters": Case(attention, {"r": 2, "target_modules": ["v"], "target_parameters": ["q.weight"]}),
    "one table for all blocks": Case(table, ALL | {"r": 3}),
    "convolutions": Case(pictures, CONVOLUTIONS, IMAGES),
    "no blocks": Case(flat, ALL | {"r": 2}),
}


def made(case: Case) -> nn.Module:
    """Injected, with a B that is not zero."""
    torch.manual_seed(3)
    model = case.build().to(case.dtype)
    inject(model, LoRAConfig(**case.config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_magnitude" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def stepped(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """The outputs of two steps, in training and in evaluation, and the gradients of both steps together."""
    found = {}
    for step in range(2):
        torch.manual_seed(step)
        out = model(case.inputs)
        if step:  # as towers and preferences do, before one backward
            out = out + model(case.inputs.flip(-1))
        found[f"out {step}"] = out.detach()
        (out.float().square().mean() if out.dtype == torch.bfloat16 else out.square().mean()).backward()
    model.eval()
    with torch.no_grad():
        found["eval"] = model(case.inputs)
    model.reshard() if hasattr(model, "reshard") else None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = whole(parameter.grad)
    return found


def differing(case: Case) -> list[str]:
    """What is not the same to the bit, of outputs, gradients and fingerprints; and what the shards say of W0."""
    alone, model = made(case), made(case)
    want = stepped(alone, case)
    if distributed.get_rank():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data + 1  # rank 0's are taken
    shard(model, init_device_mesh("cpu", (distributed.get_world_size(),)), torch.device("cpu"))
    named = ((name, module, *own) for name, module in model.named_modules() for own in module._parameters.items())
    sharded = [place for place in named if isinstance(place[3], DTensor)]
    read = [f"{name}.{own}" for name, module, own, tensor in sharded if getattr(module, own) is not tensor]
    got = stepped(model, case)
    wrong = [f"'{name}' reads otherwise as a shard" for name in read]
    wrong += [name for name in want if not torch.equal(want[name], got[name])]
    if sharded_w0.fingerprint(model) != of_one(alone):
        wrong.append("fingerprint")
    before = sharded_w0.shard_fingerprint(model)
    name, tensor = next((n, t) for n, t in base_tensors(model).items() if isinstance(t, DTensor) and t.shape[0] > 4)
    if distributed.get_rank() == 1:
        tensor.to_local().view(-1)[0] += 1
    if name not in sharded_w0.moved_tensors(before, sharded_w0.shard_fingerprint(model)):
        wrong.append("a write into one part was not seen by all")
    return wrong


def generation() -> bool:
    """Whether texts of unlike length come out as from the whole model, which runs its encoder by itself."""
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    inject(model, LoRAConfig(r=2, target_modules=["q", "v"]))
    rank = distributed.get_rank()
    given = {"input_ids": IDS + 3 * rank, "max_new_tokens": 3 + 4 * rank, "do_sample": False}
    want = model.generate(**given)
    shard(model, init_device_mesh("cpu", (distributed.get_world_size(),)), torch.device("cpu"))
    model._get_fsdp_state()._lazy_init()
    return all(torch.equal(model.generate(**given), want) for _ in range(2))


def run(file: Path, processes: int) -> None:
    distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=processes)
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            found[name] = differing(case)
        except Exception as error:
            traceback.print_exc()
            found[name] = [f"{type(error).__name__}: {error}"]
    found["generation"] = generation()
    every: list[Any] = [None] * processes
    distributed.all_gather_object(every, found)
    if distributed.get_rank() == 0:
        file.write_text(json.dumps(every))
    distributed.destroy_process_group()


if __name__ == "__main__":
    _, what, where, number = sys.argv
    sys.exit(max(map(abs, in_processes(int(number), globals()[what], Path(where), int(number), timeout=600))))
