"""Law 7 for what others made of a file: a checkpoint that is not what a fit wrote is refused by the field or name."""

import copy
import os
import pickle

import pytest
import torch

from lora_lightning import LoRAError
from lora_lightning.training.checkpoints.file_io import read_checkpoint, write_checkpoint
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from lora_lightning.training.initialization import start_from_adapter
from lora_lightning.training.precision import precision_of
from tests.training import resuming


class Evil:
    def __reduce__(self):
        return os.system, ("touch gotcha",)


@pytest.fixture(scope="module")
def last(tiny, tmp_path_factory):
    """The newest state of a fit of a few steps."""
    folder = tmp_path_factory.mktemp("damaged")
    trainer = resuming.fit(tiny, folder, max_steps=2)
    return trainer.checkpoint_callback.last_model_path


@pytest.mark.parametrize("made", [Evil(), {"state_dict": {}, "x": Evil()}], ids=["a pickle", "a pickle inside"])
def test_a_foreign_pickle_is_refused_in_one_line_and_runs_nothing(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.ckpt"
    torch.save(made, file)
    for read in (load_checkpoint, read_checkpoint):
        with pytest.raises(LoRAError, match=r"evil\.ckpt' is no checkpoint of lora_lightning.*posix\.system") as raised:
            read(file)
        assert "weights_only" not in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "gotcha").exists()


def test_a_bare_pickle_is_no_checkpoint(tmp_path):
    file = tmp_path / "bare.ckpt"
    file.write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(LoRAError, match=r"bare\.ckpt' is not a whole checkpoint"):
        load_checkpoint(file)


def test_an_adapter_is_not_taken_from_a_foreign_file(tmp_path):
    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(LoRAError, match="holds more than tensors and plain values"):
        start_from_adapter(torch.nn.Linear(1, 1), str(tmp_path / "evil.ckpt"), None, allow_other_base=False)


FIELDS = {
    "loops": "has no 'loops'",
    "optimizer_states": "has no 'optimizer_states'",
    "lr_schedulers": "has no 'lr_schedulers'",
    "callbacks": "has no 'callbacks'",
    "global_step": "has no 'global_step'",
    "lora_lightning": "was not written by lora_lightning",
    "lora_lightning/config": r"has no 'lora_lightning\.config'",
    "lora_lightning/base": r"has no 'lora_lightning\.base'",
    "loops/fit_loop": r"has no 'loops\.fit_loop'",
    "loops/fit_loop/epoch_progress": r"has no 'loops\.fit_loop\.epoch_progress'",
    "lora_lightning_resume/processes": r"has no 'lora_lightning_resume\.processes'",
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_fit_does_not_go_on_from_a_checkpoint_without_a_field(tiny, last, tmp_path, field):
    content = copy.deepcopy(load_checkpoint(last))
    *path, name = field.split("/")
    inner = content
    for step in path:
        inner = inner[step]
    del inner[name]
    write_checkpoint(content, tmp_path / "last.ckpt")
    with pytest.raises(LoRAError, match=FIELDS[field]):
        resuming.fit(tiny, tmp_path / "again", ckpt=tmp_path / "last.ckpt", max_steps=4)


@pytest.mark.parametrize(("field", "value"), [("optimizer_states", []), ("loops", 3), ("optimizer_states", [{}])])
def test_a_field_of_another_kind_is_named(tiny, last, tmp_path, field, value):
    write_checkpoint(load_checkpoint(last) | {field: value}, tmp_path / "last.ckpt")
    with pytest.raises(LoRAError, match=rf"as '{field}', where .* is expected"):
        resuming.fit(tiny, tmp_path / "again", ckpt=tmp_path / "last.ckpt", max_steps=4)


def test_weights_alone_may_be_tested_though_no_fit_goes_on_from_them(tiny, last, tmp_path):
    """What ModelCheckpoint writes with save_weights_only."""
    content = {
        k: v for k, v in load_checkpoint(last).items() if k not in ("optimizer_states", "lr_schedulers", "loops")
    }
    write_checkpoint(content, tmp_path / "weights.ckpt")
    trainer = resuming.fit(tiny, tmp_path / "fresh", max_steps=1)
    assert precision_of(trainer.lightning_module) == "32-true"
    trainer.test(trainer.lightning_module, trainer.datamodule, ckpt_path=str(tmp_path / "weights.ckpt"), verbose=False)
    with pytest.raises(LoRAError, match=r"start a new one from its weights with --model\.init_adapter"):
        resuming.fit(tiny, tmp_path / "again", ckpt=tmp_path / "weights.ckpt", max_steps=4)
