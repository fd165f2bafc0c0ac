"""DeepSpeed's ZeRO-2 and ZeRO-3: laws 2, 8 and 9, and what checkpoints hold, in two and four processes on the CPU."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lora_lightning import LoRAError
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.training import zero_engine, zero_parts
from lora_lightning.training.checkpoints.file_io import WholeFiles
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from lora_lightning.training.trainer import LoRATrainer
from lora_lightning.training.zero2_strategy import ZeRO2Strategy
from lora_lightning.training.zero3_strategy import ZeRO3Strategy
from lora_lightning.training.zero_engine import checked, refuse_numbers, refuse_optimizer
from lora_lightning.training.zero_parts import load_state, rows_of_stage_2, rows_of_stage_3, whole_state
from tests.command.process import REPOSITORY, run
from tests.command.warm import run_all
from tests.training import ragged, sharded, zeroed
from tests.training.resuming import differing

THERE = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not THERE, reason="DeepSpeed is not installed")


# A run's life.


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """A checkpoint of a single process, at the end of its first epoch."""
    folder = tmp_path_factory.mktemp("one")
    sharded.fit(folder, max_epochs=1)
    return sharded.at(folder, 7)


MORE = [pytest.param(given, marks=pytest.mark.slow) for given in ((3, 2), (2, 4), (3, 4))]


@pytest.fixture(scope="module", params=[(2, 2), *MORE], ids=lambda given: f"{given[0]}-{given[1]}")
def lived(request, of_one, tmp_path_factory):
    """What several processes found, the folder that holds their runs, and how many they were."""
    if not THERE:
        pytest.skip("DeepSpeed is not installed")
    stage, count = request.param
    folder = tmp_path_factory.mktemp(f"stage{stage}")
    shutil.copyfile(of_one, folder / "one.ckpt")
    command = [sys.executable, "-m", "tests.training.zeroed", "life", str(folder), str(count), str(stage)]
    env = {**os.environ, "LIMIT": "900"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder, torch.load(folder / "found.pt", weights_only=False), count


def far(one, other):
    """The largest difference of two adapters, relative to each tensor's largest entry."""
    return max(float((other[key] - value).abs().max() / value.abs().max()) for key, value in one.items())


def of_fit(folder, name, clip):
    return torch.load(folder / f"{name} {clip}.pt")


def test_two_processes_are_ddp_to_the_bit_and_four_add_up_in_another_order(lived):
    ddp, ours = (of_fit(lived[0], name, 0) for name in ("ddp", "zero"))
    assert ddp["steps"] == ours["steps"] >= 12
    if lived[2] > 2:
        assert far(ddp["adapter"], ours["adapter"]) < 2e-6
        return
    assert differing(ddp["adapter"], ours["adapter"]) == []
    assert ddp["losses"] == ours["losses"]
    assert ddp["metrics"] == ours["metrics"]


