"""What is not supported is refused by name, before anything is loaded."""

import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy

from lora_lightning import LoRAError
from lora_lightning.training.preflight import INSTEAD, refuse_unsupported
from lora_lightning.training.trainer import LoRATrainer


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_is_not_supported_is_refused_with_what_to_take(kind):
    made = kind.__new__(kind)  # neither can be made without a GPU or its package
    with pytest.raises(LoRAError, match=rf"strategy {kind.__name__}: .*configs/strategy/fsdp2\.yaml"):
        refuse_unsupported(made)


def test_a_trainer_asks(monkeypatch):
    monkeypatch.setitem(INSTEAD, DDPStrategy, "take another")
    with pytest.raises(LoRAError, match="strategy ddp: take another"):
        LoRATrainer(accelerator="cpu", devices=2, strategy="ddp")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fsdp3", r"no strategy 'fsdp3'; did you mean 'fsdp2' or 'fsdp1'.*there are auto, ddp"),
        ("deepspeed", r"strategy deepspeed: .*configs/strategy/deepspeed-zero2\.yaml"),
        ("deepspeed_stage_3", r"strategy deepspeed_stage_3: .*deepspeed-zero3\.yaml"),
        ("fsdp", r"strategy fsdp: .*configs/strategy/fsdp2\.yaml"),
    ],
)
def test_a_name_is_refused_before_lightning_asks_for_a_gpu_or_a_package(name, said):
    with pytest.raises(LoRAError, match=said):
        LoRATrainer(accelerator="cpu", devices=1, strategy=name)


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (EMAWeightAveraging(), "callback EMAWeightAveraging: it keeps another copy of all of W0"),
        (StochasticWeightAveraging(0.1), "callback StochasticWeightAveraging: it keeps another copy of all of W0"),
        (ModelPruning("l1_unstructured", amount=0.5), "callback ModelPruning: it writes zeros into W0"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_a_callback_that_copies_or_changes_w0_is_refused(callback, said):
    with pytest.raises(LoRAError, match=said):
        LoRATrainer(accelerator="cpu", devices=1, callbacks=[callback], logger=False)
