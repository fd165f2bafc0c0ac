"""A grid as one fit: members over one W0 that take turns on each batch, and halving at rungs (`--together`)."""

from __future__ import annotations

import functools
import logging
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from lora_lightning.cli.build import build_run
from lora_lightning.commands.sweep.runner import LOG, Say, Stopped, take_result
from lora_lightning.commands.sweep.study import Study, Trial
from lora_lightning.lora.errors import LoRAError
from lora_lightning.reports.html import write_page
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.population.halving import RUNGS, Halving
from lora_lightning.training.population.population import Interrupted, Member, Population, share_w0
from lora_lightning.training.preflight import refuse_other_count, refuse_other_size, refuse_unlogged
from lora_lightning.training.strategies.collectives import run_in_all, run_in_first

VARY = (
    "model.lora.",
    "model.optimizer",
    "model.lr_scheduler",
    "model.b_lr_ratio",
    "model.init_adapter",
    "trainer.gradient_clip_",
)
"""Flags that may differ between members; others belong to the shared W0, data or number of steps."""
Watch = Callable[[Population], None]


def refuse_keys(keys: Sequence[str], fit: Sequence[str], grid: Sequence[str]) -> None:
    """Raise for a swept flag that cannot vary within one fit.

    Raises:
        LoRAError: names the flag, and the command that sweeps it.
    """
    for key in keys:
        if not key.startswith(VARY):
            alone = shlex.join(["lora-lightning", "sweep", *fit, *(word for x in grid for word in ("--grid", x))])
            raise LoRAError(
                f"--together: '{key}' cannot differ between members, which share W0, data, precision, strategy and the"
                f" number of steps; each in a fit of its own: {alone}"
            )


@dataclass(kw_only=True)
class Together:
    """Runs the study's trials as one population.

    Args:
        folder: the sweep's, with a folder for each member.
        args: of `fit`, the same for all.
        metric, goal: by which members are ranked and dropped.
        eta, rungs: of the halving; eta None drops no member.
        study: in rank 0 alone, which claims trials and records their results.
    """

    folder: Path
    args: Sequence[str]
    metric: str
    goal: str
    study: Study | None = None
    claim: Callable[[], Trial | None] = lambda: None
    say: Say = lambda *_: None
    watch: Watch = lambda _: None
    eta: int | None = None
    rungs: Sequence[str] = RUNGS
    _trials: dict[str, Trial] = field(default_factory=dict)

    def run(self) -> None:
        """Run the fits that are not done.

        Raises:
            Stopped: by SIGTERM, once all members have saved.
            KeyboardInterrupt: by Ctrl-C, likewise.
        """
        halving = None if self.eta is None else Halving(self.eta, self.rungs, self.metric, self.goal)
        self._trials = run_in_first(lambda: {trial.name: trial for trial in iter(self.claim, None)})
        if not self._trials:
            return
        try:
            members, data = run_in_all(self._members)
            population = Population(members, halving=halving, folder=self.folder)
            for trial in self._trials.values():
                self.say(trial, "begins")
            with _quiet_lightning():
                try:
                    population.fit(data, self._look)
                except BaseException:
                    if any(member.is_left for member in members):
                        raise  # else each has failed by itself, and its error is recorded
            self._look(population)  # for members that were dropped before a kill
        except Interrupted as interrupted:
            raise (KeyboardInterrupt if interrupted.number == signal.SIGINT else Stopped) from None
        finally:
            if self.study is not None:
                for trial in self._trials.values():
                    self.study.release(trial.number)

    def _members(self) -> tuple[list[Member], LightningDataModule]:
        members: list[Member] = []
        data: LightningDataModule | None = None
        for name, trial in self._trials.items():
            flags = [f"--{key}={value}" for key, value in trial.values.items()]
            flags += [f"--runs_dir={self.folder}", f"--name={name}", "--ckpt_path=auto"]
            built = build_run(["fit", *self.args, *flags], functools.partial(_as_member, data=data))
            if data is None:
                assert built.data is not None
                assert built.trainer is not None
                data = built.data
                refuse_other_count(built.config, data)
                refuse_other_size(built.module.backbone, built.module.task, data)
                refuse_unlogged(built.trainer, built.module, built.config.get("model.lr_scheduler.init_args"))
            member = Member(
                name=name,
                module=built.module,
                trainer=built.trainer,  # type: ignore[arg-type]
                ckpt_path=built.config.ckpt_path,
                folder=self.folder / name,
                log=self.folder / name / LOG,
            )
            members.append(member)
            share_w0(members[0], member)  # before the next member loads its W0
        assert data is not None
        return members, data

    def _look(self, population: Population) -> None:
        """Record the members that have ended."""
        for member in population.members:
            if self.study is not None and member.name in self._trials and member.is_over:
                self._record(self.study, self._trials.pop(member.name), member)
        self.watch(population)

    def _record(self, study: Study, trial: Trial, member: Member) -> None:
        has_figure = take_result(trial, self.folder, self.metric)
        if member.state == "dropped":
            trial.state = "pruned"
            if (folder := run.run_dir(member.trainer)) is not None:
                run.update_report(folder, {"dropped": member.reason})
                write_page(folder)
        elif member.state == "failed" or not has_figure:
            trial.state, trial.error = "failed", member.reason or f"the fit ended without {self.metric}"
        study.finish(trial)
        self.say(trial, "ends")


def _as_member(config: Namespace, data: LightningDataModule | None) -> None:
    """Change a member's config: no progress bar, and the shared data."""
    config.trainer.enable_progress_bar = False
    if data is not None:
        config.data = data


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Within the block Lightning's notes of each fit are not shown."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def progress(population: Population) -> dict[str, Any]:
    """A progress bar's fields for a population: remaining members, rung, and the current step."""
    left = [member for member in population.members if member.is_left]
    text = f"{len(left)}/{len(population.members)} members"
    if rungs := population.rungs:
        number = len(population.decisions)
        at = f"rung {number + 1}/{len(rungs)} at step {rungs[number]}" if number < len(rungs) else "past the rungs"
        text += f", {at}"
    steps = max(member.trainer.global_step for member in population.members)
    return {"description": text, "completed": steps, "total": population.steps}
