"""Each strategy through the command on GPUs, by NCCL: one process where torch sees one GPU, two where it sees more."""

import json

import pytest
import torch

from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.process import REPOSITORY, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.xdist_group("gpus"),  # one test after another has them
]

COUNT = min(2, torch.cuda.device_count())
OVERLAYS = ("ddp", "fsdp2")
OFFLOAD = ["--trainer.strategy.init_args.cpu_offload", "true"]
CASES = {**{name: (name, []) for name in OVERLAYS}, "offloaded": ("fsdp2", OFFLOAD)}
SGD = '{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}'
"""AdamW would make steps of the size of lr out of gradients that are rounding."""


def fit(tiny, folder, name, overlay, count, *args):
    given = ["--config", tiny.config, "--config", REPOSITORY / f"configs/strategy/{overlay}.yaml", "--name", name]
    given += ["--trainer.accelerator", "gpu", "--trainer.devices", count]
    given += ["--model.optimizer", SGD, "--model.lr_scheduler", "null"]  # which would look ahead to max_epochs
    given += ["--data.init_args.batch_size", 16 // count, "--data.init_args.length_grouped", "false", *args]
    run("fit", *given, cwd=folder, timeout=600)
    return load_checkpoint(folder / "runs" / name / "version_0" / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """One process on one GPU."""
    return fit(tiny, tmp_path_factory.mktemp("alone"), "alone", "single", 1, "--trainer.max_epochs", 2)


@pytest.mark.parametrize("case", CASES)
def test_a_fit_that_goes_on_after_an_epoch_is_one_processs_and_is_evaluated_and_exported(tiny, tmp_path, alone, case):
    overlay, args = CASES[case]
    for more in (["--trainer.max_epochs", 1], ["--trainer.max_epochs", 2, "--ckpt_path", "last"]):
        ours = fit(tiny, tmp_path, case, overlay, COUNT, *args, *more)
    assert ours["global_step"] == alone["global_step"]
    assert ours["state_dict"].keys() == alone["state_dict"].keys()
    for key, value in alone["state_dict"].items():
        assert float((ours["state_dict"][key].cpu() - value.cpu()).abs().max() / value.abs().max()) < 1e-4, key
    for command in ("validate", "test", "predict", "export"):
        run(command, "--ckpt_path", f"runs/{case}", cwd=tmp_path, timeout=600)
    folder = tmp_path / "runs" / case / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert report["w0_unchanged"]
    assert report["export_max_rel_diff"] < 1e-5
    assert {"test_accuracy", "val_accuracy"} <= report.keys()
    rows = [json.loads(line)["row"] for line in (folder / "predict" / "predictions.jsonl").open()]
    assert rows == list(range(40))
