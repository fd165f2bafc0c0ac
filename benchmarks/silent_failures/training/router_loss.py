"""A mixture of experts whose config asks for its router's auxiliary loss, and a fit that computes the loss itself.

huggingface/trl#6085: "most MoE runs silently trained without the load-balancing term"; huggingface/trl#2197 is the
report that DPO no longer added it. Here the config has `output_router_logits`, so that the model's own loss has the
term. Ours warns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.targets.fused_experts import mixtral
from benchmarks.silent_failures.tiny import (
    Plain,
    fit_lightning,
    fit_ours,
    fit_trainer,
    our_config,
    peft_config,
    texts,
)

TITLE = "a mixture's router loss, which its config asks for"
THREAD = "huggingface/trl#6085"
WARNS = "router"


def model() -> Any:
    made = mixtral()
    made.config.output_router_logits = True
    return made


def measured(loss: float) -> Measured:
    """The first step's loss, beside the base's own: a fresh adapter changes nothing."""
    rows = texts(4)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    base = model()
    own = base(**batch)
    share = (float(own.loss) - loss) / (float(own.aux_loss) * base.router_aux_loss_coef)
    return Measured(abs(share) < 0.01, f"{share:.0%} of the term is missing")


def ours(folder: Path) -> Measured:
    module = fit_ours(model(), texts(4), our_config(), steps=1)
    return measured(float(module.trainer.callback_metrics["train/loss"]))


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    trainer = fit_trainer(get_peft_model(model(), peft_config()), texts(4), folder, steps=1)
    return measured(trainer.state.log_history[0]["loss"])


def lightning(folder: Path) -> Measured:
    from peft import get_peft_model

    trainer = fit_lightning(Plain(get_peft_model(model(), peft_config())), texts(4), steps=1)
    return measured(float(trainer.callback_metrics["loss"]))
