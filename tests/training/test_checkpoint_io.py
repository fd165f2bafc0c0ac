"""A checkpoint is whole or absent; a damaged one is found out, and the one before it is used, aloud."""

import copy
import functools
import multiprocessing
import os
import pickle
import resource
import zipfile

import pytest
import torch

from lora_lightning import LoRAError
from lora_lightning.lora.formats.atomic_dir import _host
from lora_lightning.training.checkpoints.adapter_state import refuse_damaged_fields
from lora_lightning.training.checkpoints.file_io import (
    PREVIOUS,
    DamagedCheckpointError,
    WholeFiles,
    check_whole,
    read_checkpoint,
    write_checkpoint,
)
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from lora_lightning.training.initialization import start_from_adapter
from lora_lightning.training.precision import precision_of
from tests.training import resuming

FORK = multiprocessing.get_context("fork")


def content(value: float, size: int = 64):
    return {"state_dict": {"a": torch.full((size,), value)}, "epoch": 1, "name": "x"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    write_checkpoint(content(1.0), path)
    return path


def value_of(path) -> float:
    return float(read_checkpoint(path)["state_dict"]["a"][0])


def test_what_is_written_is_a_plain_torch_file_and_a_sound_zip_of_the_same_bytes_again(file, tmp_path):
    assert torch.equal(torch.load(file, weights_only=True, mmap=True)["state_dict"]["a"], torch.ones(64))
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    write_checkpoint(content(1.0), tmp_path / "other" / "last.ckpt")
    assert (tmp_path / "other" / "last.ckpt").read_bytes() == file.read_bytes()


def same(found, wanted) -> bool:
    return torch.equal(found.pop("state_dict")["a"], wanted.pop("state_dict")["a"]) and found == wanted


def test_any_flipped_bit_of_what_a_file_holds_is_found(file):
    """One between two entries, or of what a zip says twice, changes nothing of what is read."""
    whole, found = file.read_bytes(), 0
    with zipfile.ZipFile(file) as archive:
        held = sum(entry.file_size for entry in archive.infolist())
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert same(read_checkpoint(file), content(1.0)), place
        except DamagedCheckpointError:
            found += 1
    assert found >= held // 3


def test_a_file_that_is_cut_anywhere_is_found(file):
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpointError, match="not a whole checkpoint"):
            check_whole(file)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:99] + b"!" + b[100:]])
def test_a_damaged_file_gives_way_to_the_one_before_it_aloud(file, damage):
    write_checkpoint(content(2.0), file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="not a whole checkpoint.*the one before it is used"):
        assert float(WholeFiles().load_checkpoint(file)["state_dict"]["a"][0]) == 1.0


def test_two_damaged_files_are_an_error(file):
    write_checkpoint(content(2.0), file)
    for path in (file, file.with_name(file.name + PREVIOUS)):
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt\.previous"):
        read_checkpoint(file)


def test_a_file_of_plain_lightning_is_checked_by_its_own_sums(tmp_path):
    path = tmp_path / "epoch=1.ckpt"
    torch.save(content(3.0), path)
    assert value_of(path) == 3.0
    whole = path.read_bytes()
    place = whole.index(torch.full((4,), 3.0).numpy().tobytes())
    path.write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    assert torch.load(path, weights_only=True)["epoch"] == 1  # torch itself sees nothing
    with pytest.raises(DamagedCheckpointError, match="fails its checksum"):
        read_checkpoint(path)


