"""Fits under DeepSpeed. Run in several processes as `python -m tests.training.zeroed WHAT FOLDER PROCESSES STAGE`."""

from __future__ import annotations

import functools
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from torch import distributed, nn

from lora_lightning import HalfBase, LoRAConfig, LoRAError, LoRAModule, prepare_weights
from lora_lightning.training import trainer as lightning_trainer
from lora_lightning.training.callbacks.step_figures import norm_over, parts_of_gradients
from lora_lightning.training.distributed import gathered
from lora_lightning.training.zero2_strategy import ZeRO2Strategy
from lora_lightning.training.zero3_strategy import ZeRO3Strategy
from tests.processes import in_processes
from tests.training import ragged, sharded, shards
from tests.training.sharded import at, figures, fit

STEPS = 20
KEPT = ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")
NOTHING_STAYS = {f"stage3_{name}": 0 for name in KEPT}
"""In stage 3 DeepSpeed would keep what is as small as all of this whole."""
STRATEGIES = {2: ZeRO2Strategy, 3: functools.partial(ZeRO3Strategy, zero_optimization=NOTHING_STAYS)}

DDP = "ddp_find_unused_parameters_true"


def module(**config: Any) -> LoRAModule:
    """In float32, DeepSpeed's widest."""
    return sharded.module(torch.float32, **config)


def language_model() -> LoRAModule:
    """Whose loss is taken from the trained copy of its head, beside the model's own call."""
    made = sharded.language_model()
    made.backbone.float()
    return made


def copies() -> LoRAModule:
    """Trained in float32, beside a base that may be narrower."""
    return module(modules_to_save=["norm", "layers.1.up"], target_modules=["down"])


def siblings() -> LoRAModule:
    """Of which the first reads the adapters of the next."""
    torch.manual_seed(0)
    net = shards.Stack(lambda: shards.Attention(8))
    net.temperature = nn.Parameter(torch.tensor([0.7]))  # one number is refused in stage 3
    lora = LoRAConfig(r=3, target_modules="all-linear")
    return LoRAModule(net, sharded.Told(), lora, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))


def both(stage: int) -> dict[str, Any]:
    return {"ddp": DDP, "zero": STRATEGIES[stage]()}


def equality(folder: Path, processes: int, stage: int) -> None:
    """Beside DDP, with and without clipping."""
    for clip in (0, ragged.CLIP):
        for name, strategy in both(stage).items():
            many = {"strategy": strategy, "devices": processes, "accumulate_grad_batches": 3, "max_steps": STEPS}
            ragged.fit(2, file=folder / f"{name} {clip}.pt", made=module(), gradient_clip_val=clip, **many)


class Norms(Callback):
    """As `StepFigures` logs them, of the last step."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        parts = parts_of_gradients(trainer, pl_module, optimizer)
        self.found = {name: float(norm_over(trainer.strategy, own)) for name, own in parts.items()}


def norms(processes: int, stage: int) -> dict[str, Any]:
    found = {}
    for name, strategy in both(stage).items():
        seen = Norms()
        ragged.fit(2, seen, made=module(), strategy=strategy, devices=processes, max_steps=3)
        found[name] = seen.found
    return found


class Routed(sharded.Net):
    """Of whose last layers each process runs one."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](self.embed(ids))
        count = len(self.layers) - 1
        x = self.layers[1 + distributed.get_rank() % count](x) if distributed.is_initialized() else x
        logits: torch.Tensor = self.head(self.norm(x)) * self.scale
        return logits


def unreached(processes: int, stage: int) -> dict[str, Any]:
    found = {}
    for name, strategy in both(stage).items():
        torch.manual_seed(0)
        lora = LoRAConfig(r=3, target_modules=["up", "down"])
        made = LoRAModule(Routed(), sharded.Told(), lora, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))
        many = {"strategy": strategy, "devices": processes, "max_steps": 5, "gradient_clip_val": 0}
        found[name] = ragged.fit(2, made=made, **many)["adapter"]
    return found


