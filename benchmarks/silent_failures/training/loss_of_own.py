"""The same two batches, and a model that computes its loss itself, as most models outside transformers do.

huggingface/transformers#37766: where the model does not take the number of tokens, the Trainer's mended accumulation
does not reach it, "and no error or warning is raised".
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import Plain, fit_lightning, llama
from benchmarks.silent_failures.training.token_means import gradient, in_ours, in_trainer, measured, of_peft, rows, sgd

TITLE = "the same with a model that computes its own loss"
THREAD = "huggingface/transformers#37766"
WARNS = "token|num_items|accumulat"


class Own(nn.Module):
    """A language model that returns logits, and the mean of its loss where it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = llama()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.net(input_ids=input_ids).logits
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def ours(folder: Path) -> Measured:
    return in_ours(Own())


def peft(folder: Path) -> Measured:
    return in_trainer(of_peft(Own()), folder)


def lightning(folder: Path) -> Measured:
    model = of_peft(Own())
    wanted = gradient(model)
    fit_lightning(Plain(model, optimizer=sgd), rows(), steps=1, batch_size=1, accumulate_grad_batches=2)
    return measured(model, wanted)
