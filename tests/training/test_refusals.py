"""What cannot go well is refused by name before a fit, with what to do; what may go well is let be."""

import os
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

import lora_lightning
from lora_lightning import (
    Checkpoints,
    DriftMonitor,
    ExportAtEnd,
    LoRAConfig,
    LoRAError,
    LoRAModule,
    SequenceClassification,
    StepFigures,
    TextGeneration,
    WarmupDecay,
    inject,
)
from lora_lightning.training.callbacks.generation_samples import Samples
from lora_lightning.training.callbacks.monitors import RankTelemetry
from lora_lightning.training.checkpoints.run_folder import find_checkpoint
from lora_lightning.training.optim import make_optimizer
from lora_lightning.training.precision import lightning_precision
from lora_lightning.training.preflight import (
    INSTEAD,
    refuse_other_count,
    refuse_other_size,
    refuse_unlogged,
    refuse_unsupported,
    refuse_unsupported_name,
)
from lora_lightning.training.trainer import LoRATrainer
from tests import factories
from tests.training.small import Vision, fit


def trainer(**options):
    return LoRATrainer(**{"accelerator": "cpu", "devices": 1, "logger": False} | options)


def strategy(kind):
    """Two of them cannot be made without a GPU or a package."""
    return kind.__new__(kind)


def rates(**options):
    return WarmupDecay(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), total_steps=20, **options)


def optimizer(**options):
    return make_optimizer(nn.Linear(2, 2), torch.optim.SGD, **options)


LIGHTNINGS = "lightning.pytorch.strategies."
CLASSES = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
REFUSED = [
    *((partial(refuse_unsupported, strategy(kind)), rf"strategy {kind.__name__}: .*fsdp2") for kind in CLASSES),
    *((partial(refuse_unsupported_name, LIGHTNINGS + k.__name__), rf"{k.__name__}: .*fsdp2") for k in CLASSES),
    (partial(trainer, strategy="fsdp3"), r"no strategy 'fsdp3'; did you mean 'fsdp2'.*there are auto, ddp"),
    *((partial(trainer, strategy=n), f"strategy {n}: .*fsdp2") for n in ("deepspeed", "deepspeed_stage_3", "fsdp")),
    *((partial(trainer, strategy=n), f"strategy {n}: it is gone: .*fsdp2") for n in ("fsdp1", "zero2", "zero3")),
    *(
        (partial(trainer, strategy="fsdp2", devices=2, precision=word), "not for fsdp2: load the model .*in float64")
        for word in ("64-true", 64)
    ),
    (partial(trainer, devices=[0, 1, 2]), r"devices \[0, 1, 2\] names GPUs .* on a CPU.*: trainer\.devices 3"),
    (lambda: trainer(callbacks=[theirs.EMAWeightAveraging()]), "callback EMAWeightAveraging: it keeps another copy"),
    (lambda: trainer(callbacks=[theirs.StochasticWeightAveraging(0.1)]), "StochasticWeightAveraging: it keeps"),
    (lambda: trainer(callbacks=[theirs.BackboneFinetuning()]), "BackboneFinetuning: it unfreezes all of W0"),
    (lambda: trainer(callbacks=[theirs.ModelPruning("l1_unstructured")]), "ModelPruning: .* zeros into W0"),
    (partial(lightning_precision, "bf16-true", "cpu"), "would round A and B too"),
    (partial(lightning_precision, "16-true", "cpu"), "use bf16-base: W0 in that precision"),
    (partial(lightning_precision, "transformer-engine", "cpu"), "in place of adapted ones"),
    *((partial(rates, warmup=share), "a share below 1 or a whole number") for share in (-0.1, 1.5)),
    *((partial(optimizer, b_lr_ratio=ratio), "b_lr_ratio") for ratio in (0.0, -1.0, float("nan"), float("inf"))),
    *((partial(DriftMonitor, **{name: 0}), "at least 1") for name in ("every_n_steps", "count")),
    (partial(RankTelemetry, every_n_steps=0), "every_n_steps must be at least 1"),
    (partial(Samples, count=0), "count must be at least 1"),
    (lambda: RankTelemetry().setup(trainer(), BoringModel(), "fit"), "RankTelemetry takes a LoRAModule"),
    (lambda: trainer(callbacks=[ExportAtEnd()]).fit(BoringModel()), "ExportAtEnd takes a LoRAModule, got BoringModel"),
]


