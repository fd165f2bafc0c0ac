"""Every config of version 0.1 runs a step of today's package, on what is tiny, or is refused in one line.

The files are those of the repository's own history, unchanged; `tests/test_earlier_configs.py` has the names alone.
"""

import io
import subprocess
import tarfile

import pytest
import torch
import yaml

from tests.command.process import REPOSITORY, run
from tests.recipes import test_glue, test_gpt2
from tests.recipes.recipe import rows_file, run_a_step
from tests.recipes.test_steps import MODELS, SETS, STEPS, chat_files, chats
from tests.tiny_text import restaurants

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COMMIT = "b6a78d9"
DEMOS = ("demo.yaml", "demo-vision.yaml", "demo-vision-dinov2.yaml")
GLUE = [test_glue.stack(model, task) for model in ("roberta-base", "roberta-large") for task in test_glue.TASKS]
GPT2 = [test_gpt2.stack(of, size) for of in test_gpt2.SETS for size in test_gpt2.SIZES]
QLORA = "lm/qlora.yaml"
OVERLAYS = ["debug.yaml", "logger/wandb.yaml"]
OVERLAYS += [f"precision/{name}.yaml" for name in ("16-mixed", "bf16-base", "bf16-mixed", "float32", "nf4-base")]
OVERLAYS += [f"strategy/{name}.yaml" for name in ("ddp-fork", "ddp", "fsdp2", "multi-node", "single")]
SWEEPS = ["sweeps/bayes.yaml", "sweeps/matrices.yaml", "sweeps/rank.yaml"]
GONE = ("deepspeed-zero2", "deepspeed-zero3", "fsdp1", "fsdp2-folder", "fsdp2-tp")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The folder `configs` as version 0.1 had it."""
    packed = subprocess.run(["git", "archive", COMMIT, "configs"], cwd=REPOSITORY, capture_output=True, check=False)
    if packed.returncode:
        pytest.skip(f"this clone has no commit {COMMIT}: git fetch --unshallow")
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder / "configs"


def test_every_config_of_the_version_before_is_run_or_refused_here(earlier):
    run_here = {file for stack in (*GLUE, *GPT2, *(stack for stack, _ in STACKS.values())) for file in stack}
    run_here |= {*DEMOS, "demo-lm.yaml", *OVERLAYS, *SWEEPS, *(f"strategy/{name}.yaml" for name in GONE)}
    assert run_here == {str(file.relative_to(earlier)) for file in earlier.rglob("*.yaml")}


def step(earlier, stack, folder, **kwargs):
    cli = run_a_step([earlier / file for file in stack], folder, **kwargs)
    assert cli.trainer.global_step == 1
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    return cli


def name_of(stack):
    return " ".join(file.removesuffix(".yaml") for file in stack)


# ---- recipes


@pytest.mark.parametrize("stack", GLUE, ids=name_of)
def test_a_recipe_of_glue_runs_a_step(stack, earlier, tmp_path):
    model = test_glue.make_roberta(tmp_path / "model")
    task = stack[1].removeprefix("glue/tasks/").removesuffix(".yaml")
    step(
        earlier,
        stack,
        tmp_path,
        model=model,
        data=test_glue.overrides(task, tmp_path / "rows"),
        args=["--model.init_adapter", "null"],  # of the MNLI run, as test_glue.py has it
    )


@pytest.mark.parametrize("stack", GPT2, ids=name_of)
def test_a_recipe_of_gpt2_runs_a_step(stack, earlier, tmp_path):
    model = test_gpt2.make_tiny(tmp_path / "model")
    parts = {"train": restaurants(16), "validation": restaurants(6, seed=1), "test": restaurants(6, seed=2)}
    files = {split: str(rows_file(tmp_path / f"{split}.jsonl", rows)) for split, rows in parts.items()}
    short = "--model.task.init_args.generation.max_new_tokens=4"
    step(earlier, stack, tmp_path, model=model, data={"path": files}, args=[short])


STACKS = {name: (files, make) for name, (files, make, _) in STEPS.items() if name != "demo"}
STACKS |= {f"{model} {data}": (chat_files(model, data), chats(model, data)) for model in MODELS for data in SETS}
STACKS |= {f"{model} qlora": (chat_files(model, "own-jsonl", QLORA), chats(model, "own-jsonl")) for model in MODELS}


@pytest.mark.parametrize("name", STACKS)
def test_any_other_recipe_runs_a_step(name, earlier, tmp_path):
    stack, make = STACKS[name]
    given = make(tmp_path)
    if QLORA in stack:
        given["args"] = [*given["args"], "--trainer.precision", "nf4-base"]
    step(earlier, stack, tmp_path, **given)


# ---- demos, with their own weights, and what goes over them


@pytest.fixture(scope="module")
def demos(earlier, tmp_path_factory):
    """The demos, with what their refusals say to take: their readers are in the repository's own folder `demos`."""
    folder = tmp_path_factory.mktemp("demos")
    for file in ("demo-lm.yaml", *DEMOS):
        text = (earlier / file).read_text().replace("lora_lightning.Baselines", "demos.baselines.Baselines")
        text = text.replace("lora_lightning.ChatData", "demos.dialogues.DialogueData")
        (folder / file).write_text(text.replace("lora_lightning.demos.", "demos."))
    return folder


