"""The same fit as PEFT's in the Hugging Face Trainer: the same data, order and start give the same curve.

Theirs is transformers' and PEFT's own all through: collator, loss, token counts over accumulated batches, clipping,
AdamW, schedule. The order of rows alone is handed to both, and the adapter that both begin with.
"""

import functools

import peft
import pytest
import torch
import transformers
from lightning.pytorch import Callback
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from lora_lightning import LoRAConfig, LoRAModule, WarmupDecay, save_adapter
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.data.language_modelling import LanguageModellingData
from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.tasks.language_model import CausalLM
from tests.tiny_lm import make_model, make_texts, make_tokenizer
from tests.training.small import trainer_of

STEPS, ROWS, BATCH, ACCUMULATED = 20, 50, 4, 2
"""13 batches an epoch, of which the last has 2 rows and makes a step by itself: 7 steps an epoch."""
RATE, WARMUP, DECAY, CLIP = 0.01, 5, 0.1, 1.0
LORA = LoRAConfig(r=4, alpha=8)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(make_texts(ROWS, longest=15)))
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = LanguageModellingData(
        str(tmp_path / "texts.txt"), str(tmp_path / "tokenizer"), packing=False, batch_size=BATCH,
        split=SplitConfig(validation=0, test=0), seed=3,
    )  # fmt: skip
    data.setup()
    return data


class Losses(Callback):
    """What each optimizer step lowered, and the norm of its gradients before they were clipped."""

    def __init__(self):
        self.losses, self.norms = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train/loss_step"]))


def ours(backbone, data, start):
    optimizer = functools.partial(torch.optim.AdamW, lr=RATE, weight_decay=DECAY)
    schedule = functools.partial(WarmupDecay, warmup=WARMUP)
    module, seen = LoRAModule(backbone, CausalLM(), LORA, optimizer, schedule), Losses()
    save_adapter(module.backbone, start)
    given = {"max_steps": STEPS, "max_epochs": -1, "accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": CLIP}
    given |= {"callbacks": [seen], "enable_checkpointing": False, "precision": "64-true"}
    trainer = trainer_of(start.parent, **given)
    trainer.fit(module, datamodule=data)
    return seen.losses, seen.norms, adapter_tensors(module.backbone)


class InOurOrder(transformers.Trainer):
    """Their Trainer, which keeps each batch's share of the loss: what it logs has gone through float32."""

    shares: dict[int, list[float]]

    def _get_train_sampler(self, *_):
        rows = self.train_dataset
        return EpochSampler(rows, batch_size=BATCH, lengths=[len(row["input_ids"]) for row in rows], seed=3)

    def training_step(self, *args, **kwargs):
        share = super().training_step(*args, **kwargs)
        self.shares.setdefault(self.state.global_step, []).append(float(share))
        return share


def in_double(outputs, labels, num_items_in_batch):
    """transformers' own loss, which takes the logits to float32 whatever they are, without that."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def theirs(backbone, data, start, folder):
    model = peft.PeftModel.from_pretrained(backbone, str(start), is_trainable=True, autocast_adapter_dtype=False)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED, learning_rate=RATE, weight_decay=DECAY, lr_scheduler_type="linear",
        warmup_steps=WARMUP, max_grad_norm=CLIP, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    # A row's first label is -100 in ours. With one there, their count of a step's tokens takes it in for GPT-2, though
    # nothing predicts it (transformers 5.24 does not know that GPT-2's loss shifts its labels).
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in data.encoded_rows("train")]
    collate = DataCollatorForSeq2Seq(data.tokenizer)
    trainer = InOurOrder(model, arguments, collate, train_dataset=rows, compute_loss_func=in_double)
    trainer.shares = {}
    trainer.train()
    losses = [sum(shares) for shares in trainer.shares.values()]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([entry["loss"] for entry in logged], rel=1e-5)
    return losses, [entry["grad_norm"] for entry in logged], peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_curve_is_that_of_the_huggingface_trainer_with_peft(tmp_path, data, kind):
    start = tmp_path / "start"
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    make = functools.partial(make_model, kind, dtype=torch.float64, initializer_range=0.15, **no_dropout)
    losses, norms, adapter = ours(make(), data, start)
    expected, their_norms, their_adapter = theirs(make(), data, start, tmp_path / "theirs")
    assert len(losses) == len(expected) == STEPS
    assert losses == pytest.approx(expected, rel=1e-10)
    assert norms == pytest.approx(their_norms, rel=1e-9)
    assert losses[-1] < 0.8 * losses[0], "it has learnt"
    assert min(norms) < CLIP < max(norms), "some steps are clipped and some are not"
    same = {name.replace("base_model.model.", ""): tensor for name, tensor in their_adapter.items()}
    assert len(same) == len(adapter)
    for name, tensor in adapter.items():
        other = same[f"{name}.weight"]
        assert float((tensor - other).norm()) <= 1e-9 * float(other.norm())
