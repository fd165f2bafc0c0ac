"""The demo's fit beside the same fit with PEFT, in a plain Lightning loop and in the Hugging Face Trainer.

    python -m benchmarks.demo [--rounds 1] [--batches 20]

Same texts, order of batches, seed of the new head, learning rate and schedule, clipping, precision and dropout (the
backbone's is off in all three: the Trainer would switch it on). Each runs in a process of its own, so that its peak
memory is its own. Ours is what `lora-lightning fit` does, fingerprints and checkpoints of the adapter included; the
Lightning loop checkpoints the whole model, as ModelCheckpoint does where nobody tells it otherwise; the Trainer
saves PEFT's adapter. Processor seconds are for a machine that others use too. Written to benchmarks/results/demo.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import yaml
from torch import nn

from benchmarks.measure import RESULTS, machine

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def parts() -> tuple[Any, nn.Module, dict[str, Any]]:
    """The demo's data, encoded, its backbone with a head drawn from seed 42, and its whole config."""
    from lora_lightning import TextClassificationData, huggingface
    from lora_lightning.data.io.splits import SplitConfig

    config = yaml.safe_load(CONFIG.read_text())
    given = config["data"]["init_args"]
    data = TextClassificationData(**{**given, "split": SplitConfig(**given["split"])})
    data.setup()
    torch.manual_seed(42)
    backbone = huggingface(
        **config["model"]["backbone"]["init_args"],
        label_names=data.label_names,
        model_kwargs={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    return data, backbone, config


def lightning_trainer(config: dict[str, Any], batches: int | None, folder: str, callbacks: list[Any]) -> Any:
    import lightning

    return lightning.Trainer(
        max_epochs=config["trainer"]["max_epochs"],
        precision="bf16-mixed",
        gradient_clip_val=config["trainer"]["gradient_clip_val"],
        limit_train_batches=batches,
        default_root_dir=folder,
        callbacks=callbacks,
        logger=False,
        enable_model_summary=False,
        accelerator="cpu",
    )


def ours(batches: int | None, folder: str) -> tuple[Callable[[], object], nn.Module, Any]:
    from lora_lightning import Checkpoints, FreezeBase, LoRAConfig, LoRAModule, SequenceClassification, WarmupDecay

    data, backbone, config = parts()
    model = config["model"]
    optimizer = functools.partial(torch.optim.AdamW, **model["optimizer"]["init_args"])
    schedule = functools.partial(WarmupDecay, **model["lr_scheduler"]["init_args"])
    task = SequenceClassification(data.num_classes)
    module = LoRAModule(backbone, task, LoRAConfig(**model["lora"]), optimizer, schedule)
    trainer = lightning_trainer(config, batches, folder, [FreezeBase(), Checkpoints()])
    return lambda: trainer.fit(module, datamodule=data), module.backbone, data


def with_peft(backbone: nn.Module, config: dict[str, Any]) -> nn.Module:
    """The same layers: every linear one of the encoder, and the head in full."""
    from peft import LoraConfig, get_peft_model

    lora = config["model"]["lora"]
    names = [n for n, m in backbone.named_modules() if isinstance(m, nn.Linear) and ".encoder." in n]
    peft = LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        target_modules=names,
        modules_to_save=lora["modules_to_save"],
        task_type="SEQ_CLS",
    )
    return get_peft_model(backbone, peft)  # type: ignore[arg-type]


def peft_in_lightning(batches: int | None, folder: str) -> tuple[Callable[[], object], nn.Module, Any]:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torchmetrics.classification import MulticlassAccuracy
    from transformers import get_linear_schedule_with_warmup

    data, backbone, config = parts()
    model = with_peft(backbone, config)

    class Plain(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.accuracy = model, MulticlassAccuracy(data.num_classes, average="micro")

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            self.log("train/loss", loss, prog_bar=True)
            return loss

        def validation_step(self, batch: Any, _: int) -> None:
            out = self.model(**batch)
            self.accuracy(out.logits, batch["labels"])
            self.log("val/accuracy", self.accuracy)

        def configure_optimizers(self) -> Any:
            trains = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trains, **config["model"]["optimizer"]["init_args"])
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * steps), steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Plain()
    checkpoint = ModelCheckpoint(monitor="val/accuracy", mode="max", save_last=True)
    trainer = lightning_trainer(config, batches, folder, [checkpoint])
    return lambda: trainer.fit(module, datamodule=data), model, data


def peft_in_trainer(batches: int | None, folder: str) -> tuple[Callable[[], object], nn.Module, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    data, backbone, config = parts()
    model = with_peft(backbone, config)
    loader = data.train_dataloader()
    epochs = config["trainer"]["max_epochs"]
    optimizer = config["model"]["optimizer"]["init_args"]
    steps = (batches or len(loader)) * epochs

    class Order(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            loader.sampler.set_epoch(round(state.epoch or 0))

    class OwnOrder(Trainer):
        def get_train_dataloader(self) -> Any:
            return loader

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return data.val_dataloader()

    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        max_steps=steps if batches else -1,
        learning_rate=optimizer["lr"],
        weight_decay=optimizer["weight_decay"],
        warmup_steps=int(0.06 * steps),
        lr_scheduler_type="linear",
        max_grad_norm=config["trainer"]["gradient_clip_val"],
        bf16=True,
        use_cpu=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=10,
        report_to="none",
        per_device_train_batch_size=data.batch_size,
    )
    trainer = OwnOrder(
        model,
        arguments,
        train_dataset=data.encoded_rows("train"),
        eval_dataset=data.encoded_rows("validation"),
        callbacks=[Order()],
    )
    return trainer.train, model, data


WAYS: dict[str, Callable[[int | None, str], tuple[Callable[[], object], nn.Module, Any]]] = {
    "ours": ours,
    "PEFT in a Lightning loop": peft_in_lightning,
    "PEFT in the Hugging Face Trainer": peft_in_trainer,
}


@torch.inference_mode()
def accuracy(model: nn.Module, data: Any, split: str) -> float:
    model.eval()
    right = total = 0
    with torch.autocast("cpu", torch.bfloat16):
        for batch in data.every(split):
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
            total += len(labels)
    return right / total


def resident() -> float:
    """Megabytes that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def one(way: str, batches: int | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        fit, model, data = WAYS[way](batches, folder)
        before, start, own = resident(), time.perf_counter(), time.process_time()
        fit()
        seconds, own = time.perf_counter() - start, time.process_time() - own
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        size = max((f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()), default=0) / 1e6
    return {
        "seconds": seconds,
        "processor seconds": own,
        "peak memory, MB": peak,
        "above the start, MB": peak - before,
        "largest file of a checkpoint, MB": size,
        "validation": accuracy(model, data, "validation"),
        "test": accuracy(model, data, "test"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batches", type=int, help="of each epoch, to try the benchmark out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(one(options.way, options.batches)))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in random.sample(list(WAYS), len(WAYS)):
            more = ["--batches", str(options.batches)] if options.batches else []
            command = [sys.executable, "-m", "benchmarks.demo", "--way", way, "--threads", str(options.threads), *more]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, *(f"{key} {value:.4g}" for key, value in found[way][-1].items()), sep=", ", flush=True)
    RESULTS.mkdir(exist_ok=True)
    written = {"machine": machine(), "options": vars(options), "fits": found}
    (RESULTS / "demo.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
