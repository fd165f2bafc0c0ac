"""Backbones by one line: labels and padding flow in, and a wrong name is answered."""

import pytest
import torch
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaModel

from lora_lightning import LoRAError, huggingface
from lora_lightning.cli.main import LoRACLI
from tests.tiny import VOCABULARY, config_text, words_tokenizer


def test_label_names_make_the_head_and_go_into_the_config(tiny):
    model = huggingface(tiny.bert, label_names=["good", "bad", "ugly"])
    assert model.classifier.out_features == 3
    assert model.config.id2label == {0: "good", 1: "bad", 2: "ugly"}
    assert model.dtype == torch.float32
    assert not model.training


def test_dtype_attention_and_random_weights_are_as_asked_and_a_head_of_another_size_is_new(tiny, tmp_path):
    model = huggingface(tiny.bert, dtype="bfloat16", attn_implementation="eager")
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    first, second = (huggingface(tiny.bert, random_weights=True, auto_class="AutoModel") for _ in range(2))
    assert not torch.equal(first.embeddings.word_embeddings.weight, second.embeddings.word_embeddings.weight)
    huggingface(tiny.bert, num_labels=3).save_pretrained(tmp_path)
    model = huggingface(str(tmp_path), num_labels=2)
    assert model.classifier.out_features == 2
    assert set(model.new_keys) == {"classifier.weight", "classifier.bias"}


def test_a_wrong_name_and_weights_of_another_model_are_refused(tiny, tmp_path):
    huggingface(tiny.bert, auto_class="AutoModel").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (tmp_path / "config.json").write_text(config)
    for name, auto_class, said in (
        (tiny.bert, "AutoModelForCasualLM", "did you mean 'AutoModelForCausalLM'"),
        (tiny.bert, "LlamaForSequenceClassification", "belong to another architecture"),
        (tmp_path, "AutoModel", r"no values for 16 tensors .*encoder\.layer\.2"),
        (tmp_path, "AutoModelForSequenceClassification", r"no values for 16 tensors .*encoder\.layer\.2"),
        ("./nowhere", "AutoModel", r"no model './nowhere'"),
    ):
        with pytest.raises(LoRAError, match=said):
            huggingface(str(name), auto_class=auto_class)


def make_llama(folder):
    """A Llama and a tokenizer as they come: neither knows how to pad."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(**shape, vocab_size=len(VOCABULARY), eos_token_id=3, bos_token_id=2)).save_pretrained(folder)
    words_tokenizer(VOCABULARY, split=Whitespace(), eos_token="[SEP]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_a_decoder_without_a_padding_token_classifies_batches(tiny, tmp_path):
    text = config_text(make_llama(tmp_path / "llama"), tiny.reviews, name="llama", epochs=4)
    (tmp_path / "run.yaml").write_text(text.replace("[classifier]", "[score]"))
    cli = LoRACLI(args=["fit", "--config", str(tmp_path / "run.yaml")])
    assert cli.model.backbone.config.pad_token_id == 3
    assert float(cli.trainer.callback_metrics["val/accuracy"]) > 0.7
