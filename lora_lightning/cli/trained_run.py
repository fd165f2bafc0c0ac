"""What a command takes from a trained run: its config, a checkpoint of it, and how its data are split and labelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.backbones.locate import resolve
from lora_lightning.cli.config_files import config_values, settings_of
from lora_lightning.cli.registry import FROM_CHECKPOINT
from lora_lightning.data.io.splits import split_name
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.checkpoints import run_folder as run

READS = {"predict": "predict", "test": "test", "validate": "validation"}
"""The split that a command reads."""


def with_run_config(args: list[str]) -> list[str]:
    """Put the run's config in front where a command on a trained run names none."""
    if not args or args[0] not in FROM_CHECKPOINT or config_values(args):
        return args
    checkpoint = next((one.value for one in settings_of(args) if one.key == "ckpt_path"), None)
    if not checkpoint or checkpoint in ("best", "last"):
        return args
    file = run.run_of_checkpoint(run.find_checkpoint(checkpoint)) / run.CONFIG
    if not file.is_file():
        raise LoRAError(f"no {run.CONFIG} beside the checkpoint '{checkpoint}': name the run's config with --config")
    return [args[0], "--config", str(file), *args[1:]]


def resolve_checkpoint(config: Any, command: str) -> None:
    """Turn `best`, `last`, `auto` or a folder in a command's config into a file, before Lightning sees it.

    Raises:
        LoRAError: the command needs a checkpoint, or there is none such.
    """
    path, runs, fits = config.get("ckpt_path"), Path(config.runs_dir) / config.name, command == "fit"
    if path is None and command in FROM_CHECKPOINT:
        raise LoRAError(f"{command} needs --ckpt_path: best, last, a run folder or a .ckpt file")
    if path is None or "://" in str(path) or path in ("hpc", "registry"):
        return
    if path == "auto" and not fits:
        raise LoRAError(f"--ckpt_path auto is for fit, which starts anew where there is none; {command}: best")
    if fits and path in ("auto", "last"):
        newest = run.newest_checkpoint(runs)
        if newest is None and path == "last":
            raise LoRAError(
                f"there is no checkpoint under '{runs}' to go on from: leave --ckpt_path out, or say --ckpt_path auto,"
                " which starts anew where there is none"
            )
        config.ckpt_path = None if newest is None else str(newest)
        return
    named = path in ("best", "last")
    if named and not runs.is_dir():
        raise LoRAError(
            f"no run under '{runs}' yet{run.similar_names(runs)}: fit first, or name a run with --ckpt_path"
        )
    which = path if named else "last" if fits else "best"
    config.ckpt_path = str(run.find_checkpoint(runs if named else path, which))


def use_run_data(config: Any, command: str, words: Sequence[str]) -> str | None:
    """Read a command's data as the checkpoint's run did, and return a short name of other data that a flag sets.

    A file or folder of `--data.path` is what to test or predict, every row of it: as a training set it would be split.
    The file that the run was trained on is split in a test as it was then, for the figures would be those of rows that
    it has learnt from. Label names that the run read from its training rows stay: rows to predict on have no labels,
    and other rows could give them other numbers.

    Args:
        config: the command's, in which path and labels are set.
        command: its name.
        words: the command line.

    Returns:
        The name of the file, folder or set without its suffix; None for the run's data.

    Raises:
        LoRAError: the run's file is split in another way, so that rows that it has learnt from would be tested on.
    """
    data, trained = config.get("data"), _data_of_run(config)
    if data is None:
        return None
    args, then = data.get("init_args") or {}, trained.get("init_args") or {}
    path, of_run = args.get("path"), then.get("path")
    same_file = isinstance(path, str) and isinstance(of_run, str) and _place(path) == _place(of_run)
    now = args.get("split") or {}
    for name, value in (then.get("split") or {}).items() if same_file else ():
        if name in now and now[name] != value:
            raise LoRAError(
                f"data.split.{name} is {now[name]}, and the checkpoint's run was trained with {value}: rows that it has"
                " learnt from would be validated and tested on; split as the run did"
            )
    if command == "fit":
        return None
    if args.get("label_names", "") is None and trained.get("class_path") == data.class_path:
        args["label_names"] = then.get("label_names")
    by_flag = any(word.startswith(("--data.path", "--data.init_args.path")) for word in words)
    split = READS.get(command)
    if not by_flag or split is None or path is None or (same_file and command != "predict"):
        return None
    if isinstance(path, str) and _is_one_set(_place(path)):
        args["path"] = {split: path}
    source = str(path if isinstance(path, str) else path.get(command, path.get(split, "data")))
    return Path(source.rstrip("/").rpartition("/")[2]).name.partition(".")[0] or "data"


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


def _place(path: str) -> Path:
    return Path(resolve(path)).resolve()


def _is_one_set(path: Path) -> bool:
    """Return whether the path is a file, or a folder without an entry that is named like a split."""
    if not path.is_dir():
        return path.is_file()
    has_splits = any(split_name(entry.name.partition(".")[0]) for entry in path.iterdir())
    return not has_splits and not (path / "dataset_dict.json").is_file()
