"""`lora-lightning merge`: from two directories to a third, without a config."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

from lora_lightning import LoRAConfig, huggingface, inject, save_adapter
from lora_lightning.__main__ import main
from lora_lightning.lora.errors import AdapterWarning
from tests.command.process import command
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


def called(monkeypatch, capsys, *args):
    """Exit code and what was said."""
    try:
        command(monkeypatch, *args)
    except SystemExit as stopped:
        return stopped.code, capsys.readouterr().err
    return 0, capsys.readouterr().out


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


MISTAKES = {
    "no base": (["--base_model", "nowhere"], "no folder 'nowhere': a model of the hub has to be downloaded first"),
    "no adapter": (["--adapter", "nowhere"], "no folder 'nowhere'"),
    "no output": (["--output_dir", "adapter"], "'adapter' is not empty: name an empty or new folder"),
    "a mistyped flag": (["--base_modle", "x"], "did you mean '--base_model'"),
    "a dtype that is not there": (["--dtype", "bf16"], "got 'bf16'; did you mean 'bfloat16'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, tiny, adapter, tmp_path, monkeypatch, capsys):
    wrong, said = MISTAKES[name]
    args = ["--base_model", tiny.bert, "--adapter", "adapter", "--output_dir", "out", *wrong]
    code, shown = called(monkeypatch, capsys, "merge", *args)
    assert code == 2
    lines = [line for line in shown.splitlines() if line.startswith("lora-lightning: error: ")]
    assert len(lines) == 1, shown
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


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


def test_help_says_what_merge_does(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lora-lightning", "merge", "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "shard by shard, without loading the model" in shown
    assert "--allow_other_base" in shown
    monkeypatch.setattr("sys.argv", ["lora-lightning", "--help"])
    main()
    assert "merge fold an adapter into a model's files" in " ".join(capsys.readouterr().out.split())
