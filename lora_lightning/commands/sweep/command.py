"""A sweep on the screen: a line when a fit begins and when it ends, a bar, and the ranked table."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lora_lightning.commands.sweep.fits import FIT, LOG, Say, Stopped, run_fits
from lora_lightning.commands.sweep.ranking import Point, rank_points
from lora_lightning.commands.sweep.report import PAGE, about_of, table, write
from lora_lightning.commands.sweep.search_space import RANK, point_text
from lora_lightning.commands.sweep.study import Study, Trial, refuse_other
from lora_lightning.commands.sweep.sweep import Request, Sweep
from lora_lightning.commands.sweep.together import Watch, run_together
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.population.population import Population
from lora_lightning.training.strategies.collectives import rank
from lora_lightning.training.strategies.endings import in_all_processes


def run_on_screen(*, seeds: str | None, **options: Any) -> None:
    """Run a sweep and print its results.

    Raises:
        LoRAError: the request is not valid, or no fit has a metric.
        SystemExit: it was interrupted; the same command resumes it.
    """
    numbers = [] if seeds is None else seeds.strip("[] ").split(",")
    if not all(number.strip().isdigit() for number in numbers):
        raise LoRAError(f"seeds are whole numbers with commas between, such as 1,2,3; got {seeds}")
    sweep = Sweep(Request(seeds=list(map(int, numbers)), **options))
    trainer = sweep.base.trainer
    with nullcontext() if trainer is None else in_all_processes(trainer, unless=(Stopped, SystemExit)):
        if rank() == 0:
            _run(sweep)
        else:
            with suppress(KeyboardInterrupt, Stopped):  # rank 0 reports them
                run_together(sweep)


def run_sweep(sweep: Sweep, say: Say, watch: Watch = lambda _: None, command: Sequence[str] = FIT) -> list[Point]:
    """Run the fits that are not done, write the results, also after an interruption, and return them ranked.

    Args:
        command: of a fit, without its flags.
    """
    about, earlier = sweep.about | {"seeds": list(sweep.request.seeds)}, about_of(sweep.folder)
    refuse_other(sweep.folder.name, earlier, sweep.about)  # of another study, whose fits' results would be taken
    study = Study(sweep)
    if earlier is None:
        write(sweep.folder, about, [], plots=False)
    try:
        if sweep.request.together:
            run_together(sweep, study, say, watch)
        else:
            run_fits(sweep, study, say, command)
    finally:
        points = rank_points(study.trials(), sweep.goal)
        write(sweep.folder, about, points, plots=sweep.request.plots)
    return points


def _run(sweep: Sweep) -> None:
    screen = Console(soft_wrap=True, file=sys.stdout, highlight=False)  # also while a member's output goes to its log
    best = "largest" if sweep.goal == "max" else "smallest"
    screen.print(f"{sweep.count} fits, ranked by {sweep.metric} ({best} first)", markup=False)
    alpha = sweep.base.config["model"]["lora"]["alpha"]
    if RANK in sweep.keys and "model.lora.alpha" not in sweep.keys and alpha is not None:
        screen.print(
            f"alpha is {alpha:g} for every r, as in the paper, so the scale alpha / r falls as r grows;"
            " --model.lora.alpha null gives every r alpha = 2 r",
            markup=False,
        )
    try:
        with _lines(screen, sweep) as (say, watch):
            points = run_sweep(sweep, say, watch)
    except (KeyboardInterrupt, Stopped) as stopped:
        number = signal.SIGINT if isinstance(stopped, KeyboardInterrupt) else signal.SIGTERM
        print(f"lora-lightning: stopped; the same command goes on with '{sweep.folder}'", file=sys.stderr)
        raise SystemExit(128 + number) from None
    Console().print(table(str(sweep.folder), points, sweep.keys, sweep.metric, sweep.goal))
    if points[0].state != "complete":
        raise LoRAError(f"no fit of the sweep came to its end; what each said is in '{sweep.folder}/*/{LOG}'")
    screen.print(f"then: lora-lightning test --ckpt_path {points[0].trials[0].run}")
    screen.print(f"numbers, page and figures: {sweep.folder / PAGE}")


@contextmanager
def _lines(screen: Console, sweep: Sweep) -> Iterator[tuple[Say, Watch]]:
    """Prints a line for each beginning and end, above a bar where the screen is a terminal."""
    together = sweep.request.together
    columns = [TextColumn("{task.description}"), BarColumn(12 if together else 40), MofNCompleteColumn()]
    columns += [TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("making the members" if together else "fits", total=sweep.count)

        def say(trial: Trial, what: str) -> None:
            settings = point_text(trial.values) + ("" if trial.seed is None else f", seed {trial.seed}")
            if what == "begins":
                screen.print(f"begins: {settings} ({sweep.folder / trial.name / LOG})", markup=False)
                return
            if not together:
                bar.advance(task)
            screen.print(f"{trial.state}: {settings}: {_result(trial, sweep.metric)}", markup=False)

        def watch(population: Population) -> None:
            left = sum(member.is_left for member in population.members)
            steps = max(member.trainer.global_step for member in population.members)
            text = f"steps, {left} of {len(population.members)} members"
            bar.update(task, description=text, completed=steps, total=population.steps)

        yield say, watch


def _result(trial: Trial, metric: str) -> str:
    if trial.error:
        return trial.error
    value = "no figure" if trial.value is None else f"{metric} {trial.value:.4f}"
    return value + ("" if trial.seconds is None else f" in {trial.seconds / 60:.1f} minutes")
