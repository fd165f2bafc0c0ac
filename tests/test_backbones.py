"""Backbones by one line, from the hub, a folder, timm, torchvision and GGUF files; a wrong name is answered."""

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM

from lora_lightning import LoRAConfig, LoRAError, huggingface, inject, merge
from lora_lightning.backbones.locate import directory_and_file, refuse_not_there
from lora_lightning.backbones.vision import timm_model, torchvision_model
from lora_lightning.cli.main import LoRACLI
from tests.factories import hf
from tests.tiny import VOCABULARY, config_text, words_tokenizer


def test_labels_dtype_attention_and_random_weights_are_as_asked_and_a_head_of_another_size_is_new(tiny, tmp_path):
    model = huggingface(tiny.bert, label_names=["good", "bad", "ugly"])
    assert (model.classifier.out_features, model.dtype, model.training) == (3, torch.float32, False)
    assert model.config.id2label == {0: "good", 1: "bad", 2: "ugly"}
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


def test_a_decoder_without_a_padding_token_classifies_batches(tiny, tmp_path):
    """With a tokenizer that has none either, as they come."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder, ids = tmp_path / "llama", {"eos_token_id": 3, "bos_token_id": 2}
    hf("LlamaModel", **shape, **ids, vocab_size=len(VOCABULARY)).save_pretrained(folder)
    words_tokenizer(VOCABULARY, split=Whitespace(), eos_token="[SEP]", unk_token="[UNK]").save_pretrained(folder)
    text = config_text(folder, tiny.reviews, name="llama", epochs=4)
    (tmp_path / "run.yaml").write_text(text.replace("[classifier]", "[score]"))
    cli = LoRACLI(args=["fit", "--config", str(tmp_path / "run.yaml")])
    assert cli.model.backbone.config.pad_token_id == 3
    assert float(cli.trainer.callback_metrics["val/accuracy"]) > 0.7


# ---- timm and torchvision


IMAGES = torch.zeros(2, 3, 32, 32)


def saved(model, file):
    torch.save({"state_dict": model.state_dict()}, file)
    return str(file)


def test_weights_of_a_file_fill_all_but_a_head_of_another_size(tmp_path):
    for make, name, head in (
        (timm_model, "test_efficientnet", "classifier"),
        (torchvision_model, "squeezenet1_1", "classifier.1"),
    ):
        none = {"pretrained": False} if make is timm_model else {"weights": None}
        whole = make(name, **none, num_classes=7)
        file = saved(whole, tmp_path / f"{name}.pth")
        again = make(name, num_classes=7, checkpoint_path=file)
        torch.testing.assert_close(again.eval()(IMAGES), whole.eval()(IMAGES))
        assert again.new_keys == []
        other = make(name, num_classes=3, checkpoint_path=file)
        assert sorted(other.new_keys) == [f"{head}.bias", f"{head}.weight"]
        assert other.eval()(IMAGES).shape == (2, 3)
        own = whole.state_dict()
        kept = {key: t for key, t in other.state_dict().items() if key not in other.new_keys}
        assert all(torch.equal(t, own[key]) for key, t in kept.items())


def test_models_of_torchvision_have_as_many_outputs_as_asked_and_keep_all_but_the_head(monkeypatch, tmp_path):
    from torchvision.models import ResNet18_Weights, get_model

    whole = get_model("resnet18")
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *args, **kwargs: whole.state_dict())
    model = torchvision_model("resnet18", "IMAGENET1K_V1", num_classes=5)
    assert model.new_keys == ["fc.weight", "fc.bias"]
    assert model.fc.out_features == 5
    assert torch.equal(model.layer4[1].conv2.weight, whole.layer4[1].conv2.weight)
    assert torchvision_model("resnet18", num_classes=1000).new_keys == []
    model = torchvision_model("lraspp_mobilenet_v3_large", weights=None, num_classes=4)
    assert model.eval()(torch.zeros(1, 3, 32, 32))["out"].shape == (1, 4, 32, 32)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: timm_model("tf_efficientnet_lit0"), "'tf_efficientnet_lit0'; did you mean 'tf_efficientnet_l"),
        (lambda d: timm_model("vit_tiny_patch16_224.no"), "timm has no weights 'no' of 'vit_tiny_patch16_224'"),
        (lambda d: timm_model("test_vit", pretrained=False, model_kwargs={"depht": 1}), "timm cannot make 'test_vit'"),
        (lambda d: torchvision_model("resnet81"), "torchvision has no model 'resnet81'; did you mean 'resnet18'"),
        (lambda d: torchvision_model("resnet18", "IMAGENET1K_V3"), r"'IMAGENET1K_V3'.*did you mean 'IMAGENET1K_V1'"),
        (lambda d: timm_model("test_vit", checkpoint_path=str(d / "none.pth")), "no file"),
        (
            lambda d: timm_model("test_vit", checkpoint_path=saved(timm_model("test_vit2", False), d / "x.pth")),
            r"x\.pth does not fit VisionTransformer \(\d+ keys\): ",
        ),
    ],
)  # fmt: skip
def test_a_mistake_in_a_name_of_timm_or_torchvision_is_named(make, said, tmp_path):
    with pytest.raises(LoRAError, match=said):
        make(tmp_path)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LoRAError, match=r"pip install 'lora_lightning\[vision\]'"):
        timm_model("test_vit")


# ---- the hub: a name is asked for once, and what can only be on this disk is said at once


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """The hub is at this port of this machine, and its cache is empty."""

    def place(port):
        endpoint = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        path = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + path)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    return place


@pytest.fixture
def closed():
    """A port on which nothing answers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("kind", ["model", "tokenizer", "set"])
