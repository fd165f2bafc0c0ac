"""Mistakes that people make: the command, the files beside it, and what it answers, word for word.

Each is played in a folder of its own that holds `run.yaml` (the tiny run of `tests/tiny.py`), `reviews.csv`, `bert/`,
and `runs/tiny/` where a command speaks of `runs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mistake:
    command: str
    said: str
    files: dict[str, str | bytes] = field(default_factory=dict)
    env: dict[str, str | None] = field(default_factory=dict)
    code: int = 2
    lacks: str = ""
    """A package that is not installed."""


def lora(text: str) -> dict[str, str | bytes]:
    """An overlay with these lines under model.lora."""
    return {"over.yaml": f"model:\n  lora:\n    {text}\n"}


def callback(text: str) -> dict[str, str | bytes]:
    return {"over.yaml": f"trainer:\n  callbacks:\n    - {text}\n"}


FIT = "fit -c run.yaml"
OVER = "fit -c run.yaml -c over.yaml"
BROKEN = """
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        raise RuntimeError("weights are on the other disk")


class Wrong(nn.Module):
    def __init__(self, width: int = 3) -> None:
        raise ValueError("width must be even")


def plain():
    return nn.Linear(2, 2)
"""

MISTAKES = {
    # ---- what to run
    "a command's name": Mistake("fitt -c run.yaml", ""),
    "two letters changed": Mistake("exprot --ckpt_path runs/tiny", ""),
    "no command": Mistake("-c run.yaml", ""),
    "a config in place of a command": Mistake("run.yaml", ""),
    "no config": Mistake("fit", ""),
    "a config without -c": Mistake("fit run.yaml", ""),
    "no run to test": Mistake("test", ""),
    "no checkpoint to test": Mistake("test -c run.yaml", ""),
    "half of merge": Mistake("merge --base_model bert", ""),
    "analyze without an adapter": Mistake("analyze", ""),
    # ---- files
    "a config's name": Mistake("fit -c runn.yaml", ""),
    "a config's ending": Mistake("fit -c run.yml", ""),
    "a config's folder": Mistake("fit -c confgs/demo.yaml", "", {"configs/demo.yaml": "name: demo\n"}),
    "a config in another folder": Mistake("fit -c demo.yaml", "", {"configs/demo.yaml": "name: demo\n"}),
    "a folder as config": Mistake("fit -c configs", "", {"configs/demo.yaml": "name: demo\n"}),
    "an empty config": Mistake(OVER, "", {"over.yaml": "# nothing yet\n"}),
    "a list as config": Mistake(OVER, "", {"over.yaml": "- name: demo\n"}),
    "a tab": Mistake(OVER, "", {"over.yaml": "trainer:\n\tmax_epochs: 1\n"}),
    "a quote that is not closed": Mistake(OVER, "", {"over.yaml": 'seed_everything: 1\nname: "demo\n'}),
    "an indent": Mistake(OVER, "", {"over.yaml": "model:\n  lora:\n    r: 4\n   alpha: 8\n"}),
    "two colons": Mistake(OVER, "", {"over.yaml": "name: demo: second\n"}),
    "a key twice": Mistake(OVER, "", lora("r: 4\n    alpha: 8\n    r: 8")),
    "not UTF-8": Mistake(OVER, "", {"over.yaml": "# a run\nname: größe\n".encode("latin-1")}),
    "a data file": Mistake(f"{FIT} --data.path review.csv", ""),
    "a checkpoint": Mistake("test --ckpt_path runs/tny", ""),
    "an adapter's folder": Mistake("analyze runs/tny", ""),
    "a base's folder": Mistake("merge --base_model brt --adapter runs/tiny --output_dir out", ""),
    "a model that is not there": Mistake(f"{FIT} --model.backbone.init_args.pretrained_model_name_or_path ./brt", ""),
    "runs where a file is": Mistake(f"{FIT} --runs_dir reviews.csv", ""),
    "a run's data from another folder": Mistake("test --ckpt_path runs/tiny --data.path old/reviews.csv", ""),
    # ---- keys and flags
    "a key of the Trainer": Mistake(OVER, "", {"over.yaml": "trainer:\n  max_epoch: 3\n"}),
    "a section": Mistake(OVER, "", {"over.yaml": "trainr: {max_epochs: 3}\n"}),
    "PEFT's lora_alpha": Mistake(OVER, "", lora("lora_alpha: 16")),
    "PEFT's lora_dropout": Mistake(OVER, "", lora("lora_dropout: 0.1")),
    "PEFT's init_lora_weights": Mistake(OVER, "", lora("init_lora_weights: pissa")),
    "PEFT's task_type": Mistake(OVER, "", lora("task_type: SEQ_CLS")),
    "a rank by another name": Mistake(OVER, "", lora("rank: 16")),
    "a list for keys": Mistake(OVER, "", {"over.yaml": "model:\n  lora: [r, 8]\n"}),
    "a flag": Mistake(f"{FIT} --trainer.max_epoch 3", ""),
    "a flag without its group": Mistake(f"{FIT} --r 16", ""),
    "a flag of another trainer": Mistake(f"{FIT} --learning_rate 3e-4", ""),
    "epochs": Mistake(f"{FIT} --epochs 3", ""),
    "a flag of the data": Mistake(f"{FIT} --data.batch_sise 8", ""),
    "a flag without its value": Mistake(f"{FIT} --name", ""),
    "merge's flag": Mistake("merge --base bert --adapter a --output_dir out", ""),
    # ---- values
    "a word for a rank": Mistake(f"{FIT} --model.lora.r eight", ""),
    "a word for a rank in a file": Mistake(OVER, "", lora("r: eight")),
    "a word for a batch size in a file": Mistake(OVER, "", {"over.yaml": "data:\n  init_args:\n    batch_size: big\n"}),
    "a word for a learning rate": Mistake(f"{FIT} --model.optimizer.lr fast", ""),
    "a rank of zero": Mistake(f"{FIT} --model.lora.r 0", ""),
    "a dropout above one": Mistake(f"{FIT} --model.lora.dropout 1.5", ""),
    "a negative alpha": Mistake(f"{FIT} --model.lora.alpha -1", ""),
    "a start that is none": Mistake(f"{FIT} --model.lora.init pisa", ""),
    "a precision": Mistake(f"{FIT} --trainer.precision bf16base", ""),
    "a precision that rounds A and B": Mistake(f"{FIT} --trainer.precision bf16-true", ""),
    "a strategy": Mistake(f"{FIT} --trainer.strategy dpp", ""),
    "a strategy's class": Mistake(f"{FIT} --trainer.strategy lora_lightning.FSDP2Strateg", ""),
    "an accelerator": Mistake(f"{FIT} --trainer.accelerator gpuu", ""),
    "a GPU where there is none": Mistake(f"{FIT} --trainer.accelerator gpu", ""),
    "no device at all": Mistake(f"{FIT} --trainer.devices 0", ""),
    "a format": Mistake("export --ckpt_path runs/tiny --formats merge", ""),
    "a dtype": Mistake("export --ckpt_path runs/tiny --dtype bf16", ""),
    # ---- classes
    "a task's class": Mistake(f"{FIT} --model.task lora_lightning.SequenceClasification", ""),
    "a data class": Mistake(f"{FIT} --data lora_lightning.TextClasificationData", ""),
    "an optimizer": Mistake(f"{FIT} --model.optimizer AdmW", ""),
    "a schedule": Mistake(f"{FIT} --model.lr_scheduler lora_lightning.WarmupDecy", ""),
    "a callback": Mistake(OVER, "", callback("class_path: lora_lightning.Throughputs")),
    "a callback's argument": Mistake(OVER, "", callback("{class_path: EarlyStopping, init_args: {monitr: val/loss}}")),
    "a logger": Mistake(f"{FIT} --trainer.logger WandbLoger", ""),
    "a model's name for its class": Mistake(f"{FIT} --model.backbone bert", ""),
    "a module of one's own": Mistake(f"{FIT} --model.backbone my_modl.Net", "", {"my_model.py": BROKEN}),
    "a function without its type": Mistake(f"{FIT} --model.backbone my_model1.plain", "", {"my_model1.py": BROKEN}),
    # ---- what does not fit together
    "a target": Mistake(f"{FIT} --model.lora.target_modules [qurey,value]", ""),
    "a target as a bare word": Mistake(f"{FIT} --model.lora.target_modules query", ""),
    "a head": Mistake(f"{FIT} --model.lora.modules_to_save [clasifier]", ""),
    "a rank too large": Mistake(f"{FIT} --model.lora.r 64", ""),
    "another number of labels": Mistake(f"{FIT} --model.backbone.init_args.num_labels 5", ""),
    "no data": Mistake(f"{FIT} --data null --model.task.init_args.num_classes 2", ""),
    "no labels in the file": Mistake(f"{FIT} --data.path plain.csv", "", {"plain.csv": "text,film\nfine,1\n"}),
    "a label that training never saw": Mistake(
        f"{FIT} --data.split null --data.path '{{train: reviews.csv, validation: val.csv}}'",
        "",
        {"val.csv": "text,label,film\nfine,frehs,a\n"},
    ),
    "a metric that is not logged": Mistake(
        OVER, "", callback("{class_path: EarlyStopping, init_args: {monitor: val/los}}")
    ),
    "export before fit": Mistake("export -c run.yaml --ckpt_path best --name second", ""),
    "going on before fit": Mistake(f"{FIT} --ckpt_path last --name second", ""),
    "going on with another rank": Mistake(f"{FIT} --ckpt_path runs/tiny --model.lora.r 2", ""),
    "W&B without a key": Mistake(
        f"{FIT} --trainer.logger lora_lightning.WandbLogger --trainer.logger.offline false",
        "",
        env={"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": "."},
    ),
    "a package that is not installed": Mistake("export --ckpt_path runs/tiny --formats onnx", "", lacks="onnx"),
    "a port that is taken": Mistake(
        f"{FIT} --trainer.strategy ddp --trainer.devices 1",
        "",
        env={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{taken}"},
    ),
    # ---- what is no mistake in what was asked
    "a class of one's own that raises": Mistake(
        f"{FIT} --model.backbone my_model2.Net", "", {"my_model2.py": BROKEN}, code=1
    ),
    "a class of one's own that refuses": Mistake(
        f"{FIT} --model.backbone my_model3.Wrong", "", {"my_model3.py": BROKEN}, code=1
    ),
}
