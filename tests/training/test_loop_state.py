"""Private names of Lightning's loops, which `loop_state.py` owns: an upgrade that moves one fails here by its name."""

import pytest
from lightning.pytorch import Trainer

from lora_lightning.training.checkpoints import adapter_state, loop_state

FIT_LOOP = (
    "_should_accumulate",
    "_restarting",
    "_data_fetcher",
    "_combined_loader",
    "_combined_loader_states_to_load",
    "_load_combined_loader_states",
)


@pytest.fixture
def trainer():
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, log_every_n_steps=3)


@pytest.mark.parametrize("name", FIT_LOOP)
def test_a_name_of_the_fit_loop_is_there(trainer, name):
    assert hasattr(trainer.fit_loop, name)


@pytest.mark.parametrize("name", ["_should_check_val_fx", "_batches_that_stepped"])
def test_a_name_of_the_epoch_loop_is_there(trainer, name):
    assert hasattr(trainer.fit_loop.epoch_loop, name)


def test_the_loops_state_has_the_fields_that_a_checkpoint_must_have(trainer):
    state = trainer.fit_loop.state_dict()
    wanted = [f.removeprefix("loops.fit_loop.") for f in adapter_state.FIT_FIELDS if f.startswith("loops.fit_loop.")]
    assert set(wanted) <= state.keys()
    assert "_batches_that_stepped" in state["epoch_loop.state_dict"]
    assert set(loop_state.COUNTS) <= state["epoch_progress"]["current"].keys()


def test_the_step_that_is_logged_is_lightnings(trainer):
    trainer.training = True
    for stepped in range(7):
        trainer.fit_loop.epoch_loop._batches_that_stepped = stepped
        assert loop_state.is_logged(trainer) == trainer._logger_connector.should_update_logs
