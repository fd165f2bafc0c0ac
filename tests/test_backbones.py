"""Backbones by one line: labels and padding flow in, and a wrong name is answered."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from lora_lightning import LoRAError, huggingface
from lora_lightning.cli.main import LoRACLI
from tests.tiny import VOCABULARY, config_text


def test_label_names_make_the_head_and_go_into_the_config(tiny):
    model = huggingface(tiny.bert, label_names=["good", "bad", "ugly"])
    assert model.classifier.out_features == 3
    assert model.config.id2label == {0: "good", 1: "bad", 2: "ugly"}
    assert model.dtype == torch.float32
    assert not model.training


def test_dtype_and_attention_are_those_asked_for(tiny):
    model = huggingface(tiny.bert, dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_random_weights_need_a_config_alone(tiny):
    first, second = (huggingface(tiny.bert, random_weights=True, auto_class="AutoModel") for _ in range(2))
    assert not torch.equal(first.embeddings.word_embeddings.weight, second.embeddings.word_embeddings.weight)


def test_an_unknown_class_names_its_neighbour(tiny):
    with pytest.raises(LoRAError, match="did you mean 'AutoModelForCausalLM'"):
        huggingface(tiny.bert, auto_class="AutoModelForCasualLM")


def test_weights_of_another_architecture_are_refused(tiny, tmp_path):
    with pytest.raises(LoRAError, match="belong to another architecture"):
        huggingface(tiny.bert, auto_class="LlamaForSequenceClassification")


def test_weights_for_fewer_layers_are_refused(tiny, tmp_path):
    model = huggingface(tiny.bert, auto_class="AutoModel")
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (tmp_path / "config.json").write_text(config)
    for auto_class in ("AutoModel", "AutoModelForSequenceClassification"):
        with pytest.raises(LoRAError, match=r"no values for 16 tensors .*encoder\.layer\.2"):
            huggingface(str(tmp_path), auto_class=auto_class)


def test_a_head_of_another_size_is_a_new_head(tiny, tmp_path):
    huggingface(tiny.bert, num_labels=3).save_pretrained(tmp_path)
    model = huggingface(str(tmp_path), num_labels=2)
    assert model.classifier.out_features == 2
    assert set(model.new_keys) == {"classifier.weight", "classifier.bias"}


def test_a_model_that_is_not_there_is_one_clear_error():
    with pytest.raises(LoRAError, match=r"no model './nowhere'"):
        huggingface("./nowhere")


def make_llama(folder):
    """A Llama and a tokenizer as they come: neither knows how to pad."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(**shape, vocab_size=len(VOCABULARY), eos_token_id=3, bos_token_id=2)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_a_decoder_without_a_padding_token_classifies_batches(tiny, tmp_path):
    text = config_text(make_llama(tmp_path / "llama"), tiny.reviews, name="llama", epochs=4)
    (tmp_path / "run.yaml").write_text(text.replace("[classifier]", "[score]"))
    cli = LoRACLI(args=["fit", "--config", str(tmp_path / "run.yaml")])
    assert cli.model.backbone.config.pad_token_id == 3
    assert float(cli.trainer.callback_metrics["val/accuracy"]) > 0.7
