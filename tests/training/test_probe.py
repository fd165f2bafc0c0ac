"""A batch for models that come without data."""

import pytest
import torch
import transformers
from torch import nn

from lora_lightning import LoRAError
from lora_lightning.export.compare import outputs
from lora_lightning.export.probe_batch import MOST_ROWS, draw, from_batch
from tests.factories import bert, gpt, llama, sequential

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CODER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 50}
CODER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}


def gpt2_classifier():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, num_labels=3)
    return transformers.GPT2ForSequenceClassification(config)


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def bart_classifier():
    return transformers.BartForSequenceClassification(transformers.BartConfig(**CODER, num_labels=3))


def whisper():
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {**CODER, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, **ids}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes))


def wav2vec2():
    sizes = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    more = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 20}
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SMALL, **sizes, **more))


def spectrogram():
    sizes = {"num_mel_bins": 32, "max_length": 48, "patch_size": 16}
    return transformers.ASTForAudioClassification(transformers.ASTConfig(**SMALL, **sizes))


def clip():
    text = {**SMALL, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


FAMILIES = {
    "bert": (bert, {"input_ids": (2, 12), "attention_mask": (2, 12)}),
    "llama": (llama, {"input_ids": (2, 12), "attention_mask": (2, 12)}),
    "gpt_neox": (gpt, {"input_ids": (1, 12), "attention_mask": (1, 12)}),
    "gpt2 without a padding token": (gpt2_classifier, {"input_ids": (1, 12), "attention_mask": (1, 12)}),
    "t5": (t5, {"input_ids": (2, 12), "decoder_input_ids": (2, 12), "attention_mask": (2, 12)}),
    "bart": (bart_classifier, {"input_ids": (2, 12), "decoder_input_ids": (2, 12), "attention_mask": (2, 12)}),
    "vit": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
        {"pixel_values": (2, 3, 32, 32)},
    ),
    "clip": (clip, {"input_ids": (2, 12), "attention_mask": (2, 12), "pixel_values": (2, 3, 32, 32)}),
    "whisper": (whisper, {"input_features": (2, 8, 40), "decoder_input_ids": (2, 12)}),
    "wav2vec2": (wav2vec2, {"input_values": (2, 8000)}),
    "audio spectrogram": (spectrogram, {"input_values": (2, 48, 32)}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_drawn_from_the_config_that_the_model_takes(name):
    make, shapes = FAMILIES[name]
    model = make().eval()
    probe, again = draw(model), draw(model)
    assert {key: tuple(value.shape) for key, value in probe.inputs.items()} == shapes
    assert all(torch.equal(value, again.inputs[key]) for key, value in probe.inputs.items()), "the same each time"
    assert all(torch.isfinite(t).all() for t in outputs(model, probe.inputs))
    if "input_ids" in shapes:
        ids = probe.inputs["input_ids"]
        assert 0 <= int(ids.min()) <= int(ids.max()) < model.config.get_text_config().vocab_size
        assert len(ids.unique()) > 4


def test_timm_and_torchvision_say_their_own_size():
    import timm
    import torchvision

    small = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, embed_dim=16, num_heads=2)
    assert draw(small.eval()).inputs["x"].shape == (2, 3, 48, 48)
    assert draw(timm.create_model("resnet10t", num_classes=2).eval()).inputs["x"].shape == (2, 3, 176, 176)
    vit = torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32)
    assert draw(vit.eval()).inputs["x"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("example", [torch.ones(3, 8), (torch.ones(3, 8),), {"input": torch.ones(3, 8)}], ids=type)
def test_an_example_of_ones_own_is_taken(example):
    model = sequential()
    for probe in (draw(model, example), draw(with_example(model, example))):
        assert probe.inputs.keys() == {"input"}
        assert torch.equal(probe.inputs["input"], torch.ones(3, 8))


def with_example(model, example):
    model.example_input_array = example
    return model


def test_a_model_that_says_nothing_is_told_what_to_give():
    with pytest.raises(LoRAError, match="none could be drawn for Sequential: give the config a data section, or the"):
        draw(sequential())


def test_what_a_model_did_not_take_is_said():
    class Picky(transformers.BertModel):
        def forward(self, input_ids, structure):
            return structure

    config = transformers.BertConfig(**SMALL, vocab_size=20)
    with pytest.raises(LoRAError, match=r"tried input_ids: .*missing 1 required .*'structure'"):
        draw(Picky(config))


def test_a_batch_of_the_data_is_cut_to_its_first_rows():
    n = MOST_ROWS + 5
    batch = {"x": torch.randn(n, 3), "names": [str(i) for i in range(n)], "scale": 2.0, "labels": torch.zeros(n)}
    inputs = from_batch(batch).inputs
    assert torch.equal(inputs["x"], batch["x"][:MOST_ROWS])
    assert inputs["names"] == batch["names"][:MOST_ROWS]
    assert inputs["scale"] == 2.0
    assert "labels" not in inputs
    ragged = {"x": torch.randn(n, 3), "lengths": torch.tensor([n - 1, 1])}
    assert from_batch(ragged).inputs["x"].shape == (n, 3), "what is not by rows stays whole"


def test_a_part_of_a_transformers_model_is_no_such_model():
    assert isinstance(bert().bert.encoder.layer[0], nn.Module)
    with pytest.raises(LoRAError, match="none could be drawn for BertLayer"):
        draw(bert().bert.encoder.layer[0])
