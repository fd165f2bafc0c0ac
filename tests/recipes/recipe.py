"""Recipes in `configs/`, parsed as the command parses them, and run for a step on something tiny.

A recipe is a stack of files, of which the later win: `("glue/base.yaml", "glue/tasks/sst2.yaml")`. What it would
download is replaced by an overlay of one's own: a model of the same architecture whose config is tiny and whose weights
are random (`tiny_model`), and a file of a few rows with the same columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PretrainedConfig

from lora_lightning.cli.build import parse_run
from lora_lightning.cli.main import LoRACLI
from tests.command.process import REPOSITORY
from tests.tiny import words_tokenizer

CONFIGS = REPOSITORY / "configs"
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def files_of(folder: str) -> list[str]:
    """Every YAML under a folder of `configs/`, by its path there."""
    return sorted(str(path.relative_to(CONFIGS)) for path in (CONFIGS / folder).rglob("*.yaml"))


def head_of(file: str) -> str:
    """The comment at a file's top, as one line."""
    lines = (CONFIGS / file).read_text(encoding="utf-8").splitlines()
    head = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return " ".join(line.removeprefix("#").strip() for line in head)


def stacked(files: Sequence[str | Path]) -> list[str]:
    """The command's arguments for a stack of files, relative ones under `configs/`."""
    return [part for file in files for part in ("--config", str(CONFIGS / file))]


def parse(files: Sequence[str | Path], *args: str) -> Any:
    """The config of `fit` with every class and argument checked; nothing is built, read or downloaded."""
    return parse_run(["fit", *stacked(files), *args])


def tiny_model(
    folder: Path, config: PretrainedConfig, words: Iterable[str], *, chat_template: str | None = None, pair: bool = True
) -> Path:
    """A directory with a config, and a tokenizer of whole words; no weights: `random_weights` makes them.

    Args:
        config: of the recipe's architecture, and tiny. Its numbers for padding and the ends are set to the tokenizer's.
        words: what the tokenizer knows; with the special tokens they must fit the config's vocabulary.
        chat_template: of the tokenizer.
        pair: put the ends around a text and between two; without it a text is its words alone.
    """
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


def rows_file(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def run_a_step(
    files: Sequence[str | Path],
    folder: Path,
    *,
    model: Path | None = None,
    backbone: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    command: str = "fit",
    args: Sequence[str] = (),
) -> LoRACLI:
    """One batch of training and one of each validation set, in float32 on the CPU, with what is tiny put in.

    Args:
        files: the recipe.
        folder: where the overlay is written.
        model: a directory by `tiny_model`, in the place of a `huggingface` backbone and of the data's tokenizer.
        backbone: arguments of the backbone that are replaced, for any other.
        data: arguments of the DataModule that are replaced, such as `path`.
        args: more of the command's own, which win over all files.
    """
    own: dict[str, Any] = dict(backbone or {})
    inputs: dict[str, Any] = {"num_workers": 0, **(data or {})}
    if model is not None:
        own |= {"pretrained_model_name_or_path": str(model), "random_weights": True}
        inputs["tokenizer"] = str(model)
    here = {
        "accelerator": "cpu",
        "devices": 1,
        "strategy": "auto",
        "precision": "32-true",
        "enable_progress_bar": False,
    }
    overlay = {"trainer": here, "model": {"backbone": {"init_args": own}}, "data": {"init_args": inputs}}
    file = folder / "overlay.yaml"
    file.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    once = ["--trainer.fast_dev_run", "1"] if command != "export" else []
    return LoRACLI(args=[command, *stacked([*files, file]), *once, *args])
