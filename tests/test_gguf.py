"""Backbones and tokenizers out of GGUF files: plain models, which save themselves like any other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_lightning import LoRAConfig, LoRAError, huggingface, inject, merge
from lora_lightning.backbones.gguf import directory_and_file

LAYERS, WIDTH, HEADS, INNER, WORDS = 2, 32, 4, 64, 48


def write_llama(file: Path) -> dict[str, np.ndarray]:
    """A Llama of random weights as llama.cpp keeps one; returns its tensors by their names there."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
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