def test_several_processes_equal_one_with_all_their_batches_over_accumulated_ragged_ones(lived):
    one = ragged.fit(6 * lived[2], made=zeroed.module(), max_steps=zeroed.STEPS, gradient_clip_val=0)
    ours = of_fit(lived[0], "zero", 0)
    assert far(one["adapter"], ours["adapter"]) < 1e-6
    assert ours["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert ours["metrics"] == pytest.approx(one["metrics"], rel=1e-5)


def test_clipped_gradients_are_those_of_ddp_and_clipping_shows(lived):
    ddp, ours = (of_fit(lived[0], name, ragged.CLIP) for name in ("ddp", "zero"))
    assert far(ddp["adapter"], ours["adapter"]) < 2e-6  # their norms are added up in another order
    assert ours["losses"] == pytest.approx(ddp["losses"], rel=1e-5)
    assert far(of_fit(lived[0], "zero", 0)["adapter"], ours["adapter"]) > 1e-3


@pytest.mark.parametrize("step", [9, 7])
def test_a_resumed_fit_is_the_uninterrupted_one(lived, step):
    _, found, _ = lived
    assert differing(found["whole"], found[f"from {step}"]) == []


def test_a_checkpoint_is_that_of_a_single_process_and_holds_no_weight_of_the_base(lived, of_one):
    folder, _, _ = lived
    many, one = load_checkpoint(sharded.at(folder / "many", 7)), load_checkpoint(of_one)
    assert many.keys() == one.keys()
    assert list(many["state_dict"]) == list(one["state_dict"])
    assert {k: v.shape for k, v in many["state_dict"].items()} == {k: v.shape for k, v in one["state_dict"].items()}
    assert many["lora_lightning"]["base"] == one["lora_lightning"]["base"]
    (ours,), (theirs,) = many["optimizer_states"], one["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    shapes = [
        {i: {k: (v.shape, v.dtype) for k, v in own.items()} for i, own in s["state"].items()} for s in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in many["state_dict"].values()}
    assert sum(stored.values()) == sum(t.nbytes for t in many["state_dict"].values())
    made = sharded.module(torch.float32, modules_to_save=["norm"])
    assert {k.removeprefix("backbone.") for k in many["state_dict"]} == adapter_tensors(made.backbone).keys()


def test_one_process_goes_on_and_evaluates_from_it(lived, tmp_path):
    folder, found, _ = lived
    trainer = sharded.fit(tmp_path / "on", ckpt=sharded.at(folder / "many", 7), max_epochs=2)
    assert trainer.global_step == found["whole"]["step"]
    alone = sharded.figures(trainer, sharded.at(folder / "many", 9))
    many = dict(found["figures"])
    torch.testing.assert_close(many.pop("predicted"), alone.pop("predicted"), rtol=1e-5, atol=1e-5)
    assert many == pytest.approx(alone, rel=1e-5)
    assert {"test/loss", "val/loss", "test/accuracy"} <= many.keys()


def test_several_processes_go_on_from_one(lived, of_one):
    _, found, _ = lived
    ours, one = found["of one process"], load_checkpoint(of_one)
    assert ours["step"] == found["whole"]["step"]
    assert all(float(ours[f"{i}.step"]) == 14 for i in one["optimizer_states"][0]["state"])


def test_a_write_into_the_base_of_one_process_stops_all(lived):
    _, found, _ = lived
    moved = "W0MovedError: W0 moved during fit: 1 frozen tensors changed, first 'layers.1.up.weight'"
    assert [said.startswith(moved) for said in found["stopped by w0"]] == [True] * lived[2]


def test_a_loss_that_is_not_finite_in_one_process_stops_all(lived):
    _, found, _ = lived
    bad = "NotFiniteError: the loss of optimizer step 5 is not finite"
    assert [said.startswith(bad) for said in found["stopped by loss"]] == [True] * lived[2]


def test_figures_of_the_steps_are_those_of_whole_gradients(lived):
    _, found, _ = lived
    assert found["norms"]["zero"] == pytest.approx(found["norms"]["ddp"], rel=1e-5)
    assert len(found["norms"]["zero"]) == 3


def test_steps_that_were_taken_back_before_the_first_leave_nothing(lived):
    """By a search for a learning rate, which goes back to a checkpoint."""
    _, found, _ = lived
    assert far(found["searched"]["ddp"], found["searched"]["zero"]) < 2e-6


@pytest.mark.parametrize("lived", [(2, 2)], indirect=True)
def test_what_one_processs_batches_do_not_reach_is_added_up_all_the_same(lived):
    _, found, _ = lived
    assert differing(found["unreached"]["ddp"], found["unreached"]["zero"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@needs_deepspeed
def test_narrow_precisions_and_a_loss_that_reads_the_head(stage, tmp_path):
    command = [sys.executable, "-m", "tests.training.zeroed", "narrow", str(tmp_path), "2", str(stage)]
    env = {**os.environ, "LIMIT": "500"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for case in ("bf16-mixed", "bf16-base", "bf16-base and copies", "lm", "siblings"):
        ddp, ours = (torch.load(tmp_path / f"{name} {case}.pt") for name in ("ddp", "zero"))
        assert {v.dtype for v in ours["adapter"].values()} == {torch.float32}
        if case == "siblings" and stage == 3:  # which there do not share what they compute of their input
            assert far(ddp["adapter"], ours["adapter"]) < 1e-5
        else:
            assert differing(ddp["adapter"], ours["adapter"]) == [], case
            assert ddp["losses"] == ours["losses"]


# Rows, without DeepSpeed.


def zero_of(stage, groups, processes, rank):
    """What DeepSpeed's optimizers say of themselves, for parameters in groups."""
    if stage == 2:
        sizes = [-(-sum(p.numel() for p in group) // (2 * processes)) * 2 for group in groups]
        return SimpleNamespace(
            bit16_groups=groups,
            partition_size=sizes,
            single_partition_of_fp32_groups=[torch.full((n,), float(rank), requires_grad=True) for n in sizes],
        )
    for group in groups:
        for p in group:
            p.ds_numel, p.ds_shape = p.numel(), p.shape
            p.partition_numel = lambda p=p: -(-p.numel() // processes)
    flats = [torch.full((sum(p.partition_numel() for p in g),), float(rank), requires_grad=True) for g in groups]
    return SimpleNamespace(
        fp16_groups=groups,
        fp32_partitioned_groups_flat=flats,
        sub_group_to_group_id=dict(enumerate(range(len(groups)))),
    )


ROWS = {2: rows_of_stage_2, 3: rows_of_stage_3}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_a_state_is_the_same_after_it_was_cut_into_any_number_of_rows(stage, processes, monkeypatch):
    shapes = [[(3, 5), (1,), (4, 4)], [(7,), (2, 3)]]
    params = [[torch.nn.Parameter(torch.randn(shape)) for shape in group] for group in shapes]
    whole = torch.optim.AdamW([{"params": params[0], "lr": 0.1}, {"params": params[1], "lr": 0.2}])
    for p in (p for group in params for p in group):
        p.grad = torch.randn_like(p)
    whole.step()
    want = whole.state_dict()
    monkeypatch.setattr(zero_parts, "processes", lambda: processes)
    held = []
    for rank in range(processes):
        monkeypatch.setattr(zero_parts, "rank", lambda rank=rank: rank)
        rows = ROWS[stage](zero_of(stage, params, processes, rank))
        for row in rows:
            counted = sum(piece.count for pieces in row.pieces for piece in pieces)
            assert counted == sum(p.numel() for p in params[row.group])
        mine = torch.optim.AdamW([{"params": [row.held], "lr": 0.0} for row in rows])
        load_state(mine, rows, want)
        held.append((mine, rows))
    sent = {}  # of each of the first process's tensors, all processes' ones
    for number in range(len(params)):
        for name in ("exp_avg", "exp_avg_sq"):
            same = [optimizer.state[rows[number].held][name] for optimizer, rows in held]
            sent[id(same[0])] = same
    monkeypatch.setattr(zero_parts, "gathered_rows", lambda value: sent[id(value)])
    monkeypatch.setattr(zero_parts, "rank", lambda: 0)
    found = whole_state(*held[0])
    assert found["param_groups"] == want["param_groups"]
    assert found["state"].keys() == want["state"].keys()
    for i, own in want["state"].items():
        assert differing(own, found["state"][i]) == []


def test_steps_that_differ_within_a_group_are_told(monkeypatch):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    whole = torch.optim.AdamW(params)
    for p in (*params, params[1]):
        whole.zero_grad()
        p.grad = torch.ones(2)
        whole.step()
    row = rows_of_stage_2(zero_of(2, [params], 1, 0))
    mine = torch.optim.AdamW([row[0].held])
    with pytest.warns(UserWarning, match="counts 'step' for each parameter by itself"):
        load_state(mine, row, whole.state_dict())
    assert float(mine.state[row[0].held]["step"]) == 2


# What is refused.


def test_without_the_package_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(zero_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoRAError, match=r"pip install 'lora_lightning\[deepspeed\]', or take .*ddp\.yaml"):
        ZeRO2Strategy()


@pytest.mark.parametrize(
    ("stage", "name", "said"),
    [
        (2, "offload_optimizer", r"nothing is offloaded here.*FSDP2Strategy and its cpu_offload"),
        (3, "offload_param", r"nothing is offloaded here"),
        (3, "stage3_prefetch_bucket", r"did you mean 'stage3_prefetch_bucket_size'"),
        (2, "stage3_max_live_parameters", r"may be set in stage 2.*allgather_bucket_size"),
    ],
)
def test_an_option_that_would_do_something_else_is_refused_by_name(stage, name, said):
    with pytest.raises(LoRAError, match=rf"zero_optimization\.{name}.*{said}|{said}"):
        checked(stage, {name: True})


def test_an_optimizer_that_needs_whole_matrices_is_refused_by_name():
    one = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(LoRAError, match=r"Adafactor may need them whole: take one of torch.optim's AdamW"):
        refuse_optimizer(torch.optim.Adafactor(one))
    refuse_optimizer(torch.optim.AdamW(one))


def test_numbers_that_deepspeed_would_round_or_scale_are_refused():
    plain, wide = SimpleNamespace(), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.raises(LoRAError, match=r"float32 alone, and there is a\.lora_A \(torch\.float64\)"):
        refuse_numbers(plain, [("a.lora_A", wide)])
    with pytest.raises(LoRAError, match="take bf16-mixed or bf16-base"):
        refuse_numbers(SimpleNamespace(scaler=object()), [])
    refuse_numbers(plain, [("a.lora_A", torch.nn.Parameter(torch.ones(2)))])


@needs_deepspeed
@pytest.mark.parametrize(("word", "kind"), [("zero2", ZeRO2Strategy), ("zero3", ZeRO3Strategy)])
def test_a_word_is_enough_for_the_defaults(word, kind):
    trainer = LoRATrainer(strategy=word, accelerator="cpu", devices=2, logger=False)
    assert type(trainer.strategy) is kind
    assert isinstance(trainer.strategy.checkpoint_io, WholeFiles)


# The command.


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("overlay", ["deepspeed-zero2.yaml", "deepspeed-zero3.yaml"])
def test_the_command_fits_and_tests_in_four_processes_predicts_in_one_and_exports(tiny, tmp_path, overlay):
    both = ["--config", tiny.config, "--config", REPOSITORY / "configs" / "strategy" / overlay]
    run("fit", *both, "--trainer.devices", "4", "--trainer.max_epochs", "2", cwd=tmp_path, timeout=900)
    run("test", "--ckpt_path", "runs/tiny", cwd=tmp_path, timeout=900)
    run("predict", "--ckpt_path", "runs/tiny", "--trainer.devices", "1", cwd=tmp_path, timeout=600)
    run("export", "--ckpt_path", "runs/tiny", cwd=tmp_path, timeout=600)
    folder = tmp_path / "runs" / "tiny" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert report["w0_unchanged"]
    assert report["export_max_rel_diff"] < 1e-5
    assert {"test_accuracy", "val_accuracy"} <= report.keys()
    assert (folder / "export" / "adapter" / "adapter_config.json").is_file()
    assert next(folder.rglob("predictions.jsonl")).read_text().count("\n") > 10


def case(tiny, overlay, name, fault="", *args, of=None):
    given = ["fit", "--config", tiny.config, "--config", REPOSITORY / "configs/strategy" / overlay]
    given += ["--name", of or name, "--trainer.max_epochs", 3, "--data.init_args.batch_size", 8]
    given += ["--trainer.callbacks", "[tests.command.faults.Fault]", *args]
    return {"name": name, "args": list(map(str, given)), "count": 2, "launcher": "torchrun", "env": {"FAULT": fault}}


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("overlay", ["deepspeed-zero2.yaml", "deepspeed-zero3.yaml"])
def test_what_stops_one_process_stops_all_and_sigterm_leaves_a_checkpoint(tiny, tmp_path, overlay):
    cases = [
        case(tiny, overlay, "asked", "term:1:4"),
        case(tiny, overlay, "again", "", "--ckpt_path", "auto", of="asked"),
        case(tiny, overlay, "gone", "kill:1:4"),
        case(tiny, overlay, "error", "error:1:4"),
        case(tiny, overlay, "disk", "disk:0:4"),
    ]
    played = run_all(cases, tmp_path)
    assert 75 in played["asked"].codes
    assert set(played["again"].codes) == {0}, played["again"].everything
    for name in ("gone", "error", "disk"):
        assert not {0, "hangs"} & set(played[name].codes), played[name].everything
    for name in ("gone", "disk"):  # the other is a mistake in code, which shows where it was
        assert sum("error:" in line for line in played[name].everything.splitlines()) == 1
