"""Builds a run's parts from a config or a checkpoint as a command does, and starts nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer

from lora_lightning.cli.main import LoRACLI
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.module import LoRAModule

ALONE = ("--trainer.logger=false", "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.num_nodes=1")
"""Flags for one process that writes nothing."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run."""

    config: Namespace
    """The command's parsed config."""
    parser: Any
    """The command's parser, which checks further flags."""
    module: LoRAModule
    data: LightningDataModule | None
    trainer: Trainer | None
    """None where it was not requested."""

    def validate(self) -> dict[str, float]:
        """Return the validation set's metrics with the adapter that the module has now; none without data."""
        if self.data is None or self.trainer is None:
            return {}
        sets = self.trainer.validate(self.module, datamodule=self.data, verbose=False)
        return {name: value for metrics in sets for name, value in metrics.items()}


def build_run(args: Sequence[str], edit: Callable[[Namespace], None] | None = None, *, trainer: bool = True) -> Run:
    """Make what a command line describes: data, module and Trainer, as `fit` would have them before it begins.

    Args:
        args: a command and its flags, such as `["fit", "-c", "configs/demo.yaml"]`.
        edit: changes the command's config in place before anything is built: `config.data = None` builds without data,
            and `edit` then sets what the model reads from the data.
        trainer: False builds no Trainer, callbacks and loggers.

    Raises:
        LoRAError: an object of ours refuses its arguments.
        SystemExit: the command refuses them; its line is on the screen.
    """
    cli = LoRACLI(args=list(args), until="trainer" if trainer else "module", edit=edit)
    if not isinstance(cli.model, LoRAModule):
        raise LoRAError(f"expected a LoRAModule, got {type(cli.model).__name__}")
    return Run(config=cli.command, parser=cli.parser, module=cli.model, data=cli.datamodule, trainer=cli.trainer)


@functools.cache
def run_parser(command: str) -> Any:
    """Return the parser of `fit`, `test` and the like. It is made once, since that takes a second."""
    return LoRACLI(args=[command], until="parser").parser


def parse_run(args: Sequence[str]) -> Namespace:
    """Return the command's config with every class and argument checked; nothing is made, read or downloaded.

    Raises:
        SystemExit: the command refuses it; its line is on the screen.
    """
    return run_parser(args[0]).parse_args(list(args))[args[0]]  # type: ignore[no-any-return]


def open_run(checkpoint: Path) -> Run:
    """Build what the config beside a checkpoint describes, and load the checkpoint.

    Raises:
        LoRAError: there is no config, its parts cannot be made, or the checkpoint does not fit them.
    """
    config = run.run_of_checkpoint(checkpoint) / run.CONFIG
    if not config.is_file():
        raise LoRAError(f"no {run.CONFIG} beside the checkpoint '{checkpoint}': name the run's own folder")
    content = run.load_checkpoint(checkpoint)
    built = build_run(["export", "--config", str(config), "--ckpt_path", str(checkpoint), *ALONE])
    assert built.trainer is not None
    built.module.load_trained(content, built.trainer)
    built.module.eval()
    return built
