"""The laws on small random-weight models of the families that people bring."""

import dataclasses
import re
from functools import partial

import pytest
import timm
import torch
import transformers as tf
from torch import nn
from torchvision.models import VisionTransformer, shufflenet_v2_x0_5

from lora_lightning import LoRAConfig, inject
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.layers import LoRALinear, kind_of
from lora_lightning.lora.targets.output_heads import output_head
from lora_lightning.lora.targets.select import select
from tests.factories import hf
from tests.lora.kinds import bart, run_seq2seq
from tests.lora.laws import TOLERANCE, check_laws, stir

IDS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 4, 8, 6, 1, 2]])
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SMALL, "num_key_value_heads": 1, "vocab_size": 40, "pad_token_id": 0}
BERT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 32, "num_labels": 3}


def image(model, channels=3, size=32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)
    return x.to(next(model.parameters()).dtype)


def logits(model):
    return model(IDS).logits


def clip():
    text = {**SMALL, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 3}
    vision = {**SMALL, "image_size": 32, "patch_size": 16}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def run_clip(model):
    out = model(input_ids=IDS, pixel_values=image(model))
    return torch.cat([out.text_embeds, out.image_embeds])


def whisper():
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8, "vocab_size": 40}
    places = {"max_source_positions": 10, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1}
    special = {"eos_token_id": 2, "decoder_start_token_id": 1, "begin_suppress_tokens": None}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**layers, **sizes, **places, **special))


