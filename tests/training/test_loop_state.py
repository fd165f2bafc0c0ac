"""Private names of Lightning's loops, which `loop_state.py` owns: an upgrade that moves one fails here by its name."""

from lightning.pytorch import Trainer

from lora_lightning.training.checkpoints import adapter_state, loop_state

FIT_LOOP = ["_should_accumulate", "_restarting", "_data_fetcher", "_combined_loader"]
FIT_LOOP += ["_combined_loader_states_to_load", "_load_combined_loader_states"]


def test_names_and_fields_of_the_loops_are_there_and_the_step_that_is_logged_is_lightnings():
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, log_every_n_steps=3)
    assert [name for name in FIT_LOOP if not hasattr(trainer.fit_loop, name)] == []
    assert hasattr(trainer.fit_loop.epoch_loop, "_should_check_val_fx")
    state = trainer.fit_loop.state_dict()
    wanted = [f.removeprefix("loops.fit_loop.") for f in adapter_state.FIT_FIELDS if f.startswith("loops.fit_loop.")]
    assert set(wanted) <= state.keys()
    assert "_batches_that_stepped" in state["epoch_loop.state_dict"]
    assert set(loop_state.COUNTS) <= state["epoch_progress"]["current"].keys()
    trainer.training = True
    for stepped in range(7):
        trainer.fit_loop.epoch_loop._batches_that_stepped = stepped
        assert loop_state.is_logged(trainer) == trainer._logger_connector.should_update_logs
