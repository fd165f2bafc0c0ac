"""PEFT opens what is saved for a task, whether the head is trained in full, adapted or frozen."""

import json

import peft
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lora_lightning import AdapterWarning, LoRAConfig, LoRAError, inject, save_adapter
from tests.factories import distance, move


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=40, **sizes)).eval()


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"modules_to_save": ["classifier"]}, False),
        ({}, True),
        ({"target_modules": ["query", "classifier"]}, True),
    ],
)
def test_peft_opens_a_classifiers_adapter(tmp_path, options, warns):
    model = bert()
    inject(model, LoRAConfig(**{"r": 2, "target_modules": ["query"], **options}))
    move(model)
    if warns:
        with pytest.warns(AdapterWarning, match="task_type is left out"):
            save_adapter(model, tmp_path, task_type="SEQ_CLS")
    else:
        save_adapter(model, tmp_path, task_type="SEQ_CLS")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == (None if warns else "SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert distance(model(IDS).logits, theirs(IDS).logits) < 1e-5


def test_a_task_that_peft_does_not_know_is_refused(tmp_path):
    model = bert()
    inject(model, LoRAConfig(r=2, target_modules=["query"]))
    with pytest.raises(LoRAError, match="got 'SEQ_CLASS'; did you mean 'SEQ_CLS'"):
        save_adapter(model, tmp_path / "out", task_type="SEQ_CLASS")
    assert not (tmp_path / "out").exists()
