"""Places where a module's weight is read and the module not called: handled, or refused by name (law 4)."""

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from lora_lightning import inject, merge, remove
from lora_lightning.lora.errors import TargetError
from tests.lora.kinds import deberta, encoder_layer, run_attended
from tests.lora.laws import config, relative, stir


@torch.no_grad()
def test_a_parameter_and_a_module_of_one_attention_together():
    model = encoder_layer().eval()
    plain = run_attended(model)
    inject(model, config(target_modules=["out_proj"], target_parameters=["self_attn.in_proj_weight"]))
    assert torch.equal(run_attended(model), plain)
    adapted = run_attended(stir(model))
    assert relative(adapted, plain) > 1e-3
    merge(model)
    assert relative(run_attended(model), adapted) < 1e-5


OF_THE_TABLE = [{field: ["rel_embeddings"]} for field in ("target_modules", "modules_to_save")]
OF_THE_TABLE += [{"trainable_token_indices": {"rel_embeddings": [1]}}]


@pytest.mark.parametrize("fields", OF_THE_TABLE, ids=str)
def test_debertas_table_which_its_encoder_reads_whole_is_refused_by_name(fields):
    model = deberta()
    keys = list(model.state_dict())
    with pytest.raises(TargetError, match=r"'encoder.rel_embeddings': DebertaV2Encoder reads its weight"):
        inject(model, config(**fields))
    assert list(model.state_dict()) == keys


def readers():
    """Attentions of the table with an input that goes through them, and the children whose weight they read."""
    from timm.models.beit import Attention
    from timm.models.eva import EvaAttention
    from timm.models.swin_transformer_v2 import WindowAttention
    from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    pixels, tokens = torch.randn(2, 4, 4, 8), torch.randn(2, 4, 8)
    return {
        "swin": (ShiftedWindowAttention(8, [2, 2], [0, 0], 2), pixels, ["qkv", "proj"]),
        "swin_v2": (ShiftedWindowAttentionV2(8, [2, 2], [0, 0], 2), pixels, ["qkv", "proj"]),
        "beit": (Attention(8, 2, qkv_bias=True), tokens, ["qkv"]),
        "eva": (EvaAttention(8, 2, qkv_bias=True, norm_layer=nn.LayerNorm), tokens, ["qkv"]),
        "timm's swin_v2": (WindowAttention(8, (2, 2), 2), tokens, ["qkv"]),
        "wavlm": (WavLMAttention(8, 2), tokens, ["q_proj", "k_proj", "v_proj", "out_proj"]),
    }


@pytest.mark.parametrize("name", ["swin", "swin_v2", "beit", "eva", "timm's swin_v2", "wavlm"])
def test_a_layer_whose_parent_reads_its_weight_is_refused_by_name_and_left_out_of_all_linear(name):
    """And the parent really does: it never calls the child. Where a later release does, its row can go."""
    module, x, children = readers()[name]
    called = []
    for child in children:
        module.get_submodule(child).register_forward_hook(lambda *_, child=child: called.append(child))
    module(x)
    assert not called
    model = nn.ModuleDict({"attn": module, "up": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    for child in children:
        refusal = rf"cannot adapt 'attn\.{child}': {type(module).__name__} reads its weight"
        with pytest.raises(TargetError, match=refusal):
            inject(model, config(target_modules=[child]))
    report = inject(model, config(target_modules="all-linear"))
    assert {f"attn.{child}" for child in children} <= report.skipped.keys()
    assert "up" in {row.module for row in report.modules}


def test_mambas_projections_which_its_kernels_read_are_left_out_of_all_linear():
    sizes = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 4, "vocab_size": 20}
    report = inject(MambaForCausalLM(MambaConfig(**sizes)), config(target_modules="all-linear"))
    assert [row.module for row in report.modules] == ["backbone.layers.0.mixer.in_proj"]
    left = {f"backbone.layers.0.mixer.{child}" for child in ("x_proj", "dt_proj", "out_proj")}
    assert left <= report.skipped.keys()


@pytest.mark.parametrize("nested", [True, False])
def test_what_torchs_encoder_lets_one_assign_can_be_assigned_after_injection(nested):
    model = nn.TransformerEncoder(encoder_layer()[0], 2).eval()
    inject(model, config(target_modules=["linear1"]))
    model.use_nested_tensor, model.layers[0].activation_relu_or_gelu = nested, 2
    remove(model)
    assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == (nested, 2)
