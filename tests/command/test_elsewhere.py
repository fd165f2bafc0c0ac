"""A run of many GPUs on a machine that has none: exported as it is, tested with an overlay, else one line."""

import pytest
import torch

from lora_lightning.cli.main import LoRACLI
from tests.command.process import REPOSITORY, mistake


@pytest.fixture
def of_many(trained):
    places = {"accelerator": "gpu", "devices": "8", "num_nodes": "2", "strategy": "ddp"}
    flags = [word for name, value in places.items() for word in (f"--trainer.{name}", value)]
    return ["--config", str(trained / "config.yaml"), *flags, "--ckpt_path", str(trained)]


def test_a_run_of_many_gpus_is_exported_in_one_process_anywhere(of_many, tmp_path):
    LoRACLI(args=["export", *of_many, "--formats", "adapter", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the line is for machines without a GPU")
def test_it_is_tested_on_one_device_with_an_overlay_and_said_in_one_line_without(of_many, monkeypatch, capsys):
    assert "torch sees no GPU here" in mistake(monkeypatch, capsys, "test", *of_many)
    cli = LoRACLI(args=["test", *of_many, "--config", str(REPOSITORY / "configs/strategy/single.yaml")])
    assert cli.trainer.world_size == 1
    assert float(cli.trainer.callback_metrics["test/accuracy"]) > 0.75