def fit_a_step(folder, *args):
    """In the repository, where the folder `demos` is found; returns what the run left."""
    brief = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    run("fit", *args, *brief, "--runs_dir", folder / "runs", cwd=REPOSITORY, timeout=1200)
    return next((folder / "runs").rglob("checkpoints/last.ckpt"))


@pytest.mark.parametrize("file", ["demo-lm.yaml", *DEMOS])
def test_a_demo_is_refused_with_what_to_take(file, earlier, tmp_path):
    done = run("fit", "-c", earlier / file, cwd=tmp_path, ok=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    taken = "dialogues.DialogueData" if file == "demo-lm.yaml" else "baselines.Baselines"
    assert f"take demos.{taken}" in line


@pytest.mark.parametrize("file", ["demo-lm.yaml", *DEMOS])
def test_a_demo_runs_a_step(file, demos, tmp_path):
    assert fit_a_step(tmp_path, "-c", demos / file).is_file()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_runs_a_step(overlay, earlier, demos, tmp_path):
    one_node = ["--trainer.num_nodes=1", "--trainer.devices=2"] if "multi-node" in overlay else []
    offline = ["--trainer.logger.init_args.save_dir", tmp_path] if "wandb" in overlay else []
    args = ["-c", demos / "demo.yaml", "-c", earlier / overlay, "--trainer.callbacks=[]", *one_node, *offline]
    assert fit_a_step(tmp_path, *args).is_file()


@pytest.mark.parametrize("name", GONE)
def test_an_overlay_that_is_gone_is_refused_with_what_to_take(name, earlier, demos, tmp_path):
    files = ["-c", demos / "demo.yaml", "-c", earlier / "strategy" / f"{name}.yaml"]
    done = run("fit", *files, "--trainer.callbacks=[]", cwd=REPOSITORY, ok=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "FSDP2Strategy" in line.rpartition("take ")[2] or "leave it out" in line


@pytest.mark.parametrize("file", SWEEPS)
def test_a_sweep_of_weights_and_biases_runs_a_step(file, earlier, demos, tmp_path):
    """As its agent would start it, with the first value of each parameter."""
    sweep = yaml.safe_load((earlier / file).read_text())
    words = [word for word in sweep["command"] if word.startswith("--")]
    words = [word.replace("configs/demo.yaml", str(demos / "demo.yaml")) for word in words]
    words = [word.replace("configs/logger", str(earlier / "logger")) for word in words]
    drawn = {key: space.get("values", [space.get("min")])[0] for key, space in sweep["parameters"].items()}
    args = [f"--{key}={value}" for key, value in drawn.items()]
    save = ["--trainer.logger.init_args.save_dir", tmp_path, "--trainer.callbacks=[]"]
    assert fit_a_step(tmp_path, *words, *args, *save).is_file()
