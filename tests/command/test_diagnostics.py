"""What was meant: near misses of class paths and of flags, other tools' names, and lines of a config that is none."""

import re
from contextlib import nullcontext

import pytest

import lora_lightning
from lora_lightning import LoRAError
from lora_lightning.cli.build import run_parser
from lora_lightning.cli.config_files import check_file
from lora_lightning.cli.diagnostics import _arguments_of as arguments_of
from lora_lightning.cli.diagnostics import explain, wrong_path
from lora_lightning.cli.other_tools import HERE, NOT_NEEDED

# ---- class paths


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("lora_lightning.tasks.clasification.X", "did you mean 'lora_lightning.tasks.classification'"),
        ("torch.nn.Linear.forwards", "did you mean 'torch.nn.Linear.forward'"),
        ("zzqqx.Task", "there is no module 'zzqqx': a file zzqqx.py of your own is looked for in the folder where"),
        ("my_task_1.Judge", "did you mean 'my_tasks_1'"),
        ("my_broken_1.X", "'my_broken_1' cannot be imported: No module named 'nothing_here'"),
        ("my_broken_2.X", "'my_broken_2' cannot be imported: ZeroDivisionError: division by zero"),
        ("my_tasks_1.Judge", None),
        ("torch.nn.Linear.forward", None),
    ],
)
def test_a_path_that_leads_nowhere_is_answered_and_another_let_be(path, said, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_tasks_1.py").write_text("class Judge: ...\n")
    (tmp_path / "my_broken_1.py").write_text("import nothing_here\n")
    (tmp_path / "my_broken_2.py").write_text("1 / 0\n")
    assert wrong_path(path) is None if said is None else said in wrong_path(path)


# ---- config files


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "name: x\nlora: \0\n", "a.yaml, line 2: a character that no text holds"),
        ("a.yaml", "# one\ntrainer:\n  # max_epochs: 3\n", "a.yaml, line 2: 'trainer' holds nothing: give it keys"),
        ("a.json", '{"trainer": {"max_steps": 1}', "a.json, line 1: no YAML: while parsing a flow mapping that"),
        ("a.toml", "[trainer]\nmax_steps = 1\n", "a.toml, line 2: no YAML: expected '<document start>'"),
        ("a.json", '{\n\t"trainer": {\n\t\t"max_steps": 1\n\t}\n}', None),
        ("a.yaml", "ckpt_path: null\nname: x\n", None),
        ("a.yaml", "save_every: null\nckpt_path: ~\n", None),
    ],
)
def test_what_is_wrong_in_a_config_is_said_with_its_line(name, text, said, tmp_path):
    file = tmp_path / name
    file.write_text(text)
    with nullcontext() if said is None else pytest.raises(LoRAError, match=f"^{re.escape(said or '')}"):
        check_file(file.relative_to(tmp_path))


# ---- flags, and what other tools call them


@pytest.fixture(scope="module")
def options():
    return run_parser("fit").options_of("fit")


CLASSES = {
    "data": [name for name in lora_lightning.__all__ if name.endswith("Data")],
    "model.backbone": ["huggingface"],
    "model.lr_scheduler": ["WarmupDecay"],
    "model.task": ["SequenceClassification"],
}


def takes(key, options):
    """Whether there is such a key: an option, or an argument of a class that may stand there."""
    place, _, argument = key.partition(".init_args.")
    if not argument:
        return f"--{key}".removesuffix("+=EarlyStopping") in options
    paths = ["torch.optim.AdamW"] if place == "model.optimizer" else [f"lora_lightning.{n}" for n in CLASSES[place]]
    return any(argument.partition(".")[0] in arguments_of(path) for path in paths)


def test_every_answer_to_another_tools_name_is_a_key_of_fit_and_none_is_one_of_ours(options):
    for key in HERE:
        assert takes(key.partition(" ")[0].rstrip(","), options), key
    for names in (*HERE.values(), *NOT_NEEDED.values()):
        for name in names.split():
            assert f"--{name}" not in options, name


def test_a_flag_of_another_tool_and_one_that_is_gone_are_answered_by_what_the_command_takes(options, tmp_path):
    said = explain("unrecognized arguments: --lora_r 3", ["--lora_r", "3"], ["--base_model", "--adapter"], "merge")
    assert said == "unknown option --lora_r: --help tells what there is"
    (tmp_path / "run.yaml").write_text("data:\n  init_args:\n    batch_size: 16\n")
    given = ["fit", "-c", str(tmp_path / "run.yaml"), "--batch_size", "3"]
    said = explain("unrecognized arguments: --batch_size 3", given, options, "fit")
    assert said.startswith("unknown option --batch_size: here it is --data"), "not taken for the key of the file"
    given = ["--directions", "4"]
    assert "two adapters" in explain("unrecognized arguments: --directions 4", given, ["--adapters"], "analyze")
