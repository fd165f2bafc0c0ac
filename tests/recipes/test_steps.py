"""Recipes other than the papers': each is parsed, and runs a step on something tiny of its kind."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lora_lightning.cli.main import LoRACLI
from lora_lightning.lora.frozen.quantization import scheme
from tests.chats import CHATML, GEMMA, LLAMA3, MISTRAL, assistant, user
from tests.chats import make_tokenizer as chat_tokenizer
from tests.data.files import write
from tests.data.test_segmentation import make as make_masks
from tests.pictures import class_folders
from tests.recipes.recipe import files_of, parse, run_a_step, tiny_model
from tests.tiny_lm import make_lm, make_texts
from tests.tiny_pairs import COLOURS, TEMPLATE, WORDS, as_messages, make_tokenizer, preferences

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SPLIT = {"validation": 0.25, "test": 0.25}


def test_the_handbooks_values_are_in_the_recipe():
    config = parse(["preference/zephyr-7b-dpo.yaml"])
    lora, data = config.model.lora, config.data.init_args
    assert (lora.r, lora.alpha, lora.dropout, len(lora.target_modules)) == (16, 16, 0.05, 7)
    assert (config.model.task.init_args.beta, config.model.optimizer.init_args.lr) == (0.01, 5e-6)
    assert (data.max_length, data.max_prompt_length, data.batch_size) == (1024, 512, 4)


# ---- what is put in the place of what would be downloaded: arguments of `run_a_step`


def pairs(folder):
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=40, **SMALL)
    rows = [
        {"anchor": f"what colour is {c} {i}", "positive": f"it is {c} {i}", "negative": "no idea"}
        for i in range(10)
        for c in COLOURS
    ]
    path = write(folder / "rows.jsonl", rows)
    return {"model": tiny_model(folder / "model", config, WORDS), "data": {"path": str(path)}}


def captions(folder):
    text = {**SMALL, "vocab_size": 32, "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2}
    vision, clip = {**SMALL, "image_size": 8, "patch_size": 4}, folder / "clip"
    transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8).save_pretrained(clip)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    transformers.CLIPProcessor(images, make_tokenizer(clip)).save_pretrained(clip)
    rows = [{"image": f"{i}.png", "text": f"it is {COLOURS[i % 6]}"} for i in range(20)]
    for i, row in enumerate(rows):
        Image.fromarray(np.full((9, 9, 3), 12 * i, dtype=np.uint8)).save(folder / row["image"])
    return {
        "backbone": {"pretrained_model_name_or_path": str(clip), "random_weights": True},
        "data": {"path": str(write(folder / "rows.jsonl", rows)), "processor": str(clip)},
    }


def answers(kind, whole):
    sizes = {**SMALL, "vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_size": 32}

    def make(folder):
        config = getattr(transformers, kind)(**sizes)
        model = tiny_model(folder / "model", config, WORDS, chat_template=TEMPLATE, pair=False)
        rows = [{**row, "prompt": f"{row['prompt']} {i}"} for i, row in enumerate(preferences(30))]
        if not whole:
            return {"model": model, "data": {"path": str(write(folder / "rows.jsonl", rows))}}
        rows = [
            {c: row["prompt"] + row[c] for c in ("chosen", "rejected")} for row in map(as_messages, preferences(12))
        ]
        path = {split: str(write(folder / f"{split}.jsonl", rows)) for split in ("train", "validation")}
        half = {"model_kwargs": None, "dtype": "float32"}
        return {"model": model, "backbone": half, "data": {"path": path, "num_proc": None}}

    return make


def images(kind):
    def make(folder):
        masks = kind == "segformer"
        data = {"path": str((make_masks if masks else class_folders)(folder / "set")), "split": SPLIT, "image_size": 32}
        lora = ["--model.lora.r", "2"]
        if kind == "resnet":  # the basic blocks of the smaller one have no third convolution
            lora += ["--model.lora.target_modules", "[conv1, conv2]"]
            return {"backbone": {"model_name": "resnet18", "weights": None}, "data": data, "args": lora}
        if kind == "convnext":
            return {"backbone": {"model_name": "test_convnext", "pretrained": False}, "data": data, "args": lora}
        config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)
        if masks:
            config = transformers.SegformerConfig(
                num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 16], patch_sizes=[3, 3],
                strides=[2, 2], num_attention_heads=[1, 1], mlp_ratios=[1, 1], decoder_hidden_size=16,
            )  # fmt: skip
        processor = transformers.SegformerImageProcessor if masks else transformers.ViTImageProcessor
        config.save_pretrained(folder / "model")
        processor(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
        own = {"pretrained_model_name_or_path": str(folder / "model"), "random_weights": True}
        del data["image_size"]
        return {"backbone": own, "data": data | {"preprocessing": str(folder / "model")}, "args": lora}

    return make


MODELS = {
    "llama-3.2-1b": ("LlamaConfig", {"tie_word_embeddings": True}, LLAMA3),
    "llama-3.1-8b": ("LlamaConfig", {}, LLAMA3),
    "qwen3-4b": ("Qwen3Config", {"tie_word_embeddings": True}, CHATML),
    "gemma-3-1b": ("Gemma3TextConfig", {"sliding_window": 16}, GEMMA),
    "mistral-7b": ("MistralConfig", {"sliding_window": None}, MISTRAL),
}
"""Of each model its architecture, and the kind of chat template that it has."""
SETS = {
    "dolly": {"instruction": "Say sky.", "context": "Skies.", "response": "sky", "category": "open_qa"},
    "alpaca": {"instruction": "Say sky.", "input": "", "output": "sky"},
    "ultrachat": {"prompt": "Say.", "prompt_id": "1", "messages": [user("Say sky."), assistant("sky")] * 2},
    "own-jsonl": {"messages": [user("Say sky."), assistant("sky")]},
}
"""A row of each set, with its columns."""
CHATS = [*((model, "own-jsonl") for model in MODELS), *(("llama-3.2-1b", data) for data in SETS if data != "own-jsonl")]


def chats(model, data):
    def make(folder):
        (kind, options, template), sizes = MODELS[model], {"num_key_value_heads": 2, "head_dim": 8}
        sizes |= {**SMALL, "hidden_size": 32, "max_position_embeddings": 2048, "num_attention_heads": 4}
        tokenizer = chat_tokenizer(template)
        ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
        config = getattr(transformers, kind)(vocab_size=len(tokenizer), **sizes, **options, **ends)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        rows = str(write(folder / "rows.jsonl", [SETS[data]] * 100))
        given = parse(chat_files(model, data)).data.init_args.path
        path = dict.fromkeys(given, rows) if isinstance(given, dict) else rows
        return {
            "backbone": {"pretrained_model_name_or_path": str(folder / "model")},
            "data": {"path": path, "tokenizer": str(folder / "model"), "max_length": 256},
            "args": ["--trainer.precision", "bf16-base", "--trainer.val_check_interval", "1.0"],
        }

    return make


def texts(folder):
    wide = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "initializer_range": 0.02}  # for its ranks
    model = str(make_lm(folder / "model", "qwen3", num_hidden_layers=1, **wide))
    rows = write(folder / "rows.jsonl", [{"text": text} for text in make_texts(150)])
    data = {"path": str(rows), "tokenizer": model}
    whole = ["--trainer.val_check_interval", "1.0"]
    return {"backbone": {"pretrained_model_name_or_path": model}, "data": data, "args": whole}


def chat_files(model, data, *more):
    return ["lm/base.yaml", f"lm/models/{model}.yaml", f"lm/data/{data}.yaml", *more]


FOUND = {"val/loss", "val/mrr", "val/recall@1", "val/recall@5", "train/loss"}
STEPS = {
    **{f"{name} pairs": ([f"embedding/{name}-pairs.yaml"], pairs, FOUND) for name in ("minilm", "e5")},
    "captions": (["embedding/clip-image-text.yaml"], captions, FOUND),
    "smollm2": (["preference/smollm2-dpo.yaml"], answers("LlamaConfig", False), {"val/loss", "val/margin"}),
    "zephyr": (["preference/zephyr-7b-dpo.yaml"], answers("MistralConfig", True), {"val/loss"}),
    **{
        file: (["vision/base.yaml", file], images(kind), {"val/loss"})
        for file in files_of("vision")
        for kind in ("vit", "segformer", "convnext", "resnet")
        if kind in file
    },
    **{f"{model} {data}": (chat_files(model, data), chats(model, data), {"train/loss"}) for model, data in CHATS},
    "texts": (["lm/texts.yaml"], texts, {"train/loss"}),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_recipe_is_parsed_and_runs_a_step(name, tmp_path):
    files, make, figures = STEPS[name]
    config = parse(files)
    cli = run_a_step(files, tmp_path, **make(tmp_path))
    assert cli.trainer.global_step == 1
    assert figures | ({cli.model.task.monitor} if "vision" in name else set()) <= set(cli.trainer.callback_metrics)
    assert all(torch.isfinite(cli.trainer.callback_metrics[figure]) for figure in figures)
    modules, data = [row.module.rpartition(".")[2] for row in cli.model.report.modules], cli.datamodule
    if "vision" in name:
        assert config.model.lora.modules_to_save
        assert cli.model.task.num_classes == data.num_classes == (2 if "segformer" in name else 3)
    if name == "captions":
        assert {"text", "vision"} <= {part for row in cli.model.report.modules for part in row.module.split("_")}
    if name == "zephyr":
        assert len(modules) == 7
    if name == "texts":
        assert "position_ids" in data.encoded_rows("train").column_names
        assert {row.r for row in cli.model.report.modules} == {64}
    if files[0] == "lm/base.yaml":
        assert next(iter(data.encoded_rows("train")))["position_ids"].count(0) > 1  # packed
        assert {p.dtype for n, p in cli.model.backbone.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
        assert {*modules} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(("model", "data"), CHATS)
def test_every_model_and_every_set_are_parsed_with_the_same_values(model, data):
    stacks = {"bf16-base": chat_files(model, data), "nf4-base": chat_files(model, data, "lm/qlora.yaml")}
    stacks["texts"] = ["lm/texts.yaml", f"lm/models/{model}.yaml"]
    configs = {name: parse(files) for name, files in stacks.items()}
    names = {config.data.init_args.tokenizer for config in configs.values()}
    names |= {config.model.backbone.init_args.pretrained_model_name_or_path for config in configs.values()}
    assert len(names) == 1
    assert all(config.model.lora.alpha == 2 * config.model.lora.r for config in configs.values())
    assert configs.pop("texts").data.init_args.packing
    for precision, config in configs.items():
        assert (config.model.lora.r, config.model.lora.target_modules) == (16, "all-linear")
        assert config.trainer.precision == precision


@pytest.mark.slow
def test_a_fit_on_a_4_bit_base_is_exported(tmp_path):
    pytest.importorskip("bitsandbytes")
    model, data = "llama-3.1-8b", "own-jsonl"
    given = chats(model, data)(tmp_path)
    short = ["--trainer.fast_dev_run", "false", "--trainer.max_steps", "2", "--trainer.max_epochs", "-1"]
    given["args"] = [*given["args"], *short, "--trainer.precision", "nf4-base", "--runs_dir", str(tmp_path / "runs")]
    cli = run_a_step(chat_files(model, data, "lm/qlora.yaml"), tmp_path, **given)
    layer = cli.model.backbone.model.layers[0].mlp.up_proj
    assert "4-bit" in str(scheme(layer))
    assert (tmp_path / "runs/lm/version_0/samples.jsonl").is_file()
    LoRACLI(args=["export", "--ckpt_path", str(tmp_path / "runs/lm"), "--output_dir", str(tmp_path / "out")])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
