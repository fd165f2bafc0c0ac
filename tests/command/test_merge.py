"""`lora-lightning merge`: from two directories to a third, without a config."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

from lora_lightning import LoRAConfig, huggingface, inject, save_adapter
from lora_lightning.lora.errors import AdapterWarning
from tests.command.process import called
from tests.lora.laws import relative, stir

IDS = torch.tensor([[2, 5, 9, 3], [2, 7, 8, 3]])


@pytest.fixture
def adapter(tiny, tmp_path):
    """A classifier trained on the tiny BERT, which has no head."""
    torch.manual_seed(0)
    model = huggingface(tiny.bert, num_labels=3).eval()
    inject(model, LoRAConfig(r=2, modules_to_save=["classifier"]))
    save_adapter(stir(model), tmp_path / "adapter", task_type="SEQ_CLS")
    return model


def test_merge_from_two_directories_to_a_third(tiny, adapter, tmp_path, monkeypatch, capsys):
    args = ["--base_model", tiny.bert, "--adapter", "adapter", "--output_dir", "out"]
    code, said = called(monkeypatch, capsys, "merge", *args)
    assert code == 0, said
    assert "tensors copied to the bit" in said
    assert "classifier.weight" in said
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert relative(opened(IDS).logits, adapter(IDS).logits) < 1e-5
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the film")["input_ids"]


def test_merge_from_inside_a_package(tiny, adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "holder").mkdir()
    (tmp_path / "holder" / "__init__.py").touch()
    (tmp_path / "holder" / "bert").symlink_to(tiny.bert)
    monkeypatch.syspath_prepend(str(tmp_path))
    args = ["--base_model", "package:holder/bert", "--adapter", "adapter", "--output_dir", "out", "--dtype", "bfloat16"]
    code, said = called(monkeypatch, capsys, "merge", *args)
    assert code == 0, said
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == torch.bfloat16
    assert config.num_labels == 3


def test_another_base_is_refused_and_allowed_aloud(tiny, adapter, tmp_path, monkeypatch, capsys):
    other = transformers.AutoModel.from_pretrained(tiny.bert)
    with torch.no_grad():
        other.encoder.layer[1].output.dense.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    args = ["merge", "--base_model", "other", "--adapter", "adapter", "--output_dir", "out"]
    code, said = called(monkeypatch, capsys, *args)
    assert code == 2
    assert "made on another base" in said
    assert "bert.encoder.layer.1.output.dense.weight" in said
    with pytest.warns(AdapterWarning, match=r"another base: 1 of .* first bert\.encoder\.layer\.1\.output"):
        code, said = called(monkeypatch, capsys, *args, "--allow_other_base", "true")
    assert code == 0
    assert "not checked" in said


def test_an_alpha_in_doubt_is_answered_on_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    model = peft.get_peft_model(
        transformers.AutoModel.from_pretrained(tiny.bert),
        peft.LoraConfig(r=2, target_modules=["query"], alpha_pattern={"layer.0.attention.self.query": 3, "query": 5}),
    )
    model.save_pretrained(tmp_path / "adapter")
    args = ["merge", "--base_model", tiny.bert, "--adapter", "adapter", "--output_dir", "out"]
    code, said = called(monkeypatch, capsys, *args)
    assert code == 2
    assert "alphas={'encoder.layer.0.attention.self.query': ...}" in said
    with pytest.warns(AdapterWarning, match="notes no fingerprint"):
        code, said = called(monkeypatch, capsys, *args, "--alphas", '{"encoder.layer.0.attention.self.query": 3}')
    assert code == 0, said
