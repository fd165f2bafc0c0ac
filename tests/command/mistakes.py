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
    late: bool = False
    """Found only once the fit runs, and a run is there already."""


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

ROWS = """
import lightning
import torch
from torch.utils.data import DataLoader


class Rows(lightning.LightningDataModule):
    def train_dataloader(self):
        rows = [{"input_ids": torch.tensor([2, 5, 3]), "labels": torch.tensor(n)} for n in (1, 2)]
        return DataLoader(rows, batch_size=2)
"""

MISTAKES = {
    # ---- what to run
    "a name that leads out of runs_dir": Mistake(
        f"{FIT} --name ../elsewhere",
        "name: expected that of a folder within runs_dir, got '../elsewhere': --runs_dir says where runs go",
    ),
    "a command's name": Mistake("fitt -c run.yaml", "no command 'fitt'; did you mean 'fit'? (there are COMMANDS)"),
    "another tool's command": Mistake("train -c run.yaml", "no command 'train': here it is 'fit' (there are COMMANDS)"),
    "two letters changed": Mistake(
        "exprot --ckpt_path runs/tiny", "no command 'exprot'; did you mean 'export'? (there are COMMANDS)"
    ),
    "no command": Mistake("-c run.yaml", "a command comes first: lora-lightning fit -c run.yaml"),
    "a config in place of a command": Mistake("run.yaml", "a command comes first: lora-lightning fit -c run.yaml"),
    "no config": Mistake("fit", "fit needs a config: lora-lightning fit -c CONFIG, such as configs/demo.yaml"),
    "a config without -c": Mistake("fit run.yaml", "'run.yaml' stands alone: a config is given as -c run.yaml"),
    "no run to test": Mistake(
        "test", "test needs a trained run: lora-lightning test --ckpt_path RUN, such as runs/demo, or a .ckpt"
    ),
    "no checkpoint to test": Mistake(
        "test -c run.yaml", "test needs --ckpt_path: best, last, a run folder or a .ckpt file"
    ),
    "half of merge": Mistake(
        "merge --base_model bert", "merge needs --adapter and --output_dir: see lora-lightning merge --help"
    ),
    "analyze without an adapter": Mistake("analyze", "analyze needs ADAPTER: see lora-lightning analyze --help"),
    "Hydra's way to set a key": Mistake(
        f"{FIT} +model.lora.r=8", "'+model.lora.r=8' stands alone: an option is given as --model.lora.r 8"
    ),
    "a run without its flag": Mistake(
        "test -c run.yaml bert", "'bert' stands alone: a run is given as --ckpt_path bert"
    ),
    # ---- files
    "a config's name": Mistake("fit -c runn.yaml", "no config file runn.yaml; did you mean 'run.yaml'?"),
    "a config's ending": Mistake("fit -c run.yml", "no config file run.yml; did you mean 'run.yaml'?"),
    "a config's folder": Mistake(
        "fit -c confgs/demo.yaml",
        "no config file confgs/demo.yaml; did you mean 'configs/demo.yaml'?",
        {"configs/demo.yaml": "name: demo\n"},
    ),
    "a config in another folder": Mistake(
        "fit -c demo.yaml",
        "no config file demo.yaml; did you mean 'configs/demo.yaml'?",
        {"configs/demo.yaml": "name: demo\n"},
    ),
    "a folder as config": Mistake(
        "fit -c configs",
        "--config configs is a folder: it holds demo.yaml; name a file",
        {"configs/demo.yaml": "name: demo\n"},
    ),
    "an empty config": Mistake(
        OVER,
        "over.yaml is empty: a config holds keys with values, such as those of configs/demo.yaml",
        {"over.yaml": "# nothing yet\n"},
    ),
    "a list as config": Mistake(
        OVER, "over.yaml must hold keys with values, such as 'name: demo', got a list", {"over.yaml": "- name: demo\n"}
    ),
    "a tab": Mistake(
        OVER,
        "over.yaml, line 2: no YAML: while scanning for the next token, found character '\\t' that"
        " cannot start any token",
        {"over.yaml": "trainer:\n\tmax_epochs: 1\n"},
    ),
    "a quote that is not closed": Mistake(
        OVER,
        "over.yaml, line 3: no YAML: while scanning a quoted scalar that begins in line 2, found unexpected end of"
        " stream",
        {"over.yaml": 'seed_everything: 1\nname: "demo\n'},
    ),
    "an indent": Mistake(
        OVER,
        "over.yaml, line 4: no YAML: while parsing a block mapping that begins in line 2, expected <block end>, but"
        " found '<block mapping start>'",
        {"over.yaml": "model:\n  lora:\n    r: 4\n   alpha: 8\n"},
    ),
    "two colons": Mistake(
        OVER, "over.yaml, line 1: no YAML: mapping values are not allowed here", {"over.yaml": "name: demo: second\n"}
    ),
    "a key twice": Mistake(
        OVER, "over.yaml, line 5: 'r' is there twice, first in line 3: keep one", lora("r: 4\n    alpha: 8\n    r: 8")
    ),
    "not UTF-8": Mistake(
        OVER,
        "over.yaml, line 2: not UTF-8: save the file as UTF-8 in your editor",
        {"over.yaml": "# a run\nname: größe\n".encode("latin-1")},
    ),
    "a data file": Mistake(f"{FIT} --data.path review.csv", "no file review.csv; did you mean 'reviews.csv'?"),
    "a checkpoint": Mistake(
        "test --ckpt_path runs/tny", "no checkpoint or run folder 'runs/tny'; did you mean 'runs/tiny'?"
    ),
    "a config as checkpoint": Mistake(
        "test --ckpt_path run.yaml",
        "'run.yaml' is not a whole checkpoint: a config is given as -c run.yaml, and a run as --ckpt_path, such as"
        " runs/demo",
    ),
    "an empty checkpoint": Mistake(
        "test --ckpt_path e.ckpt", "'e.ckpt' is not a whole checkpoint (it is empty)", {"e.ckpt": b""}
    ),
    "PEFT's directory as checkpoint": Mistake(
        "test --ckpt_path peft",
        "'peft' is an adapter's directory and no run: fit starts from it with --model.init_adapter",
        {"peft/adapter_config.json": "{}"},
    ),
    "an adapter's folder": Mistake(
        "analyze runs/tny",
        "'runs/tny' is no adapter's directory (with adapter_config.json) and no run: no checkpoint or "
        "run folder 'runs/tny'; did you mean 'runs/tiny'?",
    ),
    "a base's folder": Mistake(
        "merge --base_model brt --adapter runs/tiny --output_dir out", "no folder 'brt'; did you mean 'bert'?"
    ),
    "a model that is not there": Mistake(
        f"{FIT} --model.backbone.init_args.pretrained_model_name_or_path ./brt",
        "no model './brt': there is no such folder; did you mean 'bert'?",
    ),
    "runs where a file is": Mistake(
        f"{FIT} --runs_dir reviews.csv",
        "'reviews.csv/tiny/version_0' cannot be a folder, for a part of its path is a file: give another --runs_dir",
    ),
    "a run's data from another folder": Mistake(
        "test --ckpt_path runs/tiny --data.path old/reviews.csv",
        "no file old/reviews.csv (the path stands in runs/tiny/version_0/config.yaml and is taken from "
        "the folder where the command runs: run it where the fit ran, or give another, such as "
        "--data.path FILE)",
    ),
    "a run's config from another folder": Mistake(
        "fit -c runs/tiny/version_0/config.yaml --data.path old/reviews.csv",
        "no file old/reviews.csv (the path stands in runs/tiny/version_0/config.yaml and is taken from "
        "the folder where the command runs: run it where the fit ran, or give another, such as "
        "--data.path FILE)",
    ),
    # ---- keys and flags
    "a key of the Trainer": Mistake(
        OVER,
        "over.yaml, line 2: unknown key trainer.max_epoch; did you mean 'trainer.max_epochs' or "
        "'trainer.min_epochs' or 'trainer.max_steps'?",
        {"over.yaml": "trainer:\n  max_epoch: 3\n"},
    ),
    "a section": Mistake(
        OVER,
        "over.yaml, line 1: unknown key trainr; did you mean 'trainer'?",
        {"over.yaml": "trainr: {max_epochs: 3}\n"},
    ),
    "PEFT's lora_alpha": Mistake(
        OVER,
        "over.yaml, line 3: unknown key model.lora.lora_alpha: here it is model.lora.alpha",
        lora("lora_alpha: 16"),
    ),
    "PEFT's lora_dropout": Mistake(
        OVER,
        "over.yaml, line 3: unknown key model.lora.lora_dropout: here it is model.lora.dropout",
        lora("lora_dropout: 0.1"),
    ),
    "PEFT's init_lora_weights": Mistake(
        OVER,
        "over.yaml, line 3: unknown key model.lora.init_lora_weights: here it is model.lora.init",
        lora("init_lora_weights: pissa"),
    ),
    "PEFT's task_type": Mistake(
        OVER,
        "over.yaml, line 3: unknown key model.lora.task_type: leave it out, the class of model.task "
        "says what the task is",
        lora("task_type: SEQ_CLS"),
    ),
    "a rank by another name": Mistake(
        OVER, "over.yaml, line 3: unknown key model.lora.rank: here it is model.lora.r", lora("rank: 16")
    ),
    "Hydra's _target_": Mistake(
        OVER,
        "over.yaml, line 2: unknown key model.optimizer._target_: a class is given by class_path, its arguments by"
        " init_args",
        {"over.yaml": "model:\n  optimizer: {_target_: torch.optim.AdamW}\n"},
    ),
    "a list for keys": Mistake(
        OVER,
        "over.yaml, line 2: model.lora: expected keys with values such as {r: 8}, got ['r', 8]",
        {"over.yaml": "model:\n  lora: [r, 8]\n"},
    ),
    "a flag": Mistake(
        f"{FIT} --trainer.max_epoch 3",
        "unknown option --trainer.max_epoch; did you mean '--trainer.max_epochs' or "
        "'--trainer.min_epochs' or '--trainer.max_steps'?",
    ),
    "a flag without its group": Mistake(f"{FIT} --r 16", "unknown option --r; did you mean '--model.lora.r'?"),
    "a flag of another trainer": Mistake(
        f"{FIT} --learning_rate 3e-4", "unknown option --learning_rate: here it is --model.optimizer.init_args.lr"
    ),
    "epochs": Mistake(f"{FIT} --epochs 3", "unknown option --epochs: here it is --trainer.max_epochs"),
    "a flag of the data": Mistake(
        f"{FIT} --data.batch_sise 8",
        "lora_lightning.TextClassificationData takes no 'batch_sise'; did you mean 'batch_size' or 'eval_batch_size'?",
    ),
    "a flag without its value": Mistake(f"{FIT} --name", "argument --name: expected one argument"),
    "merge's flag": Mistake(
        "merge --base bert --adapter a --output_dir out",
        "unknown option --base; did you mean '--base_model' or '--allow_other_base'?",
    ),
    # ---- values
    "a word for a rank": Mistake(f"{FIT} --model.lora.r eight", "model.lora.r: expected a whole number, got 'eight'"),
    "a word for a rank in a file": Mistake(
        OVER, "over.yaml, line 3: model.lora.r: expected a whole number, got 'eight'", lora("r: eight")
    ),
    "a word for a batch size in a file": Mistake(
        OVER,
        "over.yaml, line 3: data.init_args.batch_size: expected a whole number, got 'big'",
        {"over.yaml": "data:\n  init_args:\n    batch_size: big\n"},
    ),
    "a word for a learning rate": Mistake(
        f"{FIT} --model.optimizer.lr fast", "model.optimizer.lr: expected a number, got 'fast'"
    ),
    "one number for two": Mistake(
        f"{FIT} --model.optimizer.betas [0.9]",
        "model.optimizer.betas: Expected a tuple with 2 elements. Got value: [0.9]",
    ),
    "a dtype of the backbone": Mistake(
        f"{FIT} --model.backbone.init_args.dtype bf16",
        "model.backbone.init_args.dtype: expected float32, bfloat16, float16, got 'bf16'; did you mean 'bfloat16'?",
    ),
    "a rank of zero": Mistake(f"{FIT} --model.lora.r 0", "r must be a whole number of at least 1, got 0"),
    "a dropout above one": Mistake(
        f"{FIT} --model.lora.dropout 1.5", "dropout must be at least 0 and below 1, got 1.5"
    ),
    "a negative alpha": Mistake(f"{FIT} --model.lora.alpha -1", "alpha must be a finite number above 0, got -1.0"),
    "a start that is none": Mistake(
        f"{FIT} --model.lora.init pisa",
        "init must be one of gaussian, kaiming, orthogonal, pissa, olora, eva, loftq, lora_ga or "
        "pissa_niter_<n>, got 'pisa'; did you mean 'pissa'?",
    ),
    "a precision": Mistake(
        f"{FIT} --trainer.precision bf16base",
        "trainer.precision: expected auto, float32, bf16-base, nf4-base, 16-mixed, bf16-mixed, 64-true, "
        "got 'bf16base'; did you mean 'bf16-base' or 'nf4-base' or 'bf16-mixed'?",
    ),
    "a precision that rounds A and B": Mistake(
        f"{FIT} --trainer.precision bf16-true",
        "precision bf16-true would round A and B too, to steps too coarse to train in: use bf16-base: "
        "W0 in that precision, A and B in float32",
    ),
    "a strategy": Mistake(
        f"{FIT} --trainer.strategy dpp",
        "no strategy 'dpp'; did you mean 'ddp'? (there are auto, ddp, ddp_spawn, ddp_fork, "
        "single_device, fsdp2, and the overlays in configs/strategy/)",
    ),
    "a strategy's class": Mistake(
        f"{FIT} --trainer.strategy lora_lightning.FSDP2Strateg",
        "trainer.strategy: there is no 'lora_lightning.FSDP2Strateg'; did you mean 'lora_lightning.FSDP2Strategy'?",
    ),
    "an accelerator": Mistake(
        f"{FIT} --trainer.accelerator gpuu",
        "no accelerator 'gpuu'; did you mean 'gpu' or 'tpu' or 'cpu'? (there are auto, cpu, cuda, gpu, mps, tpu)",
    ),
    "a GPU where there is none": Mistake(
        f"{FIT} --trainer.accelerator gpu",
        "--trainer.accelerator gpu, and torch sees no GPU here: leave it at auto, or see lora-lightning doctor",
    ),
    "no device at all": Mistake(
        f"{FIT} --trainer.devices 0",
        "--trainer.devices must be a whole number above 0, a list of devices such as [0, 1], -1 or auto; on a CPU a"
        " whole number or auto",
    ),
    "a format": Mistake(
        "export --ckpt_path runs/tiny --formats merge",
        "unknown export format 'merge'; did you mean 'merged'? (known: adapter, merged)",
    ),
    "a dtype": Mistake(
        "export --ckpt_path runs/tiny --dtype bf16",
        "dtype: expected auto, float32, bfloat16, float16, got 'bf16'; did you mean 'bfloat16'?",
    ),
    # ---- classes
    "a task's class": Mistake(
        f"{FIT} --model.task lora_lightning.SequenceClasification",
        "model.task: there is no 'lora_lightning.SequenceClasification'; did you mean "
        "'lora_lightning.SequenceClassification' or 'lora_lightning.TokenClassification' or "
        "'lora_lightning.ImageClassification'?",
    ),
    "a data class": Mistake(
        f"{FIT} --data lora_lightning.TextClasificationData",
        "data: there is no 'lora_lightning.TextClasificationData'; did you mean "
        "'lora_lightning.TextClassificationData' or 'lora_lightning.TokenClassificationData' or "
        "'lora_lightning.TokenClassification'?",
    ),
    "an optimizer": Mistake(
        f"{FIT} --model.optimizer AdmW",
        "model.optimizer: 'AdmW' is no path to a class, such as module.Class; did you mean "
        "'torch.optim.AdamW' or 'torch.optim.Adam'?",
    ),
    "a schedule": Mistake(
        f"{FIT} --model.lr_scheduler lora_lightning.WarmupDecy",
        "model.lr_scheduler: there is no 'lora_lightning.WarmupDecy'; did you mean 'lora_lightning.WarmupDecay'?",
    ),
    "a callback": Mistake(
        OVER,
        "over.yaml, line 3: trainer.callbacks: there is no 'lora_lightning.Throughputs'; did you mean "
        "'lora_lightning.Throughput' or 'lora_lightning.StepOutput'?",
        callback("class_path: lora_lightning.Throughputs"),
    ),
    "a callback's argument": Mistake(
        OVER,
        "over.yaml, line 3: EarlyStopping takes no 'monitr'; did you mean 'monitor'?",
        callback("{class_path: EarlyStopping, init_args: {monitr: val/loss}}"),
    ),
    "a logger": Mistake(
        f"{FIT} --trainer.logger WandbLoger",
        "trainer.logger: 'WandbLoger' is no path to a class, such as module.Class; did you mean "
        "'lora_lightning.WandbLogger' or 'lightning.pytorch.loggers.Logger'?",
    ),
    "a logger's short name": Mistake(
        f"{FIT} --trainer.logger wandb",
        "trainer.logger: expected a class_path, true or false, got 'wandb'; did you mean 'lora_lightning.WandbLogger'?",
    ),
    "a model's name for its class": Mistake(
        f"{FIT} --model.backbone bert",
        "model.backbone: 'bert' is no path to a class, such as module.Class: a model of the hub or of a "
        "folder is class_path lora_lightning.huggingface with its name as "
        "init_args.pretrained_model_name_or_path",
    ),
    "a module of one's own": Mistake(
        f"{FIT} --model.backbone my_modl.Net",
        "model.backbone: there is no module 'my_modl'; did you mean 'my_model'?",
        {"my_model.py": BROKEN},
    ),
    "a function without its type": Mistake(
        f"{FIT} --model.backbone my_model1.plain",
        "model.backbone: Import path my_model1.plain does not correspond to a subclass of Module",
        {"my_model1.py": BROKEN},
    ),
    # ---- what does not fit together
    "a target": Mistake(
        f"{FIT} --model.lora.target_modules [qurey,value]",
        "target_modules: no module matches 'qurey'; did you mean 'query'?",
    ),
    "a target as a bare word": Mistake(
        f"{FIT} --model.lora.target_modules query",
        "target_modules: no module matches 'query'; a string is a regular expression on full names: for "
        "modules that end in it write [query]",
    ),
    "a head": Mistake(
        f"{FIT} --model.lora.modules_to_save [clasifier]",
        "modules_to_save: no module matches 'clasifier'; did you mean 'classifier' or 'layer'?",
    ),
    "a rank too large": Mistake(
        f"{FIT} --model.lora.r 64 --model.lora.target_modules [query]",
        "r=64 is larger than the layer 'bert.encoder.layer.0.attention.self.query' allows (32, the smaller side of its"
        ' weight), nor do 1 more: lower r, or add rank_pattern={"query": 32}, or add exclude_modules=["query"]',
    ),
    "another number of labels": Mistake(
        f"{FIT} --model.backbone.init_args.num_labels 5",
        "the backbone's head has 5 outputs (num_labels), and there must be 2, one for each class (fresh, rotten): leave"
        " num_labels out",
    ),
    "null for a section": Mistake(
        f"{FIT} --data.split null",
        "a section that holds keys, such as data.split, is set to null: leave it out for its defaults, or give it keys",
    ),
    "no data": Mistake(
        f"{FIT} --data null --model.task.init_args.num_classes 2",
        "fit needs a data section in its config: data: {class_path: ..., init_args: ...}",
    ),
    "no labels in the file": Mistake(
        f"{FIT} --data.path plain.csv",
        "plain.csv, the train set, has no column 'label': name another with label_column (columns: text, film)",
        {"plain.csv": "text,film\nfine,1\n"},
    ),
    "one label alone": Mistake(
        f"{FIT} --data.path one.csv",
        "one.csv, the train set, column 'label': expected at least 2 labels, got 'fresh' in every row: name another"
        " with label_column, or all labels as label_names",
        {"one.csv": "text,label,film\n" + "".join(f"fine,fresh,{i}\n" for i in range(10))},
    ),
    "a label that training never saw": Mistake(
        "fit -c run.yaml --data.path '{train: reviews.csv, validation: val.csv}' --data.split.validation 0"
        " --data.split.test 0 --data.split.group_by null",
        "val.csv, the validation set, row 1, column 'label': expected one of the labels fresh, rotten, "
        "got 'frehs'; did you mean 'fresh'?",
        {"val.csv": "text,label,film\nfine,frehs,a\n"},
    ),
    "a metric that is not logged": Mistake(
        OVER,
        "EarlyStopping monitors 'val/los', which is not logged; did you mean 'val/loss' or 'val/f1' or "
        "'train/loss'? (logged are val/loss, val/accuracy, val/f1, train/loss, train/accuracy, train/f1)",
        callback("{class_path: EarlyStopping, init_args: {monitor: val/los}}"),
    ),
    "a plateau's metric": Mistake(
        OVER,
        "ReduceLROnPlateau monitors 'val_loss', which is not logged; did you mean 'val/loss' or 'train/loss'? (logged"
        " are val/loss, val/accuracy, val/f1, train/loss, train/accuracy, train/f1)",
        {
            "over.yaml": "model:\n  lr_scheduler:\n    class_path: lightning.pytorch.cli.ReduceLROnPlateau\n"
            "    init_args: {monitor: val_loss}\n"
        },
    ),
    "another number of classes": Mistake(
        f"{FIT} --model.task.init_args.num_classes 3",
        "model.task.init_args.num_classes is 3, and the data have 2 labels: leave it out",
    ),
    "labels that are not counted from 0": Mistake(
        f"{FIT} --data my_rows.Rows --model.task.init_args.num_classes 2",
        "a batch has the label 2, and the task 2, numbered 0 to 1: number the data's labels so, or raise num_classes"
        " and the head's outputs",
        {"my_rows.py": ROWS},
        late=True,
    ),
    "a file of another separator": Mistake(
        f"{FIT} --data.path d.csv",
        "d.csv, the train set, has the one column 'text;label;film': its cells seem to be separated by ';'; a .csv is"
        " separated by commas, a .tsv by tabs",
        {"d.csv": "text;label;film\na;x;1\nb;y;2\n"},
    ),
    "no tokens at all": Mistake(f"{FIT} --data.max_length 0", "max_length must be at least 1 token, got 0"),
    "no batch to a step": Mistake(
        f"{FIT} --trainer.accumulate_grad_batches 0",
        "trainer.accumulate_grad_batches must be at least 1, which adds up nothing, got 0",
    ),
    "a trainer of nothing": Mistake(
        OVER,
        "over.yaml, line 2: trainer: expected keys with values such as {r: 8}, got null: leave it out for its defaults",
        {"over.yaml": "name: x\ntrainer:\n"},
    ),
    "arguments without their class": Mistake(
        "fit -c over.yaml",
        "over.yaml, line 2: model.task: expected a class_path beside its init_args",
        {"over.yaml": "model:\n  task:\n    init_args: {num_classes: 2}\n"},
    ),
    "a learning rate below 0": Mistake(
        f"{FIT} --model.optimizer.lr -1",
        "the optimizer says: Invalid learning rate: -1.0; see model.optimizer.init_args",
    ),
    "export before fit": Mistake(
        "export -c run.yaml --ckpt_path best --name second",
        "no run under 'runs/second' yet: fit first, or name a run with --ckpt_path",
    ),
    "going on before fit": Mistake(
        f"{FIT} --ckpt_path last --name second",
        "there is no checkpoint under 'runs/second' to go on from: leave --ckpt_path out, or say "
        "--ckpt_path auto, which starts anew where there is none",
    ),
    "going on with another rank": Mistake(
        f"{FIT} --ckpt_path runs/tiny --model.lora.r 2",
        "the checkpoint was trained with lora.r=4, this run says 2: use the run's own config.yaml, or start a new fit",
    ),
    "W&B without a key": Mistake(
        f"{FIT} --trainer.logger lora_lightning.WandbLogger --trainer.logger.offline false",
        "W&B has no key here: run `wandb login`, set WANDB_API_KEY, or leave `offline` out: the run "
        "then stays on this disk until `wandb sync`",
        env={"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": "."},
    ),
    "W&B without a key, in a list of loggers": Mistake(
        OVER,
        "W&B has no key here: run `wandb login`, set WANDB_API_KEY, or leave `offline` out: the run "
        "then stays on this disk until `wandb sync`",
        {
            "over.yaml": "trainer:\n  logger:\n    - class_path: lora_lightning.WandbLogger\n"
            "      init_args: {offline: false}\n"
        },
        env={"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": "."},
    ),
    "a format that torch writes": Mistake(
        "export --ckpt_path runs/tiny --formats onnx",
        "export writes no ONNX: export merged, and write ONNX from it with torch, as docs/export.md shows",
    ),
    "a port that is taken": Mistake(
        f"{FIT} --trainer.strategy ddp --trainer.devices 1",
        "the port of an earlier or another run is still taken: set MASTER_PORT to another one, or leave it unset",
        env={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{taken}"},
    ),
    # ---- what is no mistake in what was asked
    "a class of one's own that raises": Mistake(
        f"{FIT} --model.backbone my_model2.Net",
        "RuntimeError: weights are on the other disk (my_model2.py:7, in Net.__init__; --debug shows the traceback)",
        {"my_model2.py": BROKEN},
        code=1,
    ),
    "a DataModule of one's own that refuses": Mistake(
        f"{FIT} --data my_data.Rows",
        "ValueError: count must be even (my_data.py:6, in Rows.__init__; --debug shows the traceback)",
        {
            "my_data.py": "import lightning\n\n\nclass Rows(lightning.LightningDataModule):\n"
            "    def __init__(self, count: int = 3) -> None:\n        raise ValueError('count must be even')\n"
        },
        code=1,
    ),
    "a class of one's own that refuses": Mistake(
        f"{FIT} --model.backbone my_model3.Wrong",
        "ValueError: width must be even (my_model3.py:12, in Wrong.__init__; --debug shows the traceback)",
        {"my_model3.py": BROKEN},
        code=1,
    ),
}
