"""What a run hands over: models that open where nothing of ours is, and adapters that know their base."""

import shutil
import subprocess
import sys

import peft
import pytest
import safetensors.torch
import torch
import transformers

from lora_lightning import LoRAConfig, huggingface, inject, save_adapter
from lora_lightning.lora.errors import AdapterWarning
from tests.command.process import called, files_in, mistake
from tests.factories import export_of
from tests.lora.laws import relative, stir
from tests.lora.test_families import IDS, build
from tests.tiny import make_bert

# ---- merged models, opened by transformers alone

MERGED = {
    "bert": ("AutoModelForSequenceClassification", {"modules_to_save": ["classifier"], "use_dora": True}),
    "gpt2": ("AutoModelForCausalLM", {"slices": {"c_attn": ["q", "v"]}, "target_modules": ["c_attn"]}),
    "llama": ("AutoModelForCausalLM", {"trainable_token_indices": {"embed_tokens": [1, 5]}, "init": "pissa"}),
    "t5": ("AutoModelForSeq2SeqLM", {"target_modules": ["encoder.embed_tokens", "q", "wo"], "use_rslora": True}),
    "mixtral": ("AutoModelForCausalLM", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
}

ALONE = """
import sys
from pathlib import Path
for name in ("lora_lightning", "peft", "lightning"):
    sys.modules[name] = None  # importing it raises
import safetensors.torch, torch, transformers
folder, wanted = sys.argv[1], dict(word.split("=") for word in sys.argv[2:])
for name, auto in wanted.items():
    inputs = safetensors.torch.load_file(f"{folder}/{name}.inputs")
    model, found = getattr(transformers, auto).from_pretrained(f"{folder}/{name}/merged", output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, found)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    safetensors.torch.save_file({"logits": logits}, f"{folder}/{name}.outputs")
"""


def test_exported_models_open_in_transformers_alone(make_module, tmp_path):
    home = {}
    for name, (_, fields) in MERGED.items():
        inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS.flip(1)} if name == "t5" else {})}
        module = make_module(build(name), LoRAConfig(**{"r": 2, **fields})).eval()
        stir(module.backbone, size=0.1)
        with torch.no_grad():
            home[name] = module.backbone(**inputs).logits
            assert relative(build(name)(**inputs).logits, home[name]) > 1e-3
        export_of(module, tmp_path / name, inputs, formats=["merged"])
        safetensors.torch.save_file(inputs, tmp_path / f"{name}.inputs")
    autos = [f"{name}={auto}" for name, (auto, _) in MERGED.items()]
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path), *autos], check=True, cwd=tmp_path)
    for name, wanted in home.items():
        got = safetensors.torch.load_file(tmp_path / f"{name}.outputs")["logits"]
        assert relative(got, wanted) <= 1e-5, name


# ---- another base of equal shapes


@pytest.mark.parametrize("action", ["export", "test", "fit"])
def test_the_command_refuses_a_run_on_another_base(action, trained, tiny, tmp_path, monkeypatch, capsys):
    other = make_bert(tmp_path / "other", seed=1)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "test").mkdir(exist_ok=True)
    (run / "test" / "metrics.csv").write_text("what an earlier test found\n")
    before = files_in(run)
    checkpoint = run / "checkpoints" / "best.ckpt"
    backbone = ("--model.backbone.init_args.pretrained_model_name_or_path", other)
    said = mistake(monkeypatch, capsys, action, "--config", tiny.config, *backbone, "--ckpt_path", checkpoint)
    assert "allow_other_base" in said
    assert files_in(run) == before, "nothing was written into the run"


# ---- `merge`: from two directories to a third, without a config


SENTENCES = torch.tensor([[2, 5, 9, 3], [2, 7, 8, 3]])
GIVEN = ["merge", "--adapter", "adapter", "--output_dir", "out", "--base_model"]


def test_a_classifier_from_two_directories_to_a_third(tiny, tmp_path, monkeypatch, capsys):
    """Trained on the tiny BERT, which has no head and lies in a package."""
    torch.manual_seed(0)
    adapted = huggingface(tiny.bert, num_labels=3).eval()
    inject(adapted, LoRAConfig(r=2, modules_to_save=["classifier"]))
    save_adapter(stir(adapted), tmp_path / "adapter", task_type="SEQ_CLS")
    code, said = called(monkeypatch, capsys, *GIVEN, tiny.bert)
    assert code == 0, said
    assert "tensors copied to the bit" in said
    assert "classifier.weight" in said
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert relative(opened(SENTENCES).logits, adapted(SENTENCES).logits) < 1e-5
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the film")["input_ids"]

    (tmp_path / "holder").mkdir()
    (tmp_path / "holder" / "__init__.py").touch()
    (tmp_path / "holder" / "bert").symlink_to(tiny.bert)
    monkeypatch.syspath_prepend(str(tmp_path))
    further = ["package:holder/bert", "--output_dir", "half", "--dtype", "bfloat16"]
    assert called(monkeypatch, capsys, *GIVEN, *further)[0] == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "half")
    assert (config.dtype, config.num_labels) == (torch.bfloat16, 3)


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
