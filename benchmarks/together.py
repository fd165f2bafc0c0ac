"""Eight members in one fit with halving, beside eight fits of their own: time, memory, and whether the winner is one.

    python -m benchmarks.together [--sets demo animals] [--seeds 1 2 3 4 5] [--steps 96]

For each seed the eight points of a grid (r x learning rate) are fitted alone, each in a process of its own as
`lora-lightning fit`, and together, as `lora-lightning sweep --together --halving 2`. Both are cut to as many steps,
with the schedule of so many. Processor seconds are for a machine that others use too; both clocks count from the start
of the process, so that imports and the reading of data are in. A winner is right where it is not behind the full grid's
best, by the validation set at the end of the fits alone, by more than one standard error of the paired difference: the
rule by which members are dropped. Written to benchmarks/results/together.json after each process; the same command
goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, machine

ROOT = Path(__file__).parents[1]
FILE = RESULTS / "together.json"
RUNS = RESULTS / "together-runs"
RANK, RATE = "model.lora.r", "model.optimizer.init_args.lr"


@dataclasses.dataclass(frozen=True)
class Shortened:
    """A config, a grid, and what makes it shorter."""

    config: str
    steps: int
    grid: dict[str, list[str]]
    flags: tuple[str, ...] = ()


SETS = {
    "demo": Shortened("demo", 96, {RANK: ["1", "4", "16", "64"], RATE: ["1e-3", "3e-3"]}),
    # 6 x 6 patches in place of 8 x 8, and half of the validation images: 486
    "animals": Shortened(
        "demo-vision-dinov2",
        48,
        {RANK: ["1", "4", "16", "64"], RATE: ["3e-4", "1e-3"]},
        (
            "--data.init_args.image_size=84",
            "--data.init_args.split.validation=0.05",
            "--data.init_args.eval_batch_size=16",
        ),
    ),
}
GOALS = {"time": 0.36, "memory": 1.15, "winner": 0.9}


def flags(name: str, steps: int | None, seed: int) -> list[str]:
    own = SETS[name]
    cut = ["--trainer.max_epochs=1", f"--trainer.limit_train_batches={steps or own.steps}", "--trainer.callbacks=null"]
    return ["-c", str(ROOT / "configs" / f"{own.config}.yaml"), *cut, f"--seed_everything={seed}", *own.flags]


def points(name: str) -> dict[str, list[str]]:
    """The grid's points by name, and the flags of each."""
    grid = SETS[name].grid
    return {
        ", ".join(values): [f"--{key}={value}" for key, value in zip(grid, values, strict=True)]
        for values in product(*grid.values())
    }


def spent(since: float) -> dict[str, float]:
    """Of this process, workers of its DataLoaders included."""
    own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": time.time() - since,
        "processor seconds": sum(used.ru_utime + used.ru_stime for used in (own, workers)),
        "peak memory, MB": own.ru_maxrss / 1e3,
        "load of the machine": os.getloadavg()[0],
    }


def alone(args: list[str], since: float) -> dict[str, Any]:
    """`fit`; and after its clock has stopped, where it stands on blocks of the validation set."""
    from lora_lightning.cli.log_filters import silence_others
    from lora_lightning.cli.main import LoRACLI
    from lora_lightning.training.population.halving import standing

    silence_others()
    cli = LoRACLI(args=["fit", *args])
    found = spent(since)
    return found | {"standing": dataclasses.asdict(standing(cli.trainer, cli.model, cli.model.task.monitor)[0])}


def together(args: list[str], since: float) -> dict[str, Any]:
    from lora_lightning.__main__ import main

    sys.argv = ["lora-lightning", "sweep", *args]
    main()
    return spent(since)


def in_process(kind: str, args: list[str], log: Path, threads: int) -> dict[str, Any]:
    log.parent.mkdir(parents=True, exist_ok=True)
    result = log.with_suffix(".json")
    limits = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    command = [sys.executable, "-m", "benchmarks.together", "--kind", kind, "--result", str(result)]
    with log.open("w") as screen:
        subprocess.run(
            [*command, "--since", str(time.time()), "--", *args],
            stdout=screen,
            stderr=subprocess.STDOUT,
            check=True,
            env=os.environ | limits | {"TOKENIZERS_PARALLELISM": "false"},
        )
    return json.loads(result.read_text())


def one_seed(name: str, seed: int, options: argparse.Namespace, found: dict[str, Any], keep: Any) -> None:
    """Fits of a seed in random order, but those that are done; then they are compared."""
    folder = RUNS / name / str(seed)
    found.setdefault("alone", {})
    todo = [point for point in points(name) if point not in found["alone"]]
    todo += [] if "together" in found else ["together"]
    for point in random.sample(todo, len(todo)):
        args = flags(name, options.steps, seed)
        if point == "together":
            grid = [word for key, values in SETS[name].grid.items() for word in ("--grid", f"{key}={','.join(values)}")]
            args += [*grid, "--together", "--halving", "2", f"--runs_dir={folder}", "--name=together"]
            shutil.rmtree(folder / "together", ignore_errors=True)
            found[point] = in_process("together", args, folder / "together.txt", options.threads)
        else:
            own = folder / "alone" / point.replace(", ", "_")
            args += [*points(name)[point], f"--runs_dir={own.parent}", f"--name={own.name}"]
            shutil.rmtree(own, ignore_errors=True)
            found["alone"][point] = in_process("alone", args, own.with_suffix(".txt"), options.threads)
        keep()
        print(name, f"seed {seed}", point, f"{time.strftime('%H:%M:%S')}", sep=": ", flush=True)
    found["compared"] = compared(name, folder, found)
    keep()
    shutil.rmtree(folder)


