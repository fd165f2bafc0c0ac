"""Recipes in `configs/`, parsed as the command parses them, and run for a step on something tiny.

A recipe is a stack of files, of which the later win. What it would download is replaced: by a model of the same
architecture whose config is tiny and whose weights are random, and a file of a few rows with the same columns.
"""

import yaml
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from lora_lightning.cli.build import parse_run
from lora_lightning.cli.main import LoRACLI
from tests.command.process import REPOSITORY
from tests.tiny import words_tokenizer

CONFIGS = REPOSITORY / "configs"
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def files_of(folder):
    """Every YAML under a folder of `configs/`, by its path there."""
    return sorted(str(path.relative_to(CONFIGS)) for path in (CONFIGS / folder).rglob("*.yaml"))


def stacked(files):
    """The command's arguments for a stack of files, relative ones under `configs/`."""
    return [part for file in files for part in ("--config", str(CONFIGS / file))]


def parse(files, *args):
    """The config of `fit` with every class and argument checked; nothing is built, read or downloaded."""
    return parse_run(["fit", *stacked(files), *args])


def tiny_model(folder, config, words, *, chat_template=None, pair=True):
    """A directory with a config and a tokenizer of these words, which with `pair` puts the ends around texts."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL.values(), *words]))}
    text = config.get_text_config()
    assert len(vocabulary) <= text.vocab_size, f"vocab_size must be at least {len(vocabulary)}"
    ends = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(SPECIAL[name], vocabulary[SPECIAL[name]]) for name in ("bos_token", "eos_token")],
    )
    options = {"model_input_names": ["input_ids", "attention_mask"], "chat_template": chat_template, **SPECIAL}
    words_tokenizer(vocabulary, split=Whitespace(), ends=ends if pair else None, **options).save_pretrained(folder)
    text.update({f"{name}_id": vocabulary[SPECIAL[name]] for name in ("bos_token", "pad_token", "eos_token")})
    config.save_pretrained(folder)
    return folder


def run_a_step(files, folder, *, model=None, backbone=None, data=None, args=()):
    """One batch of training and one of each validation set, in float32 on the CPU, with what is tiny put in.

    `model` is a directory by `tiny_model`, for the backbone and the data's tokenizer; `backbone` and `data` hold
    arguments that are replaced; `args` win over all files.
    """
    own, inputs = dict(backbone or {}), {"num_workers": 0, **(data or {})}
    if model is not None:
        own |= {"pretrained_model_name_or_path": str(model), "random_weights": True}
        inputs["tokenizer"] = str(model)
    here = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true"}
    here["enable_progress_bar"] = False
    overlay = {"trainer": here, "model": {"backbone": {"init_args": own}}, "data": {"init_args": inputs}}
    file = folder / "overlay.yaml"
    file.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    return LoRACLI(args=["fit", *stacked([*files, file]), "--trainer.fast_dev_run", "1", *args])
