"""A public name of `training` can be the first that a program imports: no order of imports makes it fail."""

import subprocess
import sys

import pytest

IMPORTS = """
import os, sys
import lightning.pytorch, torch, torchmetrics, transformers  # once; what follows imports our own files alone
import lora_lightning
failed = []
for name in ("LoRATrainer", "ExportAtEnd", "FSDP2Strategy", "HalfBase", "LoRAModule", "Tracking", "LoRACLI"):
    child = os.fork()
    if not child:
        try:
            getattr(lora_lightning, name)
        except BaseException as error:
            print(name, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print("failed:", failed)
"""


@pytest.mark.slow
def test_a_name_of_training_may_be_imported_first():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.splitlines()[-1] == "failed: []", done.stdout
