"""docs/big-models.md: its code runs, and its YAML names arguments that exist."""

import inspect
import re
from pathlib import Path

import yaml

from lora_lightning import LoRAModule, huggingface

TEXT = (Path(__file__).parents[1] / "docs" / "big-models.md").read_text(encoding="utf-8")


def test_the_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, {})


def test_the_flags_are_there():
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    model = yaml.safe_load(text)["model"]
    backbone = model.pop("backbone")
    assert set(backbone["init_args"]) <= set(inspect.signature(huggingface).parameters)
    assert set(model) <= set(inspect.signature(LoRAModule.__init__).parameters)