def test_a_hub_that_cannot_be_reached_is_said_with_what_to_do(kind, hub_at, closed):
    hub_at(closed)
    with pytest.raises(LoRAError, match=rf"no {kind} 'org/bert': there is no such folder here, and the hub cannot be"):
        refuse_not_there(kind, "org/bert")


def test_a_hub_that_answers_is_asked_once_and_left_to_the_loader(hub_at, monkeypatch):
    asked = []

    def says_no(url):
        asked.append(url.partition("1:1/")[2])
        raise HfHubHTTPError("401", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", says_no)
    hub_at(1)
    refuse_not_there("model", "org/bert")
    refuse_not_there("set", "org/rows")
    assert asked == ["org/bert/resolve/main/config.json", "datasets/org/rows/resolve/main/README.md"]


def test_what_the_cache_or_the_disk_holds_is_asked_of_nobody(hub_at, closed, tmp_path):
    hub_at(closed)
    (tmp_path / "cache" / "models--org--bert").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    refuse_not_there("model", "org/bert")
    refuse_not_there("model", "mine")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./modles/bert", r"'./modles/bert': there is no such folder; did you mean 'models/bert'\?"),
        ("models/x/brt", r"there is no such folder$"),
        ("models/brt", r"no such folder here \(did you mean 'models/bert'\?\), nor .* HF_HUB_OFFLINE is set"),
    ],
)
def test_a_folder_that_is_not_there_is_told_without_the_hub(name, said, tmp_path):
    (tmp_path / "models" / "bert").mkdir(parents=True)
    with pytest.raises(LoRAError, match=said):
        refuse_not_there("model", name)


# ---- GGUF files: plain models, which save themselves like any other


LAYERS, WIDTH, HEADS, INNER, WORDS = 2, 32, 4, 64, 48


def write_llama(file: Path) -> dict[str, np.ndarray]:
    """A Llama of random weights as llama.cpp keeps one; returns its tensors by their names there."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(file), "llama")
    numbers = {
        "block_count": LAYERS, "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": INNER,
        "head_count": HEADS, "head_count_kv": HEADS, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 10000.0,
        "vocab_size": WORDS, "rope_dimension_count": WIDTH // HEADS,
    }  # fmt: skip
    for name, number in numbers.items():
        getattr(writer, f"add_{name}")(number)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (WORDS, WIDTH), "output": (WORDS, WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{i}.{name}"] = (WIDTH, WIDTH)
        shapes |= {f"blk.{i}.ffn_gate": (INNER, WIDTH), f"blk.{i}.ffn_up": (INNER, WIDTH)}
        shapes |= {f"blk.{i}.ffn_down": (WIDTH, INNER), f"blk.{i}.attn_norm": (WIDTH,), f"blk.{i}.ffn_norm": (WIDTH,)}
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_model_is_adapted_merged_and_saved_like_any_other(tmp_path):
    tensors = write_llama(tmp_path / "tiny.gguf")
    model = huggingface(str(tmp_path / "tiny.gguf"), auto_class="AutoModelForCausalLM")
    for name, key in {"ffn_up": "mlp.up_proj", "attn_v": "self_attn.v_proj"}.items():
        weight = model.get_parameter(f"model.layers.1.{key}.weight")
        torch.testing.assert_close(weight, torch.from_numpy(tensors[f"blk.1.{name}.weight"]))
    quantized = {"quantization_config": {"load_in_4bit": True}}
    with pytest.raises(LoRAError, match="is a GGUF file, which transformers reads as plain numbers"):
        huggingface(str(tmp_path / "tiny.gguf"), auto_class="AutoModelForCausalLM", model_kwargs=quantized)
    inject(model, LoRAConfig(r=2))
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected = model(ids).logits
    merge(model)
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert "quantization_config" not in again.config.to_dict()
    torch.testing.assert_close(again(ids).logits.detach(), expected, rtol=1e-4, atol=1e-4)


def test_names_of_other_things_stay_as_they_are(tmp_path):
    assert directory_and_file("org/model") == ("org/model", {})
    with pytest.raises(LoRAError, match=r"no file .*missing.gguf"):
        directory_and_file(str(tmp_path / "missing.gguf"))
