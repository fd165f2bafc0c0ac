"""The W&B sweep files, rendered by W&B's own agent code into command lines, which `fit` takes; no account is needed."""

from __future__ import annotations

import itertools
import sys

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils

from tests.recipes.recipe import CONFIGS, files_of, parse

FILES = files_of("sweeps")


def content(file):
    return yaml.safe_load((CONFIGS / file).read_text())


def combinations(file):
    """What W&B's server would draw: every combination of values, and both ends of each range."""
    parameters = content(file)["parameters"]
    drawn = [own.get("values") or [own["min"], own["max"]] for own in parameters.values()]
    return [dict(zip(parameters, values, strict=True)) for values in itertools.product(*drawn)]


def rendered(file, values):
    """As `wandb agent` makes a command of what the server sends (`Agent._command_run`)."""
    told = content(file)
    words = {**utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})}
    words |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [told["program"]]}
    command = []
    for chunk in utils.create_sweep_command(list(told["command"])):
        own = str(chunk)
        command += words[own[2:-1]] if own.startswith("${") and own.endswith("}") else [own]
    return command


@pytest.mark.parametrize("file", FILES)
def test_fit_takes_every_command_line_that_the_agent_makes_of_a_file(file):
    for values in combinations(file):
        command = rendered(file, values)
        assert command[:5] == ["/usr/bin/env", sys.executable, "-m", "lora_lightning", "fit"]
        configs = [word.removeprefix("--config=configs/") for word in command if word.startswith("--config=")]
        config = parse(configs, *(word for word in command[5:] if not word.startswith("--config=")))
        for key, value in values.items():
            found = config[key]
            wanted = yaml.safe_load(value) if isinstance(value, str) else value
            if isinstance(wanted, dict):
                assert {name: found[name] for name in wanted} == wanted
                assert found["modules_to_save"] == ["classifier"]  # the section's other fields stay
            else:
                assert found == wanted
        assert config.trainer.logger[0].class_path == "lora_lightning.WandbLogger"
