"""docs/adapters.md is true: its Python runs, one block after the other."""

import re
from pathlib import Path

from lora_lightning.lora.bank.combine import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


def test_the_python_of_the_page_runs():
    names = {"__name__": "page"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.S | re.M)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "adapters.md", "exec"), names)


def test_every_method_is_in_the_table():
    assert all(f"| `{method}`" in PAGE for method in METHODS)
