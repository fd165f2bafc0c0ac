"""What is counted is what was trained on, once, and what is timed is training."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoTokenizer

from lora_lightning import LoRAConfig, StepFigures, Throughput
from lora_lightning.tasks.base import examples_in, tokens_in
from lora_lightning.training.callbacks import steps
from lora_lightning.training.tracking.loggers import ContinuedCSVLogger
from tests.command.process import run
from tests.training.conftest import by_step, finished
from tests.training.resuming import logged
from tests.training.small import Vision, fit, loader, trainer_of


@pytest.mark.slow
def test_two_processes_make_one_wandb_run_and_count_each_example_once(tiny, make_data, tmp_path):
    """Batches of 7 over 120 rows leave the processes unequal shares, evened out by rows that must not count."""
    args = ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    args += ["--trainer.max_epochs", 1, "--trainer.log_every_n_steps", 2, "--trainer.accumulate_grad_batches", 2]
    args += ["--trainer.logger+=lora_lightning.WandbLogger", "--trainer.logger.save_dir", tmp_path / "runs"]
    args += ["--data.init_args.batch_size", 7, "--data.init_args.max_length", 9]
    keyless = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "none"), "OMP_NUM_THREADS": "1"}
    run("fit", "-c", tiny.config, *args, cwd=tmp_path, timeout=400, **keyless)
    (tracked,) = finished(tmp_path / "runs")
    assert tracked.exit_code == 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    data = make_data()
    data.setup("fit")
    texts = data.tables["train"]["text"]
    ids = AutoTokenizer.from_pretrained(tiny.bert)(list(texts), truncation=True, max_length=9)["input_ids"]
    seen = [report[name] for name in ("processes", "samples_seen", "tokens_seen")]
    assert seen == [2, len(texts), sum(map(len, ids))]
    log = by_step(folder)
    for name in ("throughput/tokens_per_second", "grad_norm/B", "lr", "val/accuracy"):
        assert tracked.points(name) == pytest.approx(log[name])


class Clock(Callback):
    now = 0.0  # passes only in validations, 300 s each, and in steps, 2 s each

    def on_validation_epoch_start(self, trainer, pl_module):
        self.now += 300

    def on_before_backward(self, trainer, pl_module, loss):
        self.now += 2


def test_time_is_that_of_training_alone(tmp_path, make_module, monkeypatch):
    meter, clock = Throughput(), Clock()
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    own = {"logger": ContinuedCSVLogger(tmp_path, name="run", version=0), "log_every_n_steps": 2, "max_epochs": 2}
    trainer = trainer_of(tmp_path, callbacks=[meter, clock], **own)
    trainer.fit(make_module(Vision(), LoRAConfig(r=2)), loader(), loader(8))
    sizes = 2 * [len(batch["labels"]) for batch in loader()]
    assert meter.seconds == 2 * len(sizes), "no validation is in it"
    assert (meter.samples, meter.tokens) == (sum(sizes), 0)
    assert meter.peak_mib > 100
    trainer.save_checkpoint(tmp_path / "2.ckpt")
    on = trainer_of(tmp_path, callbacks=[Throughput(), clock], logger=False, max_epochs=3)
    on.fit(trainer.lightning_module, loader(), ckpt_path=str(tmp_path / "2.ckpt"))
    assert on.callbacks[0].samples == 3 / 2 * sum(sizes), "of the fit before too"
    rows = [row for row in logged(tmp_path) if row["throughput/samples_per_second"]]
    rates = {int(row["step"]): float(row["throughput/samples_per_second"]) for row in rows}
    assert rates == {i: pytest.approx(sum(sizes[i - 1 : i + 1]) / 4) for i in range(1, len(sizes), 2)}


def test_step_figures_are_the_gradients_and_rates_of_the_step(tmp_path, make_module):
    """Beside sums over the parameters by name, in float64, before they are clipped."""
    wanted = {}

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads = {n: p.grad.double() for n, p in pl_module.named_parameters() if p.grad is not None}
            for part, end in (("A", "lora_A"), ("B", "lora_B"), ("all", "")):
                total = sum(float(g.square().sum()) for n, g in grads.items() if n.endswith(end))
                wanted[trainer.global_step, f"grad_norm/{part}"] = total**0.5
            for group in optimizer.param_groups:
                wanted[trainer.global_step, f"lr/{group['name']}"] = group["lr"]

    module = make_module(Vision(), LoRAConfig(r=2), b_lr_ratio=16.0)
    logger = ContinuedCSVLogger(tmp_path, name="run", version=0)
    fit(tmp_path, module, Look(), StepFigures(), logger=logger, gradient_clip_val=1e-3)
    rows = [row for row in logged(tmp_path) if row.get("lr")]
    assert len(rows) == len(loader())
    for row in rows:
        step = int(row["step"])
        for part in ("A", "B", "all"):
            assert float(row[f"grad_norm/{part}"]) == pytest.approx(wanted[step, f"grad_norm/{part}"], rel=1e-5)
        assert float(row["grad_norm/all"]) > 1e-3
        assert float(row["lr"]) == pytest.approx(wanted[step, "lr/matrices"])
        assert float(row["lr/B"]) == pytest.approx(16 * float(row["lr"]))
        assert "lr/vectors" not in row, "has the first group's rate"


TEXTS = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}
PADDED = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
BATCHES = [
    (PADDED, 2, 3),
    ({"input_ids": torch.ones(2, 3), "position_ids": torch.ones(2, 3)}, 2, 6),
    ({"a": TEXTS, "b": {"input_ids": torch.ones(2, 1)}}, 2, 8),
    ({"pixel_values": torch.ones(4, 3, 2, 2), "labels": torch.ones(4)}, 4, None),
    ((torch.ones(5, 2), torch.ones(5)), 5, None),
    ({f"prompt_{name}": tensor for name, tensor in TEXTS.items()}, 2, 6),
    ({"scale": torch.tensor(1.0)}, 1, None),
    ({}, 0, None),
    ("text", 0, None),
]


@pytest.mark.parametrize(("batch", "examples", "tokens"), BATCHES)
def test_batches_of_all_kinds_are_counted(batch, examples, tokens):
    assert examples_in(batch) == examples
    assert tokens_in(batch) == tokens
