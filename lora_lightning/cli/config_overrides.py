"""Values that one part of a command's config sets in another before anything is built.

The precision sets how a backbone loads: a cast after loading needs memory for the float32 weights, and quantization
happens on loading. A checkpoint's run sets the label names.
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
"""QLoRA's settings (arXiv 2305.14314): 4-bit NormalFloat, its constants quantized too."""

HUGGINGFACE = ("lora_lightning.backbones.huggingface", "huggingface")
"""By name, so that not every command imports transformers."""


@contextmanager
def precision_for_backbone(command: Any) -> Iterator[None]:
    """Within the block, a `huggingface` backbone in the command's config has the arguments for `trainer.precision`.

    The config's settings of dtype or quantization stay. Afterwards the config is restored, so that a later command may
    set another precision over a run's config.

    Raises:
        LoRAError: quantization is requested and bitsandbytes is not installed.
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
        # Modules that train in full are not quantized; this list replaces transformers' default, the head.
        saved = command.get("model.lora.modules_to_save")
        skipped = {"llm_int8_skip_modules": [*saved, "lm_head"]} if saved else {}
        args["model_kwargs"] = {"quantization_config": NF4 | skipped, **(before["model_kwargs"] or {})}
    try:
        yield
    finally:
        for name, value in before.items():
            args[name] = value


def rows_by_flag(command: Any, name: str, words: Sequence[str]) -> str | None:
    """Let a command on a trained run read all rows of `--data.path`, and return a short name of the data.

    Such a file or folder is what to test or predict; as a training set it would be split. The file that the run was
    trained on is split in a test as it was then, for the figures would be those of rows that it has learnt from.

    Args:
        command: the command's config, in which the path becomes that of the split that the command reads.
        name: of the command.
        words: the command line.

    Returns:
        The name of the file, folder or set without its suffix; None for the run's data.
    """
    flags = ("--data.path", "--data.init_args.path")
    by_flag = any(arg.partition("=")[0].startswith(flags) for arg in words)
    split = {"predict": "predict", "test": "test", "validate": "validation"}.get(name)
    path = command.get("data.init_args.path")
    if not by_flag or split is None or path is None:
        return None
    if name != "predict" and _splits_of_run(command) is not None:
        return None
    if isinstance(path, str) and _is_one_set(_place(path)):
        command.data.init_args.path = {split: path}
    source = str(path if isinstance(path, str) else path.get(name, path.get(split, "data")))
    return Path(source.rstrip("/").rpartition("/")[2]).name.partition(".")[0] or "data"


def refuse_other_split(command: Any) -> None:
    """Raise where a command splits the file of the checkpoint's run in another way than its fit did.

    Raises:
        LoRAError: rows that the run has learnt from would be validated or tested on.
    """
    then, now = _splits_of_run(command) or {}, command.get("data.init_args.split") or {}
    for name, value in then.items():
        if name in now and now[name] != value:
            raise LoRAError(
                f"data.split.{name} is {now[name]}, and the checkpoint's run was trained with {value}: rows that it has"
                " learnt from would be validated and tested on; split as the run did"
            )


def _splits_of_run(command: Any) -> dict[str, Any] | None:
    """How the checkpoint's run split its file; None where the command reads another one."""
    path, trained = command.get("data.init_args.path"), _data_of_run(command).get("init_args") or {}
    of_run = trained.get("path")
    if not isinstance(path, str) or not isinstance(of_run, str) or _place(path) != _place(of_run):
        return None
    return trained.get("split") or {}


def _place(path: str) -> Path:
    return Path(resolve(path)).resolve()


def _is_one_set(path: Path) -> bool:
    """Return whether the path is a file, or a folder without an entry that is named like a split."""
    if not path.is_dir():
        return path.is_file()
    has_splits = any(split_name(entry.name.partition(".")[0]) for entry in path.iterdir())
    return not has_splits and not (path / "dataset_dict.json").is_file()


def labels_of_run(command: Any) -> None:
    """Set the label names that the checkpoint's run read from its training rows, where the command's config has none.

    Rows to predict on have no labels, and other rows could give them other numbers.
    """
    data, trained = command.get("data"), _data_of_run(command)
    if data is None or data.get("init_args.label_names", "") is not None:
        return
    if trained.get("class_path") == data.class_path:
        data.init_args.label_names = (trained.get("init_args") or {}).get("label_names")


def _data_of_run(command: Any) -> dict[str, Any]:
    """The data section of the config of the checkpoint's run; empty where there is none on this machine.

    A file's path is absolute, of the folder in which the fit was started where that is above the run's.
    """
    checkpoint = str(command.get("ckpt_path") or "://")
    file = run.run_of_checkpoint(Path(checkpoint)) / run.CONFIG
    if "://" in checkpoint or not file.is_file():
        return {}
    config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    args = (config.get("data") or {}).get("init_args") or {}
    runs, folder = Path(str(config.get("runs_dir")), str(config.get("name"))), file.resolve().parent.parent
    if isinstance(args.get("path"), str) and folder.parts[-len(runs.parts) :] == runs.parts != folder.parts:
        there = folder.parents[len(runs.parts) - 1] / resolve(args["path"])
        args["path"] = str(there) if there.exists() else args["path"]
    return config.get("data") or {}


def with_run_config(args: list[str]) -> list[str]:
    """Put the run's config in front where a command on a trained run names none."""
    if not args or args[0] not in FROM_CHECKPOINT or any(a.split("=")[0] in ("-c", "--config") for a in args):
        return args
    checkpoint = next((a.partition("=")[2] for a in args if a.startswith("--ckpt_path=")), None)
    if "--ckpt_path" in args[:-1]:
        checkpoint = args[args.index("--ckpt_path") + 1]
    if checkpoint is None or checkpoint in ("best", "last"):
        return args
    file = run.run_of_checkpoint(run.find_checkpoint(checkpoint)) / run.CONFIG
    if not file.is_file():
        raise LoRAError(f"no {run.CONFIG} beside the checkpoint '{checkpoint}': name the run's config with --config")
    return [args[0], "--config", str(file), *args[1:]]


def _is_huggingface(backbone: Any) -> bool:
    module, _, name = str(getattr(backbone, "class_path", None) or "").rpartition(".")
    made_by = getattr(importlib.import_module(module), name, None) if module else None
    return (getattr(made_by, "__module__", ""), getattr(made_by, "__name__", "")) == HUGGINGFACE
