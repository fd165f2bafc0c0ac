"""`lora-lightning new` is quick: it imports nothing that takes seconds."""

import subprocess
import sys


def test_the_command_comes_without_torch_and_lightning():
    made = "import sys; from lora_lightning.cli.parser import command_parser; command_parser('new')"
    code = made + "; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {"lora_lightning", "jsonargparse"} <= set(loaded)
    assert not {"torch", "lightning", "transformers", "datasets", "copier"} & set(loaded)