def searched(folder: Path, processes: int, stage: int) -> dict[str, Any]:
    """Beside DDP: some steps are taken and taken back before the first."""
    found = {}
    for name, strategy in both(stage).items():
        made, search = module(), LearningRateFinder(num_training_steps=4, attr_name="lr")
        made.lr = 0.0
        many = {"strategy": strategy, "devices": processes, "max_steps": 3, "default_root_dir": folder}
        found[name] = ragged.fit(2, search, made=made, gradient_clip_val=0, **many)["adapter"]
    return found


def narrow(folder: Path, processes: int, stage: int) -> None:
    """Beside DDP: in bfloat16, and a language model."""
    words: dict[str, dict[str, Any]] = {
        "bf16-mixed": {"precision": "bf16-mixed"},
        "bf16-base": {"plugins": [HalfBase("bf16-base", "cpu")]},
        "bf16-base and copies": {"plugins": [HalfBase("bf16-base", "cpu")]},
        "lm": {"data": sharded.Sentences(2)},
        "siblings": {},
    }
    for word, given in words.items():
        for name, strategy in both(stage).items():
            many = {"strategy": strategy, "devices": processes, "max_steps": 5, "gradient_clip_val": 0}
            made = {"lm": language_model, "siblings": siblings, "bf16-base and copies": copies}.get(word, module)()
            prepare_weights(made.backbone, "off")  # as in stage 3: another kernel rounds otherwise
            ragged.fit(2, file=folder / f"{name} {word}.pt", made=made, **given, **many)


def ended(trainer: Trainer) -> dict[str, Any]:
    """Weights and the optimizer's state at a fit's end, gathered."""
    weights = dict(trainer.strategy.lightning_module_state_dict())
    states = trainer.strategy.optimizer_state(trainer.optimizers[0]).get("state", {})
    return {**weights, **{f"{i}.{key}": v for i, own in states.items() for key, v in own.items()}}


class Ended(Callback):
    """Before the strategy lets go of the parts."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.found = ended(trainer) | {"step": trainer.global_step}


def lived(folder: Path, stage: int, **options: Any) -> tuple[Trainer, dict[str, Any]]:
    end = Ended()
    return fit(folder, end, strategy=STRATEGIES[stage](), max_epochs=2, **options), end.found


class Nudge(sharded.Nudge):
    """Whose W0 is whole, or lies in a parameter's `ds_tensor`."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if self.what == "w0" and trainer.global_step == 4 and trainer.global_rank == 1:
            weight = pl_module.backbone.layers[1].up.weight
            (weight if weight.numel() else weight.ds_tensor).data.view(-1)[0] += 1e-3


def stopped(folder: Path, what: str, stage: int, processes: int) -> list[str]:
    """What each process raised."""
    try:
        fit(folder, Nudge(what), strategy=STRATEGIES[stage](), devices=processes)
    except LoRAError as error:
        return gathered(f"{type(error).__name__}: {error}")
    return gathered("nothing")


def life(folder: Path, processes: int, stage: int) -> None:
    """All that happens to a run; process 0 writes down what was found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning_trainer, "ending_together", lambda *_, **__: nullcontext())
        equality(folder, processes, stage)
        found: dict[str, Any] = {"norms": norms(processes, stage)}
        found["searched"] = searched(folder, processes, stage)
        if stage == 2:  # in stage 3 all processes must run the same modules
            found["unreached"] = unreached(processes, stage)
        many = {"devices": processes}
        first, found["whole"] = lived(folder / "many", stage, **many)
        found["figures"] = figures(first, at(folder / "many", 9))
        for step in (9, 7):  # in an epoch's middle and at an end
            found[f"from {step}"] = lived(folder / f"from {step}", stage, ckpt=at(folder / "many", step), **many)[1]
        found["of one process"] = lived(folder / "of one", stage, ckpt=folder / "one.ckpt", **many)[1]
        for what in ("w0", "loss"):
            found[f"stopped by {what}"] = stopped(folder / what, what, stage, processes)
        if first.is_global_zero:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    what, where, number, stage = sys.argv[1:]
    limit = float(os.environ.get("LIMIT", "240"))
    given = (Path(where), int(number), int(stage))
    sys.exit(max(map(abs, in_processes(int(number), globals()[what], *given, timeout=limit))))
