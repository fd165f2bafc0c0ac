"""What is not supported is refused by name, before anything is loaded."""

import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lora_lightning import LoRAError
from lora_lightning.training.checkpoints.run_folder import find_checkpoint
from lora_lightning.training.preflight import INSTEAD, refuse_unsupported, refuse_unsupported_name
from lora_lightning.training.trainer import LoRATrainer


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_a_strategy_that_is_not_supported_is_refused_with_what_to_take(kind):
    made = kind.__new__(kind)  # two of them cannot be made without a GPU or a package
    with pytest.raises(LoRAError, match=rf"strategy {kind.__name__}: .*fsdp2"):
        refuse_unsupported(made)
    with pytest.raises(LoRAError, match=rf"strategy lightning.pytorch.strategies.{kind.__name__}: .*fsdp2"):
        refuse_unsupported_name(f"lightning.pytorch.strategies.{kind.__name__}")


def test_a_trainer_asks(monkeypatch):
    monkeypatch.setitem(INSTEAD, DDPStrategy, "take another")
    with pytest.raises(LoRAError, match="strategy ddp: take another"):
        LoRATrainer(accelerator="cpu", devices=2, strategy="ddp")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fsdp3", r"no strategy 'fsdp3'; did you mean 'fsdp2'.*there are auto, ddp"),
        *((name, rf"strategy {name}: .*fsdp2") for name in ("deepspeed", "deepspeed_stage_3", "fsdp")),
        *((name, rf"strategy {name}: it is gone: .*fsdp2") for name in ("fsdp1", "zero2", "zero3")),
    ],
)
def test_a_name_is_refused_before_lightning_asks_for_a_gpu_or_a_package(name, said):
    with pytest.raises(LoRAError, match=said):
        LoRATrainer(accelerator="cpu", devices=1, strategy=name)


@pytest.mark.parametrize("name", ["FSDP1Strategy", "ZeRO2Strategy", "ZeRO3Strategy"])
def test_a_strategy_of_an_earlier_version_is_refused_where_it_is_imported(name):
    import lora_lightning

    with pytest.raises(ImportError, match=rf"lora_lightning.{name}: it is gone.*FSDP2Strategy"):
        getattr(lora_lightning, name)


def test_a_checkpoint_in_parts_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(LoRAError, match=r"last\.ckpt' is a checkpoint in parts, and files are read here"):
        find_checkpoint(tmp_path / "last.ckpt")


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