def compared(name: str, folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Who won, who would have, and whether those that came to their end are the fits alone, bit for bit."""
    import torch

    from lora_lightning.training.population.halving import Standing, choose_dropped

    ranking = json.loads((folder / "together" / "sweep.json").read_text())
    rungs = json.loads((folder / "together" / "halving.json").read_text())
    goal, keys = ranking["goal"], list(SETS[name].grid)
    ends = {", ".join(row["values"][key] for key in keys): row for row in ranking["ranking"]}
    whole = {point: row["trials"][0] for point, row in ends.items() if row["state"] == "complete"}
    standings = {point: Standing(**own["standing"]) for point, own in found["alone"].items()}
    sign = -1 if goal == "max" else 1
    best = min(standings, key=lambda point: (sign * standings[point].value, standings[point].loss))
    winner = next(iter(whole))

    def adapter(run: Path) -> dict[str, torch.Tensor]:
        return torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]

    equal = values = 0
    for point, trial in whole.items():
        (own,) = (folder / "alone" / point.replace(", ", "_")).glob("version_*")
        one, other = adapter(own), adapter(Path(trial["run"]))
        equal += one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        values += trial["value"] == standings[point].value
    return {
        "best alone": best,
        "winner": winner,
        "value of the best": standings[best].value,
        "value of the winner": standings[winner].value,
        "behind by more than one standard error": choose_dropped(
            {point: standings[point] for point in (best, winner)}, 1, goal
        ).get(winner),
        "came to their end": len(whole),
        "of these the adapter of the fit alone, bit for bit": equal,
        "of these its value": values,
        "members left after each rung": [len(rung["values"]) - len(rung["dropped"]) for rung in rungs],
        "rungs": rungs,
    }


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """Of one set, the medians over seeds that are whole."""
    whole = [found for found in seeds.values() if "compared" in found]
    if not whole:
        return {"seeds": 0}

    def over(clock: str) -> list[float]:
        return [one["together"][clock] / sum(own[clock] for own in one["alone"].values()) for one in whole]

    def memory(one: dict[str, Any]) -> float:
        peaks = [own["peak memory, MB"] for own in one["alone"].values()]
        return one["together"]["peak memory, MB"] / statistics.median(peaks)

    ends = [one["compared"] for one in whole]
    return {
        "seeds": len(whole),
        "wall time": over("seconds"),
        "processor time": over("processor seconds"),
        "memory": [memory(one) for one in whole],
        "winners": [end["behind by more than one standard error"] is None for end in ends],
        "same winner": sum(end["winner"] == end["best alone"] for end in ends),
        "whole members": sum(end["came to their end"] for end in ends),
        "equal members": sum(end["of these the adapter of the fit alone, bit for bit"] for end in ends),
        "left": [end["members left after each rung"] for end in ends],
    }


def show(found: dict[str, Any]) -> None:
    rows = {name: one for name, seeds in found["sets"].items() if (one := summary(seeds))["seeds"]}
    for name, row in rows.items():
        print(f"{name}, {row['seeds']} seeds")
        for what in ("wall time", "processor time", "memory"):
            each = ", ".join(f"{value:.2f}" for value in row[what])
            print(f"    {what} over {'one fit' if what == 'memory' else 'eight fits'}: ", end="")
            print(f"{statistics.median(row[what]):.3f} ({each})")
        print(f"    winner within one standard error: {sum(row['winners'])} of {row['seeds']}", end="")
        print(f"; the very best: {row['same winner']}; members left after each rung: {row['left']}")
        print(
            f"    whole members equal to the fit alone, bit for bit: {row['equal members']} of {row['whole members']}"
        )
    if not rows:
        return
    clocks = [statistics.median(row["processor time"]) for row in rows.values()]
    peaks = [statistics.median(row["memory"]) for row in rows.values()]
    right, seeds = sum(sum(row["winners"]) for row in rows.values()), sum(row["seeds"] for row in rows.values())
    for goal, value, is_met in (
        (f"processor time <= {GOALS['time']}", max(clocks), max(clocks) <= GOALS["time"]),
        (f"memory <= {GOALS['memory']}", max(peaks), max(peaks) <= GOALS["memory"]),
        (f"winners >= {GOALS['winner']}", right / seeds, right >= GOALS["winner"] * seeds),
    ):
        print(f"{goal}: {value:.3f}, {'met' if is_met else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, help="of each fit; by default what the set is cut to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kind", choices=("alone", "together"), help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("args", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        did = alone if options.kind == "alone" else together
        options.result.write_text(json.dumps(did(options.args, options.since)))
        return
    RESULTS.mkdir(exist_ok=True)
    asked = {"steps": options.steps or {name: one.steps for name, one in SETS.items()}, "threads": options.threads}
    mine: dict[str, dict[str, Any]] = read().get("sets", {})

    def keep() -> None:
        """Other sets may be measured by another process at the same time."""
        sets = read().get("sets", {}) | {name: mine[name] for name in options.sets if name in mine}
        written = {"machine": machine(), "options": asked, "sets": sets}
        part = FILE.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(written, indent=2) + "\n")
        part.replace(FILE)

    if (before := read().get("options", asked)) != asked:
        parser.error(f"{FILE} is of {before}, and this is of {asked}: put it away, or give the same")
    for seed, name in product(options.seeds, options.sets):
        found = mine.setdefault(name, {}).setdefault(str(seed), {})
        if "compared" not in found:
            one_seed(name, seed, options, found, keep)
    show(read())


def read() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


if __name__ == "__main__":
    main()
