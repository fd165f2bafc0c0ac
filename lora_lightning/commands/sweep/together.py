"""A grid as one fit: members over one W0 that take turns on each batch, and halving at rungs (`--together`)."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from lora_lightning.cli.build import build_run
from lora_lightning.commands.sweep.fits import LOG, Say, Stopped, fit_flags, read_result
from lora_lightning.commands.sweep.study import Study, Trial
from lora_lightning.commands.sweep.sweep import Sweep
from lora_lightning.reports.html import write_page
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.population.halving import Halving
from lora_lightning.training.population.population import Interrupted, Member, Population, share_w0
from lora_lightning.training.preflight import refuse_contradictions
from lora_lightning.training.strategies.collectives import run_in_all, run_in_first

Watch = Callable[[Population], None]
"""Called after each round of turns."""


def run_together(
    sweep: Sweep, study: Study | None = None, say: Say = lambda *_: None, watch: Watch = lambda _: None
) -> None:
    """Run the fits that are not done as one population.

    Args:
        study: in rank 0 alone, which takes trials and records their results.

    Raises:
        Stopped: by SIGTERM, once all members have saved.
        KeyboardInterrupt: by Ctrl-C, likewise.
    """
    trials = run_in_first(lambda: {} if study is None else {trial.name: trial for trial in iter(study.next, None)})
    eta, rungs = sweep.request.halving, sweep.request.rungs
    halving = None if eta is None else Halving(eta, rungs, sweep.metric, sweep.goal)

    def look(population: Population) -> None:
        """Record the members that have ended."""
        for member in population.members:
            if study is not None and member.is_over and (trial := trials.pop(member.name, None)) is not None:
                _read_end(trial, member, sweep)
                study.finish(trial)
                say(trial, "ends")
        watch(population)

    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    try:
        if trials:
            members, data = run_in_all(lambda: _members(sweep, trials))
            population = Population(members, halving=halving, folder=sweep.folder)
            for trial in trials.values():
                say(trial, "begins")
            logger.setLevel(logging.WARNING)  # without Lightning's notes of each fit
            try:
                population.fit(data, look)
            except BaseException:
                if any(member.is_left for member in members):
                    raise  # else each has failed by itself, and its error is recorded
            look(population)  # for members that were dropped before a kill
    except Interrupted as interrupted:
        raise (KeyboardInterrupt if interrupted.number == signal.SIGINT else Stopped) from None
    finally:
        logger.setLevel(level)
        if study is not None:
            for trial in trials.values():
                study.release(trial.number)


def _members(sweep: Sweep, trials: Mapping[str, Trial]) -> tuple[list[Member], LightningDataModule]:
    """A member for each trial, over the first one's W0 and data."""
    members: list[Member] = []
    data: LightningDataModule | None = None

    def share_data(config: Namespace) -> None:
        config.trainer.enable_progress_bar = False
        config.data = data or config.data

    for name, trial in trials.items():
        built = build_run(["fit", *fit_flags(sweep, trial)], share_data)
        assert built.data is not None
        assert built.trainer is not None
        if data is None:
            data = built.data
            refuse_contradictions(built.config, built.trainer, built.module, data)
        member = Member(
            name=name,
            module=built.module,
            trainer=built.trainer,  # type: ignore[arg-type]  # the command makes a LoRATrainer
            ckpt_path=built.config.ckpt_path,
            log=sweep.folder / name / LOG,
        )
        members.append(member)
        share_w0(members[0], member)  # before the next member loads its W0
    assert data is not None
    return members, data


def _read_end(trial: Trial, member: Member, sweep: Sweep) -> None:
    """What a member's run folder and its end say of its trial; a dropped member's report says why."""
    has_figure = read_result(trial, sweep)
    if member.state == "dropped":
        trial.state = "pruned"
        if (folder := run.run_dir(member.trainer)) is not None:
            run.update_report(folder, {"dropped": member.reason})
            write_page(folder)
    elif member.state == "failed" or not has_figure:
        trial.state, trial.error = "failed", member.reason or f"the fit ended without {sweep.metric}"
