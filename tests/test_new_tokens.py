"""Tokens that a model is given by `add_tokens`: they train by name, and travel with the adapter."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lightning import LoRAConfig, LoRAError, huggingface, inject
from lora_lightning.backbones.tokenizers import load_tokenizer
from lora_lightning.cli.main import LoRACLI
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.frozen.fingerprint import fingerprint
from tests.tiny_lm import WORDS, make_model, make_tokenizer

NEW = ["<|ask|>", "<|say|>"]
CAUSAL = {"auto_class": "AutoModelForCausalLM", "add_tokens": NEW}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    """A Llama whose head is the embedding, or has its own rows, and a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", tie_word_embeddings=request.param).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_the_new_rows_are_the_mean_of_the_others_and_have_the_same_bits_each_time(folder):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model, again = huggingface(str(folder), **CAUSAL), huggingface(str(folder), **CAUSAL)
    rows = plain.get_input_embeddings().num_embeddings
    assert model.added_tokens == {NEW[0]: rows, NEW[1]: rows + 1}
    assert model.config.vocab_size == rows + 2
    for of in ("get_input_embeddings", "get_output_embeddings"):
        grown, before = (getattr(one, of)().weight for one in (model, plain))
        assert torch.equal(grown[:rows], before)
        assert torch.allclose(grown[rows:], before.mean(0).expand(2, -1), rtol=0.01, atol=1e-4)
    assert fingerprint(model) == fingerprint(again)
    tokenizer = load_tokenizer(str(folder))
    model = huggingface(str(folder), **CAUSAL, tokenizer=tokenizer)
    assert tokenizer("the dog <|ask|>")["input_ids"][-1] == model.added_tokens["<|ask|>"], "the data's keeps them whole"
    model = huggingface(str(folder), auto_class="AutoModelForCausalLM", add_tokens=[WORDS[0], NEW[0]])
    assert model.added_tokens[WORDS[0]] == make_tokenizer().convert_tokens_to_ids(WORDS[0]), "it has that one"
    assert model.get_input_embeddings().num_embeddings == len(make_tokenizer()) + 1
    with pytest.raises(LoRAError, match="add_tokens"):
        huggingface(str(folder), auto_class="AutoModelForCausalLM", add_tokens=["<|a|>", "<|a|>"])


def test_rows_train_by_name_and_a_wrong_name_has_a_neighbour(folder):
    model = huggingface(str(folder), **CAUSAL)
    with pytest.raises(TargetError, match=r"no token '<\|asks\|>'; did you mean '<\|ask\|>'"):
        inject(model, LoRAConfig(r=2, trainable_token_indices=["<|asks|>"]))
    report = inject(model, LoRAConfig(r=2, trainable_token_indices=NEW))
    assert report.tokens == {"model.embed_tokens": 2 * 16}


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run over texts with the new tokens, exported."""
    there = tmp_path_factory.mktemp("run")
    rows = [{"text": f"<|ask|> {word} then <|say|> {word} comes home"} for word in WORDS * 3]
    (there / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (there / "run.yaml").write_text(f"""
name: tokens
runs_dir: {there / "runs"}
trainer: {{max_epochs: 2, accelerator: cpu, enable_progress_bar: false}}
model:
  backbone:
    class_path: lora_lightning.huggingface
    init_args: {{pretrained_model_name_or_path: {folder}, auto_class: AutoModelForCausalLM, add_tokens: {NEW}}}
  lora: {{r: 2, target_modules: [q_proj, v_proj], trainable_token_indices: {NEW}}}
  task: {{class_path: lora_lightning.CausalLM}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.05}}}}
data:
  class_path: lora_lightning.LanguageModellingData
  init_args: {{path: {there / "rows.jsonl"}, tokenizer: {folder}, max_length: 16, batch_size: 8}}
""")
    LoRACLI(args=["fit", "--config", str(there / "run.yaml")])
    out = there / "out"
    LoRACLI(args=["export", "--ckpt_path", str(there / "runs" / "tokens"), "--output_dir", str(out)])
    return SimpleNamespace(adapter=out / "adapter", merged=out / "merged")


@pytest.mark.filterwarnings("ignore:.*tie")
def test_peft_opens_the_adapter_over_the_base_with_the_adapters_tokenizer(folder, trained):
    tokenizer = AutoTokenizer.from_pretrained(trained.adapter)
    assert tokenizer.convert_tokens_to_ids(NEW) == [len(tokenizer) - 2, len(tokenizer) - 1]
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(len(tokenizer))
    untied = base.get_output_embeddings().weight is not base.get_input_embeddings().weight
    if untied:  # rows that nothing trains: the mean of the others, as `add_tokens` makes them
        base.get_output_embeddings().weight.data[-2:] = huggingface(str(folder), **CAUSAL).lm_head.weight[-2:]
    theirs = peft.PeftModel.from_pretrained(base, str(trained.adapter)).eval()
    merged = AutoModelForCausalLM.from_pretrained(trained.merged).eval()
    batch = AutoTokenizer.from_pretrained(trained.merged)("<|ask|> dog then <|say|> dog", return_tensors="pt")
    with torch.no_grad():
        ours, got = merged(**batch).logits, theirs(**batch).logits
    assert torch.allclose(got, ours, atol=1e-4)
    start = huggingface(str(folder), **CAUSAL).get_input_embeddings().weight[-2:]
    assert (merged.get_input_embeddings().weight[-2:] - start).abs().max() > 0.01, "the rows have trained"


CODE = {
    "config.json": json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModel": "code.Model"}}),
    "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["code.Tokens", None]}}),
    "code.py": "raise RuntimeError('this code has run')\n",
}


def test_code_that_a_model_brings_is_run_only_where_the_config_says_so(tmp_path, monkeypatch):
    for name, text in CODE.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what `echo y |` would answer transformers
    for load in (lambda name: huggingface(name, auto_class="AutoModel"), load_tokenizer):
        with pytest.raises(LoRAError, match=r"not run unasked.*trust_remote_code: true"):
            load(str(tmp_path))
    with pytest.raises((LoRAError, RuntimeError), match="this code has run"):
        huggingface(str(tmp_path), auto_class="AutoModel", model_kwargs={"trust_remote_code": True})
