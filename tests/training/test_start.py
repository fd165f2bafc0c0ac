"""A start that is measured on batches weighs what they hold."""

from types import SimpleNamespace

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lora_lightning import LoRAConfig, inject
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.tasks.language_model import CausalLM
from lora_lightning.training.initialization import start_from_batches
from tests.tiny_lm import VOCABULARY, make_model


def rows(*lengths):
    """Texts of these lengths, padded to the longest."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(VOCABULARY), (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def started(batches):
    model = make_model("llama", dtype=torch.float64)
    inject(model, LoRAConfig(r=3, init="lora_ga"), run_init=False)
    trainer = SimpleNamespace(train_dataloader=batches, strategy=SingleDeviceStrategy(torch.device("cpu")))
    start_from_batches(model, CausalLM(), "lora_ga", trainer)
    return adapter_tensors(model)


def test_batches_that_are_cut_in_another_way_give_the_same_start():
    whole = rows(9, 2, 3, 2, 8)
    parts = [{name: tensor[part] for name, tensor in whole.items()} for part in (slice(0, 1), slice(1, 5))]
    one, two = started([whole]), started(parts)
    for name, tensor in one.items():
        signs = torch.sign((two[name] * tensor).sum(0 if "lora_B" in name else 1, keepdim=True))  # SVD leaves them open
        assert float((two[name] * signs - tensor).norm()) <= 1e-6 * float(tensor.norm()), name
