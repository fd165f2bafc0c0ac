"""What other tools call it is answered with a name that there is."""

import inspect

import pytest
import torch

import lora_lightning
from lora_lightning.cli.build import run_parser
from lora_lightning.cli.diagnostics import explain
from lora_lightning.cli.other_tools import HERE, NOT_NEEDED

CLASSES = {
    "data": [
        getattr(lora_lightning, name)
        for name in lora_lightning.__all__
        if name.endswith("Data") and not inspect.isabstract(getattr(lora_lightning, name))
    ],
    "model.backbone": [lora_lightning.huggingface],
    "model.optimizer": [torch.optim.AdamW],
    "model.lr_scheduler": [lora_lightning.WarmupDecay],
    "model.task": [lora_lightning.SequenceClassification],
}


@pytest.fixture(scope="module")
def options():
    return run_parser("fit").options_of("fit")


def takes(key, options):
    """Whether there is such a key: an option, or an argument of a class that may stand there."""
    place, _, argument = key.partition(".init_args.")
    if not argument:
        return f"--{key}".removesuffix("+=EarlyStopping") in options
    made_by = [base for one in CLASSES[place] for base in (inspect.getmro(one)[:-1] if inspect.isclass(one) else [one])]
    names = {name for one in made_by for name in inspect.signature(one).parameters}
    return argument.partition(".")[0] in names | {"batch_size", "eval_batch_size", "num_workers", "seed", "split"} | (
        {"length_grouped"}
    )


def test_every_answer_is_a_key_of_fit(options):
    for key in HERE:
        assert takes(key.partition(" ")[0].rstrip(","), options), key


def test_no_name_of_another_tool_is_one_of_ours(options):
    for names in (*HERE.values(), *NOT_NEEDED.values()):
        for name in names.split():
            assert f"--{name}" not in options, name


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--lora_query", ": here it is --model.lora.target_modules"),
        ("--micro_batch_size", ": here it is --data.init_args.batch_size"),
        ("--per-device-train-batch-size", ": here it is --data.init_args.batch_size"),
        ("--cutoff_len", ": here it is --data.init_args.max_length"),
        ("--model.lora.loftq_config", ": here it is --model.lora.init loftq"),
        ("--lora_target_linear", ": leave it out, all linear layers are adapted unless model.lora.target_modules says"),
        ("--model.lora.megatron_config", ": --help lora tells what there is"),
        (
            "--model.lora.target_module",
            "; did you mean '--model.lora.target_modules' or '--model.lora.target_parameters",
        ),
    ],
)
def test_a_flag_of_another_tool(flag, said, options):
    assert explain(f"unrecognized arguments: {flag} 3", [flag, "3"], options, "fit").startswith(
        f"unknown option {flag}{said}"
    )


def test_a_flag_is_not_taken_for_a_key_of_that_name_in_a_config(options, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  init_args:\n    batch_size: 16\n")
    args = ["fit", "-c", str(file), "--batch_size", "3"]
    said = explain("unrecognized arguments: --batch_size 3", args, options, "fit")
    assert said == "unknown option --batch_size: here it is --data.init_args.batch_size"


def test_a_command_without_a_model_is_not_told_of_one():
    said = explain("unrecognized arguments: --lora_r 3", ["--lora_r", "3"], ["--base_model", "--adapter"], "merge")
    assert said == "unknown option --lora_r: --help tells what there is"


def test_an_option_that_is_gone_is_answered_with_what_to_do():
    words = ["--directions", "4"]
    line = explain("unrecognized arguments: --directions 4", words, ["--adapters", "--layers"], "analyze")
    assert "it is gone" in line
    assert "two adapters" in line
