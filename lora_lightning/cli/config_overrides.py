"""What one part of a command's config says to another, before anything is made of it.

The precision says of W0 how a backbone can load itself: a cast after loading would hold the float32 weights first, and
what is to be quantized has to be when it is loaded. A checkpoint's run says what its labels are.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import yaml

from lora_lightning.backbones.locate import resolve
from lora_lightning.backbones.tokenizers import TRUSTED
from lora_lightning.cli.registry import FROM_CHECKPOINT
from lora_lightning.data.io.splits import split_name
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.precision import BaseWord

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
"""QLoRA's own (arXiv 2305.14314): 4-bit NormalFloat, its constants quantized too."""

HUGGINGFACE = ("lora_lightning.backbones.huggingface", "huggingface")
"""By name: transformers is not to be loaded for every command."""


@contextmanager
def precision_for_backbone(command: Any) -> Iterator[None]:
    """Within the block, a `huggingface` backbone in the command's config has what `trainer.precision` means.

    What the config itself says of dtype or quantization stays. Afterwards the config is as it was: each command works
    it out anew, and another precision over a run's own config finds nothing of this one.

    Raises:
        LoRAError: quantization is asked for and bitsandbytes is not installed.
    """
    precision, backbone = command.get("trainer.precision"), command.get("model.backbone")
    if not _is_huggingface(backbone):
        yield
        return
    args = backbone.init_args
    if (args.get("model_kwargs") or {}).get("trust_remote_code"):
        TRUSTED.add(str(args.pretrained_model_name_or_path))
    if precision not in get_args(BaseWord):
        yield
        return
    before = {name: args.get(name) for name in ("dtype", "model_kwargs")}
    args["dtype"] = before["dtype"] or "bfloat16"
    if precision == "nf4-base":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise LoRAError("precision nf4-base needs bitsandbytes: pip install 'lora_lightning[qlora]'")
        # What trains in full is not quantized; a list of one's own takes the place of transformers' own, the head.
        saved = command.get("model.lora.modules_to_save")
        skipped = {"llm_int8_skip_modules": [*saved, "lm_head"]} if saved else {}
        args["model_kwargs"] = {"quantization_config": NF4 | skipped, **(before["model_kwargs"] or {})}
    try:
        yield
    finally:
        for name, value in before.items():
            args[name] = value


def rows_by_flag(command: Any, name: str, given: Sequence[str]) -> str | None:
    """Take all rows of what a command on a trained run is given by `--data.path`, and call the data by a short name.

    A file or folder that is named so holds what to test or predict; as the training set it would be split, and a part
    of it taken.

    Args:
        command: the command's config, in which the path becomes that of the split which the command reads.
        name: of the command.
        given: the command line.

    Returns:
        The name of the file, folder or set less its suffix; None where the run's own data are taken.
    """
    flags = ("--data.path", "--data.init_args.path")
    by_flag = any(arg.partition("=")[0].startswith(flags) for arg in given)
    split = {"predict": "predict", "test": "test", "validate": "validation"}.get(name)
    path = command.get("data.init_args.path")
    if not by_flag or split is None or path is None:
        return None
    if isinstance(path, str) and _is_one_set(Path(resolve(path))):
        command.data.init_args.path = {split: path}
    location = str(path if isinstance(path, str) else path.get(name, path.get(split, "data")))
    return Path(location.rstrip("/").rpartition("/")[2]).name.partition(".")[0] or "data"


def _is_one_set(path: Path) -> bool:
    """Return whether the path is a file, or a folder in which nothing is called as a split is."""
    if not path.is_dir():
        return path.is_file()
    named = any(split_name(one.name.partition(".")[0]) for one in path.iterdir())
    return not named and not (path / "dataset_dict.json").is_file()


def labels_of_run(command: Any) -> None:
    """Set the label names that the checkpoint's run read off its training rows, where the command's config says none.

    Rows to predict on have none to read, and other rows would number them in another way.
    """
    data, checkpoint = command.get("data"), str(command.get("ckpt_path") or "://")
    file = run.run_of_checkpoint(Path(checkpoint)) / run.CONFIG
    if data is None or data.get("init_args.label_names", "") is not None or "://" in checkpoint or not file.is_file():
        return
    then = ((yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("data")) or {}
    if then.get("class_path") == data.class_path:
        data.init_args.label_names = (then.get("init_args") or {}).get("label_names")


def with_run_config(args: list[str]) -> list[str]:
    """Put the run's own config in front where a command on a trained run names no other."""
    if not args or args[0] not in FROM_CHECKPOINT or any(a.split("=")[0] in ("-c", "--config") for a in args):
        return args
    given = next((a.partition("=")[2] for a in args if a.startswith("--ckpt_path=")), None)
    if "--ckpt_path" in args[:-1]:
        given = args[args.index("--ckpt_path") + 1]
    if given is None or given in ("best", "last"):
        return args
    file = run.run_of_checkpoint(run.find_checkpoint(given)) / run.CONFIG
    if not file.is_file():
        raise LoRAError(f"no {run.CONFIG} beside the checkpoint '{given}': name the run's config with --config")
    return [args[0], "--config", str(file), *args[1:]]


def _is_huggingface(backbone: Any) -> bool:
    module, _, name = str(getattr(backbone, "class_path", None) or "").rpartition(".")
    made_by = getattr(importlib.import_module(module), name, None) if module else None
    return (getattr(made_by, "__module__", ""), getattr(made_by, "__name__", "")) == HUGGINGFACE
