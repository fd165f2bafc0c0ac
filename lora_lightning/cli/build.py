"""A trained run from its folder: its module with the checkpoint's adapter in it, its data, and a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import LightningDataModule, Trainer

from lora_lightning.cli.main import LoRACLI
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.precision import convert


class _Opening(LoRACLI):
    """Everything is made and nothing is run."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


ALONE = [
    "--trainer.logger",
    "false",
    "--trainer.strategy",
    "auto",
    "--trainer.devices",
    "1",
    "--trainer.num_nodes",
    "1",
]
"""One process, which leaves nothing behind."""


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A run's parts."""

    module: LoRAModule
    trainer: Trainer
    data: LightningDataModule | None

    def validate(self) -> dict[str, float]:
        """The validation set's figures with the adapter that the module has now; none without data."""
        if self.data is None:
            return {}
        found = self.trainer.validate(self.module, datamodule=self.data, verbose=False)
        return {name: value for figures in found for name, value in figures.items()}


def open_run(checkpoint: Path) -> OpenedRun:
    """Build what the config beside a checkpoint describes, and load the checkpoint.

    Raises:
        LoRAError: there is no config, its parts cannot be made, or the checkpoint does not fit them.
    """
    config = run.run_of_checkpoint(checkpoint) / run.CONFIG
    if not config.is_file():
        raise LoRAError(f"no {run.CONFIG} beside the checkpoint '{checkpoint}': name the run's own folder")
    content = run.load_checkpoint(checkpoint)
    cli = _Opening(args=["export", "--config", str(config), "--ckpt_path", str(checkpoint), *ALONE])
    module = cli.model
    assert isinstance(module, LoRAModule)
    convert(module, cli.trainer.precision_plugin)  # W0 as the fit had it, whose fingerprint the checkpoint holds
    module.configure_model()
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    module.eval()
    return OpenedRun(module=module, trainer=cli.trainer, data=cli.datamodule)
