"""What nothing will log is found before a fit begins, and what may be logged is let be."""

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from lora_lightning import Checkpoints, LoRAError, LoRAModule, StepFigures, TextGeneration
from lora_lightning.training.preflight import refuse_unlogged
from lora_lightning.training.trainer import LoRATrainer


class Own(Callback):
    """Whatever it logs."""


@pytest.fixture
def refused(make_module):
    module = make_module()

    def ask(*callbacks, plateau=None):
        refuse_unlogged(LoRATrainer(callbacks=list(callbacks), logger=False, accelerator="cpu"), module, plateau)

    return ask


@pytest.mark.parametrize("metric", ["val_loss", "val/acc", "eval_loss", "loss", "f1"])
def test_a_metric_that_is_not_logged_is_refused_whoever_waits_for_it(metric, refused):
    for callback in (EarlyStopping(metric), ModelCheckpoint(monitor=metric), Checkpoints(monitor=metric)):
        with pytest.raises(
            LoRAError, match=rf"{type(callback).__name__} monitors '{metric}', which is not logged; did"
        ):
            refused(callback)
    with pytest.raises(LoRAError, match="ReduceLROnPlateau monitors"):
        refused(plateau=metric)


@pytest.mark.parametrize(
    "metric", ["val/f1", "train/loss", "train/loss_step", "grad_norm/all", "lr", "samples/s", "step", "val_other/f1"]
)
def test_a_metric_that_is_logged_sometime_is_let_be(metric, refused):
    refused(EarlyStopping(metric), ModelCheckpoint(monitor=metric), StepFigures(), plateau=metric)


def test_texts_that_are_not_written_are_not_waited_for(make_module):
    module = make_module()
    module.task = TextGeneration(None, metrics=["bleu"], generate_in_validation=False)
    trainer = LoRATrainer(callbacks=[EarlyStopping("val/bleu")], logger=False, accelerator="cpu")
    with pytest.raises(LoRAError, match="monitors 'val/bleu', which is not logged"):
        refuse_unlogged(trainer, module)


def test_a_module_of_ones_own_may_log_it(make_module, monkeypatch, recwarn):
    module = make_module()
    monkeypatch.setattr(LoRAModule, "__module__", "mine")
    refuse_unlogged(LoRATrainer(callbacks=[EarlyStopping("val_mine")], logger=False, accelerator="cpu"), module)
    assert any("unless LoRAModule does" in str(one.message) for one in recwarn)


def test_what_does_not_need_its_metric_is_let_be(refused):
    refused(EarlyStopping("x", strict=False), ModelCheckpoint(monitor="x", save_top_k=0), ModelCheckpoint())


@pytest.mark.parametrize("who", [Own(), LearningRateMonitor()])
def test_where_others_may_log_it_is_a_warning(who, refused, recwarn):
    refused(EarlyStopping("val_mine"), who)
    said = [str(one.message) for one in recwarn if "val_mine" in str(one.message)]
    assert said == [
        f"EarlyStopping monitors 'val_mine', which is not logged, unless {type(who).__name__} does (logged are"
        " val/loss, val/accuracy, val/f1, train/loss, train/accuracy, train/f1)"
    ]