@pytest.mark.parametrize(("call", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_is_not_supported_is_refused_by_name_before_anything_is_loaded(call, said):
    with pytest.raises(LoRAError, match=said):
        call()


def test_a_trainer_asks(monkeypatch):
    monkeypatch.setitem(INSTEAD, DDPStrategy, "take another")
    with pytest.raises(LoRAError, match="strategy ddp: take another"):
        trainer(devices=2, strategy="ddp")


@pytest.mark.parametrize("name", ["FSDP1Strategy", "ZeRO2Strategy", "ZeRO3Strategy"])
def test_a_strategy_of_an_earlier_version_is_refused_where_it_is_imported(name):
    with pytest.raises(ImportError, match=rf"lora_lightning.{name}: it is gone.*FSDP2Strategy"):
        getattr(lora_lightning, name)


def test_a_checkpoint_in_parts_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(LoRAError, match=r"last\.ckpt' is a checkpoint in parts, and files are read here"):
        find_checkpoint(tmp_path / "last.ckpt")


def test_what_is_only_slow_is_warned_of(tmp_path, make_module):
    cores = len(os.sched_getaffinity(0))
    with pytest.warns(UserWarning, match=f"{cores + 6} processes share {cores} cores.*--trainer.devices {cores}"):
        trainer(devices=cores + 6)
    module = make_module(Vision(), LoRAConfig(r=2), lr_scheduler=partial(WarmupDecay, warmup=600))
    with pytest.warns(UserWarning, match=r"the warm-up takes 600 steps and the run has \d+"):
        fit(tmp_path, module)


# A metric that nothing logs.


@pytest.fixture
def waits(make_module):
    """Raises where one of these callbacks, or a plateau, waits for what is never logged."""
    module = make_module()
    return lambda *callbacks, **schedule: refuse_unlogged(trainer(callbacks=list(callbacks)), module, schedule)


@pytest.mark.parametrize("metric", ["val_loss", "val/acc", "eval_loss", "loss", "f1"])
def test_a_metric_that_is_not_logged_is_refused_whoever_waits_for_it(metric, waits):
    for callback in (EarlyStopping(metric), ModelCheckpoint(monitor=metric), Checkpoints(monitor=metric)):
        said = rf"{type(callback).__name__} monitors '{metric}', which is not logged; did"
        with pytest.raises(LoRAError, match=said):
            waits(callback)
    with pytest.raises(LoRAError, match="ReduceLROnPlateau monitors"):
        waits(monitor=metric)
    with pytest.raises(LoRAError, match=r"ReduceLROnPlateau .*set mode to max"):
        waits(monitor="val/f1")


LOGGED = ["val/f1", "train/loss", "train/loss_step", "grad_norm/all", "lr", "samples/s", "step", "val_other/f1"]


@pytest.mark.parametrize("metric", LOGGED)
def test_a_metric_that_is_logged_sometime_or_not_needed_is_let_be(metric, waits):
    mode = {"mode": "max" if metric.endswith("f1") else "min"}
    waits(EarlyStopping(metric, **mode), ModelCheckpoint(monitor=metric, **mode), StepFigures())
    waits(EarlyStopping("x", strict=False), ModelCheckpoint(monitor="x", save_top_k=0), ModelCheckpoint())
    waits(monitor=metric, **mode)


def test_texts_that_are_not_written_are_not_waited_for(make_module):
    module = make_module()
    module.task = TextGeneration(None, metrics=["bleu"], generate_in_validation=False)
    with pytest.raises(LoRAError, match="monitors 'val/bleu', which is not logged"):
        refuse_unlogged(trainer(callbacks=[EarlyStopping("val/bleu")]), module)


class Own(Callback):
    """Whatever it logs."""


@pytest.mark.parametrize("who", [Own(), theirs.LearningRateMonitor(), None], ids=lambda who: type(who).__name__)
def test_where_others_may_log_it_is_a_warning(who, waits, monkeypatch, recwarn):
    if who is None:
        monkeypatch.setattr(LoRAModule, "__module__", "mine")
    waits(EarlyStopping("val_mine"), *([who] if who else []))
    (said,) = (str(one.message) for one in recwarn if "val_mine" in str(one.message))
    assert f"unless {type(who).__name__ if who else 'LoRAModule'} does (logged are val/loss, val/accuracy" in said


# A head of another size than the data want, found without a batch.


@pytest.mark.parametrize(("names", "said"), [(None, "num_labels: 2"), (["bad", "good"], r"class \(bad, good\)")])
def test_both_numbers_of_a_head_are_named_and_the_labels_where_the_data_have_names(names, said):
    with pytest.raises(LoRAError, match=rf"head has 3 outputs \(num_labels\), and there must be 2, .*{said}"):
        refuse_other_size(factories.bert(), SequenceClassification(2), SimpleNamespace(label_names=names))


class Ordinal(SequenceClassification):
    """Thresholds between classes: an output less than there are classes."""

    def step(self, backbone, batch):
        raise NotImplementedError


def test_a_head_that_fits_or_that_cannot_be_read_is_let_be():
    backbone = factories.bert()
    backbone.classifier = nn.Linear(backbone.classifier.in_features, 2)  # the config still says 3
    refuse_other_size(backbone, SequenceClassification(2))
    inject(backbone, LoRAConfig(r=2, modules_to_save=["classifier"]))
    for model in (backbone, nn.Linear(4, 7), factories.bert().bert):
        refuse_other_size(model, SequenceClassification(2))
    refuse_other_size(factories.bert(), Ordinal(4))
    own = Namespace(class_path="mine.Task", init_args=Namespace(num_classes=2))
    for task in (own, Namespace(class_path="lora_lightning.SequenceRegression")):
        refuse_other_count(Namespace(model=Namespace(task=task, backbone=own)), SimpleNamespace(num_classes=5))


def test_a_head_is_counted_before_the_first_step(tmp_path):
    with pytest.raises(LoRAError, match="give its head 3 outputs"):
        fit(tmp_path, LoRAModule(Vision(), SequenceClassification(3), LoRAConfig(r=2)))


@pytest.mark.parametrize(("labels", "bad"), [([0, 1], None), ([0, 2], 2), ([-1, 1], -1), ([0, -100], -100)])
def test_a_label_beyond_the_outputs_is_named_before_the_loss(labels, bad):
    task, batch = SequenceClassification(2), {"labels": torch.tensor(labels)}
    said = f"a batch has the label {bad}, and the task 2, numbered 0 to 1"
    with pytest.raises(LoRAError, match=said) if bad else nullcontext():
        task.check(batch)
