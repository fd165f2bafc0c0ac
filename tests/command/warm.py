"""The command in several processes, as torchrun or srun start it, forked from a process that has imported all.

An import costs seconds, and these tests start many processes. Run as `python -m tests.command.warm CASES.json`, where
each case is `{"name", "args", "count", "launcher", "env", "folder", "keep", "limit"}`. To `folder` come
`NAME.RANK.txt`, what a process has said, `NAME.json`, their exit codes and seconds, and `NAME.kept`, a copy of what
`keep` names.
"""

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.command.process import REPOSITORY
from tests.processes import free_port, in_processes

LIMIT = 90.0


def as_torchrun(rank, count, port):
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    return {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}


def as_srun(rank, count, port):
    """What srun sets for `--nodes=1 --ntasks-per-node=COUNT`."""
    tasks = {"SLURM_NTASKS": count, "SLURM_NTASKS_PER_NODE": count, "SLURM_NNODES": 1, "SLURM_NODELIST": "localhost"}
    own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_JOB_ID": 4242}
    return {**tasks, **own, "SLURM_JOB_NAME": "fit", "MASTER_PORT": port}


LAUNCHERS = {"torchrun": as_torchrun, "srun": as_srun, "none": lambda *_: {}}


def child(case, port):
    """In a forked process: the command."""
    rank = int(os.environ["LOCAL_RANK"])
    out = os.open(Path(case["folder"]) / f"{case['name']}.{rank}.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.chdir(case["folder"])
    for name in ("LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    env = {**LAUNCHERS[case.get("launcher", "torchrun")](rank, case["count"], port), **case.get("env", {})}
    os.environ.update({key: str(value) for key, value in env.items()})
    sys.argv = ["lora-lightning", *map(str, case["args"])]
    from lora_lightning.__main__ import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()


def play(case):
    began = time.monotonic()
    codes = in_processes(case["count"], child, case, free_port(), timeout=case.get("limit", LIMIT))
    result = {"codes": codes, "seconds": round(time.monotonic() - began, 1)}
    (Path(case["folder"]) / f"{case['name']}.json").write_text(json.dumps(result))
    if "keep" in case:
        kept, copy = (Path(case["folder"]) / name for name in (case["keep"], f"{case['name']}.kept"))
        shutil.copytree(kept, copy) if kept.is_dir() else shutil.copyfile(kept, copy)


class Played:
    """What came of a case."""

    def __init__(self, folder, name, count):
        found = json.loads((folder / f"{name}.json").read_text())
        self.codes, self.seconds = found["codes"], found["seconds"]
        self.said = [(folder / f"{name}.{rank}.txt").read_text() for rank in range(count)]
        self.everything = "\n".join(self.said)

    def __repr__(self):
        return f"exit codes {self.codes} after {self.seconds} s\n{self.everything}"


def run_all(cases, folder, timeout=600):
    """Play the cases one after another in one process of their own; what came of them, by name."""
    for case in cases:
        case.setdefault("folder", str(folder))
        case.setdefault("count", 2)
        Path(case["folder"]).mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.command.warm", str(folder / "cases.json")]
    env = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}  # as the command sets it before it loads torch
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    return {case["name"]: Played(Path(case["folder"]), case["name"], case["count"]) for case in cases}


def warm_up(case):
    """Import all that a case needs, and read docstrings, half of what a command does, once and not in every process."""
    import docstring_parser

    docstring_parser.parse_from_object = functools.cache(docstring_parser.parse_from_object)
    import tests.tiny  # noqa: F401
    from lora_lightning.cli.main import LoRACLI

    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        LoRACLI(args=[*map(str, case["args"]), "--print_config"])


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    warm_up(cases[0])
    for one in cases:
        play(one)