def run_whisper(model):
    generator = torch.Generator().manual_seed(3)
    mel = torch.randn(2, 8, 20, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
    return model(input_features=mel, decoder_input_ids=IDS).logits


class Translator(nn.Module):
    """`nn.Transformer` between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.transformer = nn.Transformer(16, 2, 2, 2, 24, batch_first=True)

    def forward(self, ids):
        return self.head(self.transformer(self.embed(ids), self.embed(ids.flip(1))))


def torchvision_vit():
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}
    model = VisionTransformer(image_size=32, patch_size=16, num_classes=5, **sizes)
    nn.init.normal_(model.heads.head.weight)  # zero in torchvision: no gradient would pass
    return model


timm_model = partial(timm.create_model, num_classes=5)
TIMM_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
TIMM_CONVNEXT = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}
MOE = ["experts.gate_up_proj", "experts.down_proj"]


def of(model, run=logits, config="", fields=None, **sizes):
    """A small model of transformers by its class, its output, and what is adapted."""
    return partial(hf, model, config, **sizes), run, fields or {}


def on_image(make, fields, size=32):
    def run(model):
        out = model(image(model, size=size))
        return out if isinstance(out, torch.Tensor) else out.logits

    return make, run, fields


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
OPT = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
CONVNEXT = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
OF_VIT = r".*(projection|q_proj|v_proj|query|value|fc1|dense)"
OF_WHISPER = ["conv1", "conv2", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
OF_CONVNEXT = {"target_modules": ["dwconv", "pwconv1", "pwconv2"], "rank_pattern": {"dwconv": 8}}
OF_TIMMS_CONVNEXT = {"target_modules": ["conv_dw", "fc1", "fc2"], "rank_pattern": {"conv_dw": 8}}

# name: (make, run, config)
FAMILIES = {
    "llama": of("LlamaForCausalLM", **GROUPED),
    "qwen2": of("Qwen2ForCausalLM", **GROUPED),
    "qwen3": of("Qwen3ForCausalLM", **GROUPED, head_dim=8),
    "gemma": of("GemmaForCausalLM", **GROUPED, head_dim=8),
    "gemma2": of("Gemma2ForCausalLM", **GROUPED, head_dim=8),
    "gemma3 with its embedding": of(
        "Gemma3ForCausalLM",
        config="Gemma3TextConfig",
        fields={"target_modules": ["embed_tokens", "q_proj", "down_proj"]},
        **GROUPED,
        head_dim=8,
    ),
    "mistral": of("MistralForCausalLM", **GROUPED),
    "mixtral": of("MixtralForCausalLM", fields={"target_parameters": MOE}, **GROUPED, num_local_experts=2),
    "phi": of("PhiForCausalLM", **SMALL, vocab_size=40),
    "phi3 in parts": of(
        "Phi3ForCausalLM", fields={"slices": {"qkv_proj": ["q", "v"], "gate_up_proj": ["up"]}}, **GROUPED
    ),
    "gpt2": of("GPT2LMHeadModel", config="GPT2Config", **GPT2),
    "gpt2 in parts": of(
        "GPT2LMHeadModel",
        config="GPT2Config",
        fields={"target_modules": ["c_attn"], "slices": {"c_attn": ["q", "v"]}},
        **GPT2,
    ),
    "gpt-neox": of("GPTNeoXForCausalLM", fields={"slices": {"query_key_value": ["q", "v"]}}, **SMALL, vocab_size=40),
    "opt": of("OPTForCausalLM", **OPT),
    "bert": of("BertForSequenceClassification", **BERT),
    "roberta": of("RobertaForSequenceClassification", **BERT),
    "deberta-v2": of("DebertaV2ForSequenceClassification", **DEBERTA),
    "t5": of("T5ForConditionalGeneration", run_seq2seq, **T5),
    "bart": (bart, run_seq2seq, {}),
    "vit": on_image(
        of("ViTForImageClassification", **SMALL, image_size=32, patch_size=16)[0], {"target_modules": OF_VIT}
    ),
    "resnet": on_image(of("ResNetForImageClassification", **RESNET)[0], {"target_modules": ["convolution"]}),
    "convnext": on_image(of("ConvNextForImageClassification", **CONVNEXT)[0], OF_CONVNEXT),
    "clip": (clip, run_clip, {}),
    "whisper": (whisper, run_whisper, {"target_modules": OF_WHISPER}),
    "nn.Transformer": (Translator, lambda model: model(IDS), {}),
    "timm vit": on_image(partial(timm_model, "vit_tiny_patch16_224", **TIMM_VIT), {"slices": {"qkv": ["q", "v"]}}),
    "timm resnet": on_image(
        partial(timm_model, "resnet10t", channels=(4, 4, 8, 8), stem_width=4, zero_init_last=False),
        {"target_modules": r"conv1\.[036]|layer\d\.0\.conv\d"},
    ),
    "timm convnext": on_image(partial(timm_model, "convnext_atto", **TIMM_CONVNEXT), OF_TIMMS_CONVNEXT),
    "torchvision shufflenet": on_image(
        partial(shufflenet_v2_x0_5, num_classes=5), {"target_modules": r"stage2\..*branch2\.[05]"}, size=16
    ),
    "torchvision vit": on_image(torchvision_vit, {}),
}


def build(family, dtype=torch.float32):
    """The same weights each time, in eval mode."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]().to(dtype)
    if family == "mixtral" and dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    for name, parameter in model.named_parameters():
        if "layer_scale" in name or name.endswith("gamma"):
            nn.init.ones_(parameter)  # 1e-6 at first: no adapter behind it would count
        elif family == "torchvision shufflenet" and name == "fc.bias":
            nn.init.zeros_(parameter)  # all of the output at first
    return model.eval().requires_grad_(False)


def with_options(model, chosen):
    """`chosen` with every option that all the layers which it selects have."""
    targets = select(model, chosen).targets
    alone = not any(t.settings.slices for t in targets)
    options = {"use_rslora": True, "use_dora": alone and all(t.kind.dora_dim is not None for t in targets)}
    ends = [t.name.rpartition(".")[2] for t in targets]
    linear = [end for end, t in zip(ends, targets, strict=True) if t.kind is LoRALinear]
    options["alpha_pattern"] = {ends[-1]: 7.0}
    options["rank_pattern"] = chosen.rank_pattern | ({linear[-1]: 3} if linear else {})
    if not chosen.target_parameters:  # which refuse it
        options |= {"dropout": 0.1, "dropout_pattern": {ends[-1]: 0.3}}
    if any(isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None for module in model.modules()):
        options["bias"] = "all"
    options["modules_to_save"] = [name for name in output_head(model) if name in dict(model.named_modules())]
    return dataclasses.replace(chosen, **options)


IN_TURN = [(family, (torch.float32, torch.bfloat16)[i % 2]) for i, family in enumerate(FAMILIES)]


@pytest.mark.parametrize(("family", "dtype"), [*((family, torch.float64) for family in FAMILIES), *IN_TURN], ids=str)
def test_laws(family, dtype, tmp_path):
    """With every option in float64."""
    _, run, fields = FAMILIES[family]
    chosen = LoRAConfig(**{"r": 2, "alpha": 4.0, **fields})
    if dtype == torch.float64:
        chosen = with_options(build(family), chosen)
    # In bfloat16 rounding is passed on from layer to layer, here of models with random weights.
    tolerance = {torch.bfloat16: 0.3}.get(dtype, 10 * TOLERANCE[dtype])
    make = partial(build, family, dtype)
    check_laws(make, run, chosen, dtype, tmp_path, tolerance=tolerance, size=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_silent_miss(family):
    """Each layer of a kind that can be adapted is reached by a gradient, or refused by its name."""
    model, run = build(family), FAMILIES[family][1]
    wanted = {name for name, module in model.named_modules() if kind_of(module)}
    refused = set()
    while True:
        try:
            report = inject(model, LoRAConfig(r=1, target_modules=sorted(wanted - refused)))
            break
        except TargetError as error:
            refused.add(re.search(r"'([^']+)'", str(error)).group(1))
    assert refused <= wanted
    assert {row.module for row in report.modules} == wanted - refused
    run(stir(model, size=0.1)).double().pow(2).sum().backward()
    assert not [
        name for name, layer in adapted_layers(model) if layer.lora_B.grad is None or not layer.lora_B.grad.any()
    ]
