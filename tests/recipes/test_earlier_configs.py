"""Every config of version 0.1 is still parsed, or has a line of its own that says what to take.

The files are those of the repository's own history, unchanged; `tests/test_earlier_configs.py` has the names alone.
"""

import io
import subprocess
import tarfile

import pytest

from tests.command.process import REPOSITORY
from tests.recipes import test_glue, test_gpt2
from tests.recipes.recipe import parse
from tests.recipes.test_steps import MODELS, SETS, STEPS, chat_files
from tests.test_earlier_configs import GONE

COMMIT = "b6a78d9"
STACKS = [test_glue.stack(model, task) for model in ("roberta-base", "roberta-large") for task in test_glue.TASKS]
STACKS += [test_gpt2.stack(of, size) for of in test_gpt2.SETS for size in test_gpt2.SIZES]
STACKS += [chat_files(model, data, *more) for model in MODELS for data in SETS for more in ((), ("lm/qlora.yaml",))]
STACKS += [files for files, _, _ in STEPS.values() if "lm/base.yaml" not in files]
OVERLAYS = ["debug.yaml", "logger/wandb.yaml"]
OVERLAYS += [f"precision/{name}.yaml" for name in ("16-mixed", "bf16-base", "bf16-mixed", "float32", "nf4-base")]
OVERLAYS += [f"strategy/{name}.yaml" for name in ("ddp-fork", "ddp", "fsdp2", "multi-node", "single")]
DEMOS = {"demo.yaml", "demo-lm.yaml", "demo-vision.yaml", "demo-vision-dinov2.yaml"}
SWEEPS = {"sweeps/bayes.yaml", "sweeps/matrices.yaml", "sweeps/rank.yaml"}


@pytest.mark.slow
def test_every_config_of_the_version_before_is_parsed_or_refused_with_what_to_take(tmp_path):
    packed = subprocess.run(["git", "archive", COMMIT, "configs"], cwd=REPOSITORY, capture_output=True, check=False)
    if packed.returncode:
        pytest.skip(f"this clone has no commit {COMMIT}: git fetch --unshallow")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
        files.extractall(tmp_path, filter="data")
    earlier = tmp_path / "configs"
    parsed = {file for stack in STACKS for file in stack} | set(OVERLAYS)
    every = {str(file.relative_to(earlier)) for file in earlier.rglob("*.yaml")}
    # The demos name what went to the folder `demos`, which the names' own test has; sweeps are wandb's files.
    assert parsed | DEMOS | SWEEPS | set(GONE) == every
    for stack in [*STACKS, *(["lm/texts.yaml", overlay] for overlay in OVERLAYS)]:
        assert parse([earlier / file for file in stack]).model.backbone, stack
