"""`lora-lightning merge`: from two directories to a third, without a config."""

import peft
import pytest
import torch
import transformers

from lora_lightning import LoRAConfig, huggingface, inject, save_adapter
from lora_lightning.lora.errors import AdapterWarning
from tests.command.process import called
from tests.lora.laws import relative, stir

IDS = torch.tensor([[2, 5, 9, 3], [2, 7, 8, 3]])
GIVEN = ["merge", "--adapter", "adapter", "--output_dir", "out", "--base_model"]


def test_a_classifier_from_two_directories_to_a_third(tiny, tmp_path, monkeypatch, capsys):
    """Trained on the tiny BERT, which has no head and lies in a package; and on no other base, but aloud."""
    torch.manual_seed(0)
    adapted = huggingface(tiny.bert, num_labels=3).eval()
    inject(adapted, LoRAConfig(r=2, modules_to_save=["classifier"]))
    save_adapter(stir(adapted), tmp_path / "adapter", task_type="SEQ_CLS")
    code, said = called(monkeypatch, capsys, *GIVEN, tiny.bert)
    assert code == 0, said
    assert "tensors copied to the bit" in said
    assert "classifier.weight" in said
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert relative(opened(IDS).logits, adapted(IDS).logits) < 1e-5
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the film")["input_ids"]

    (tmp_path / "holder").mkdir()
    (tmp_path / "holder" / "__init__.py").touch()
    (tmp_path / "holder" / "bert").symlink_to(tiny.bert)
    monkeypatch.syspath_prepend(str(tmp_path))
    further = ["package:holder/bert", "--output_dir", "half", "--dtype", "bfloat16"]
    assert called(monkeypatch, capsys, *GIVEN, *further)[0] == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "half")
    assert (config.dtype, config.num_labels) == (torch.bfloat16, 3)

    other = transformers.AutoModel.from_pretrained(tiny.bert)
    with torch.no_grad():
        other.encoder.layer[1].output.dense.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    given = [*GIVEN, "other", "--output_dir", "third"]
    code, said = called(monkeypatch, capsys, *given)
    assert (code, "first bert.encoder.layer.1.output" in said) == (2, True)
    with pytest.warns(AdapterWarning):
        code, said = called(monkeypatch, capsys, *given, "--allow_other_base", "true")
    assert (code, "not checked" in said) == (0, True)


def test_an_alpha_in_doubt_is_answered_on_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    model = peft.get_peft_model(
        transformers.AutoModel.from_pretrained(tiny.bert),
        peft.LoraConfig(r=2, target_modules=["query"], alpha_pattern={"layer.0.attention.self.query": 3, "query": 5}),
    )
    model.save_pretrained(tmp_path / "adapter")
    code, said = called(monkeypatch, capsys, *GIVEN, tiny.bert)
    assert code == 2
    assert "alphas={'encoder.layer.0.attention.self.query': ...}" in said
    alphas = ["--alphas", '{"encoder.layer.0.attention.self.query": 3}']
    with pytest.warns(AdapterWarning):
        assert called(monkeypatch, capsys, *GIVEN, tiny.bert, *alphas)[0] == 0