def on_a_full_disk(path):
    """What is said in a process of its own, where files of more than 100 kB fail."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    with pytest.raises(LoRAError) as refused:
        write_checkpoint(content(2.0, 1_000_000), path)
    return str(refused.value)


def test_a_full_disk_leaves_the_older_checkpoint_and_says_so(file):
    with FORK.Pool(1) as pool:
        assert "File too large" in pool.apply(on_a_full_disk, (file,))
    assert value_of(file) == 1.0
    assert [p.name for p in file.parent.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_written_is_one_clear_error(file, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(LoRAError, match=r"could not be written .*Read-only file system.*--ckpt_path last"):
        write_checkpoint(content(2.0), file)
    monkeypatch.undo()
    assert value_of(file) == 1.0
    with pytest.raises(LoRAError, match=r"a\.ckpt"):
        write_checkpoint(content(2.0), file / "below" / "a.ckpt")


def write_for_ever(path):
    for n in range(1, 10**9):
        write_checkpoint(content(float(n), 200_000), path)


@pytest.mark.parametrize("seconds", [0.05, 0.25])
def test_killed_while_writing_there_is_a_whole_file_and_litter_goes_with_the_next(tmp_path, seconds):
    file = tmp_path / "last.ckpt"
    write_checkpoint(content(0.0, 200_000), file)
    writer = FORK.Process(target=write_for_ever, args=(file,))
    writer.start()
    writer.join(seconds)
    writer.kill()
    writer.join()
    check_whole(file)
    write_checkpoint(content(5.0), file)
    check_whole(file.with_name(file.name + PREVIOUS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.previous"]


def test_a_living_processs_part_file_is_left_and_a_dead_ones_is_taken_away(file):
    ended = FORK.Process(target=int)
    ended.start()
    ended.join()
    living, dead = (file.with_name(f".last.ckpt.{_host()}.{pid}.new.part") for pid in (os.getppid(), ended.pid))
    for part in (living, dead):
        part.write_bytes(b"half")
    write_checkpoint(content(1.0), file)
    assert (living.exists(), dead.exists()) == (True, False)


def test_both_files_are_removed(file):
    write_checkpoint(content(2.0), file)
    WholeFiles().remove_checkpoint(file)
    assert not list(file.parent.iterdir())


# Law 7 for what others made of a file: what is not as a fit wrote it is refused by the field or name.


class Evil:
    def __reduce__(self):
        return os.system, ("touch gotcha",)


@pytest.mark.parametrize("made", [Evil(), {"state_dict": {}, "x": Evil()}], ids=["a pickle", "a pickle inside"])
def test_a_foreign_pickle_is_refused_in_one_line_and_runs_nothing(made, tmp_path):
    torch.save(made, tmp_path / "evil.ckpt")
    for read in (load_checkpoint, read_checkpoint):
        with pytest.raises(LoRAError, match=r"evil\.ckpt' is no checkpoint of lora_lightning.*posix\.system") as raised:
            read(tmp_path / "evil.ckpt")
        assert "\n" not in str(raised.value)
    with pytest.raises(LoRAError, match="holds more than tensors and plain values"):
        start_from_adapter(torch.nn.Linear(1, 1), str(tmp_path / "evil.ckpt"), None, allow_other_base=False)
    assert not (tmp_path / "gotcha").exists()
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(LoRAError, match=r"bare\.ckpt' is not a whole checkpoint"):
        load_checkpoint(tmp_path / "bare.ckpt")


@pytest.fixture(scope="module")
def last(tiny, tmp_path_factory):
    """The newest state of a fit of a few steps."""
    trainer = resuming.fit(tiny, tmp_path_factory.mktemp("damaged"), max_steps=2)
    return load_checkpoint(trainer.checkpoint_callback.last_model_path)


FIELDS = ["loops", "optimizer_states", "lr_schedulers", "callbacks", "global_step", "lora_lightning"]
FIELDS += ["lora_lightning/config", "lora_lightning/base", "loops/fit_loop", "loops/fit_loop/epoch_progress"]
FIELDS += ["lora_lightning_resume/processes"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_fit_does_not_go_on_from_a_checkpoint_without_a_field(last, field):
    content = copy.deepcopy(last)
    *path, name = field.split("/")
    del functools.reduce(lambda inner, step: inner[step], path, content)[name]
    words = "was not written by lora_lightning" if field == "lora_lightning" else f"has no '{field.replace('/', '.')}'"
    with pytest.raises(LoRAError, match=words):
        refuse_damaged_fields(content, resumes=True)


@pytest.mark.parametrize(("field", "value"), [("optimizer_states", []), ("loops", 3), ("optimizer_states", [{}])])
def test_a_field_of_another_kind_is_named(last, field, value):
    with pytest.raises(LoRAError, match=rf"as '{field}', where .* is expected"):
        refuse_damaged_fields(last | {field: value}, resumes=True)


def test_weights_alone_may_be_tested_though_no_fit_goes_on_from_them(tiny, last, tmp_path):
    """What ModelCheckpoint writes with save_weights_only."""
    weights = {k: v for k, v in last.items() if k not in ("optimizer_states", "lr_schedulers", "loops")}
    write_checkpoint(weights, tmp_path / "weights.ckpt")
    trainer = resuming.fit(tiny, tmp_path / "fresh", max_steps=1)
    assert precision_of(trainer.lightning_module) == "32-true"
    trainer.test(trainer.lightning_module, trainer.datamodule, ckpt_path=str(tmp_path / "weights.ckpt"), verbose=False)
    with pytest.raises(LoRAError, match=r"start a new one from its weights with --model\.init_adapter"):
        resuming.fit(tiny, tmp_path / "again", ckpt=tmp_path / "weights.ckpt", max_steps=4)
