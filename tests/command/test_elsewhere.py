"""A run of many GPUs on a machine that has none: exported as it is, tested with an overlay, else one line."""

import pytest
import torch

from lora_lightning.__main__ import main
from lora_lightning.cli.main import LoRACLI
from tests.command.process import REPOSITORY

MANY = [
    "--trainer.accelerator",
    "gpu",
    "--trainer.devices",
    "8",
    "--trainer.num_nodes",
    "2",
    "--trainer.strategy",
    "ddp",
]


@pytest.fixture
def of_many(trained):
    return ["--config", str(trained / "config.yaml"), *MANY, "--ckpt_path", str(trained)]


def test_a_run_of_many_gpus_is_exported_in_one_process_anywhere(of_many, tmp_path):
    LoRACLI(args=["export", *of_many, "--formats", "adapter", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the line is for machines without a GPU")
def test_it_is_tested_on_one_device_with_an_overlay_and_said_in_one_line_without(of_many, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lora-lightning", "test", *of_many])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "--trainer.accelerator gpu, and torch sees no GPU here" in line
    cli = LoRACLI(args=["test", *of_many, "--config", str(REPOSITORY / "configs/strategy/single.yaml")])
    assert cli.trainer.world_size == 1
    assert float(cli.trainer.callback_metrics["test/accuracy"]) > 0.75
