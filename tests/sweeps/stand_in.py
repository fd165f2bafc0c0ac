"""A process that looks to a sweep as `fit` does, in milliseconds: `python stand_in.py PLAN [--key=value ...]`.

PLAN is a JSON file: `validations` (how many), `pause` (seconds before each), `level` (by r, the figure at the end),
`fails` (ranks that end in one line of error), `events` (a file to which it adds what happens).
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path


def main():
    plan = json.loads(Path(sys.argv[1]).read_text())
    given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[2:])
    folder = Path(given["runs_dir"]) / given["name"]
    version = folder / "version_0"
    version.mkdir(parents=True, exist_ok=True)
    r, seed = given["model.lora.r"], int(given.get("seed_everything", 0))
    state = version / "state.json"  # stands for last.ckpt
    done = saved = json.loads(state.read_text()) if state.is_file() else 0

    def event(what):
        told = {"what": what, "r": r, "seed": seed, "at": time.monotonic(), "from": done, "saved": saved}
        told |= {"ckpt": given["ckpt_path"], "callbacks": given.get("trainer.callbacks+")}
        told |= {"threads": os.environ.get("OMP_NUM_THREADS")}
        with Path(plan["events"]).open("a") as file:
            file.write(json.dumps(told) + "\n")

    def leave(number, frame):
        event("leaves")
        sys.exit(75)

    signal.signal(signal.SIGTERM, leave)
    event("begins")
    if r in plan.get("fails", []):
        print("a line before\nlora-lightning: error: r is too large, as was planned", flush=True)
        sys.exit(2)
    level = plan["level"].get(r, 0.5) + 0.1 * random.Random(seed).random()
    for step in range(done + 1, plan["validations"] + 1):
        time.sleep(plan["pause"])
        value = level * step / plan["validations"]
        state.write_text(json.dumps(step))
        saved = step
        with (version / "validations.jsonl").open("a") as file:
            file.write(json.dumps({"step": 10 * step, "val_accuracy": value, "val_loss": 1 - value}) + "\n")
    report = {"val_accuracy": level, "val_loss": 1 - level, "trainable": 100 * int(r), "train_seconds": 60.0}
    (folder / "report.json").write_text(json.dumps({**report, "run_dir": str(version)}))
    event("ends")


main()
