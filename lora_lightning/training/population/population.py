"""Several fits over one W0, which take turns on each batch; halving drops members at rungs."""

from __future__ import annotations

import contextvars
import copy
import functools
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.lora.frozen.tensors import iter_base
from lora_lightning.lora.meta.empty_model import fill_from_files
from lora_lightning.tasks.base import Task
from lora_lightning.training.checkpoints.loop_state import is_between_steps
from lora_lightning.training.checkpoints.model_checkpoint import Checkpoints, PreemptedError
from lora_lightning.training.checkpoints.resume import random_state, set_random_state
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.population import halving as rules
from lora_lightning.training.population.halving import Halving, Standing
from lora_lightning.training.population.heap import share_heap
from lora_lightning.training.precision import convert
from lora_lightning.training.strategies.base import ShardedStrategy
from lora_lightning.training.strategies.collectives import gather, run_in_first
from lora_lightning.training.strategies.endings import all_arrive, in_all_processes
from lora_lightning.training.trainer import LoRATrainer

DECISIONS = "halving.json"
"""In the population's folder: the members that were dropped at each rung, and why."""


@dataclass(kw_only=True)
class Member:
    """One of the fits."""

    name: str
    module: LoRAModule
    trainer: LoRATrainer
    ckpt_path: str | None = None
    """The checkpoint that its fit resumes from."""
    log: Path | None = None
    """The file for its printed output; None leaves it on the screen."""
    state: str = "waits"
    """`waits`, `fits`, `complete`, `dropped` or `failed`."""
    reason: str = ""
    """Why it was dropped, or the error of its fit."""
    random: dict[str, Any] = field(default_factory=random_state)
    """The random states with which its fit begins: those when it was made."""
    turns: Turns | None = None
    """Its fit, once it has begun."""
    standing: Standing | None = None
    """That of the last rung that it has reached."""
    rung: int | None = None
    """The rung at which it waits for the others."""

    @property
    def is_left(self) -> bool:
        """Whether it is neither dropped nor at its end."""
        return self.state in ("waits", "fits")

    @property
    def is_over(self) -> bool:
        """Whether its fit has ended, in whatever way: a dropped member's ends with a validation."""
        return not self.is_left and (self.turns is None or self.turns.is_over)

    def fit(self, datamodule: LightningDataModule) -> None:
        """Fit it; Lightning would move W0 off the device at the end, also for the other members."""
        self.module.cpu = lambda: self.module  # type: ignore[method-assign]
        try:
            self.trainer.fit(self.module, datamodule=datamodule, ckpt_path=self.ckpt_path)
        finally:
            vars(self.module).pop("cpu")
            vars(self.module.task).pop("evaluate", None)  # see `replay`

    def ask_to_leave(self) -> None:
        """Let its fit save after the running step and end, or end where nothing saves."""
        savers = [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, Checkpoints)]
        for callback in savers:
            callback.ask_to_leave()
        self.trainer.should_stop |= not savers


class _TakeTurns(Callback):
    """Pauses a member's fit after each batch, and evaluates the member at rungs."""

    def __init__(self, member: Member, turns: Turns, population: Population) -> None:
        self.member, self.turns, self.population = member, turns, population

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        population = self.population
        population.steps = trainer.estimated_stepping_batches
        if population.halving is not None:
            known, metric = self.member.module.task.logged("val"), population.metric
            if metric not in known:
                near = did_you_mean(metric, known)
                raise LoRAError(f"--halving goes by a figure of the task: {', '.join(known)}; got {metric}{near}")
            population.rungs = rules.rung_steps(population.halving.rungs, population.steps)
        self.on_train_batch_end(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """At a rung that is not decided yet, evaluate the member, and wait for all others."""
        member, population = self.member, self.population
        for rung, step in enumerate(() if is_between_steps(trainer) else population.rungs):
            if trainer.global_step >= step and rung == len(population.decisions):
                member.standing, outputs = rules.standing(trainer, member.module, population.metric)
                member.rung = rung
                self.turns.pause()
                member.rung = None
                if member.state == "dropped":
                    rules.replay(member.module, outputs)
                    trainer.should_stop = True
                    break
        self.turns.pause()


class Population:
    """Members that are fitted together, each as its Trainer would fit it alone, bit for bit.

    W0 is in memory once; each member has an adapter, optimizer, schedule, random stream, metrics and run folder.

    Args:
        members: in the order in which they take their turns.
        halving: None lets all of them go to the end.
        folder: where decisions are written, so that a killed population can go on; None writes none.

    Raises:
        LoRAError: no members, two of one name, or of different W0; a strategy that cannot have several fits.
    """

    def __init__(
        self, members: Sequence[Member], *, halving: Halving | None = None, folder: Path | None = None
    ) -> None:
        names = [member.name for member in members]
        if not names or len(set(names)) < len(names):
            raise LoRAError(f"a population needs members of different names, got {', '.join(names) or 'none'}")
        self.members, self.halving, self.folder = list(members), halving, folder
        self.steps: float | None = None
        """Optimizer steps of each fit, once they are known."""
        self.rungs: list[int] = []
        """Steps after which members are dropped, likewise."""
        refuse_strategy(members[0].trainer)
        for member in members:
            share_w0(members[0], member)
        task = members[0].module.task
        self.metric = (halving.metric if halving else None) or task.monitor
        self.goal = (halving.goal if halving else None) or task.monitor_mode
        self.decisions: list[dict[str, Any]] = []
        if folder is not None and (file := folder / DECISIONS).is_file():
            self.decisions = json.loads(file.read_text(encoding="utf-8"))
        dropped = {name: reason for decision in self.decisions for name, reason in decision["dropped"].items()}
        for member in members:
            if member.name in dropped:
                member.state, member.reason = "dropped", dropped[member.name]

    @classmethod
    def of(
        cls,
        backbone: nn.Module,
        task: Task,
        adapters: Mapping[str, Mapping[str, Any]],
        trainer: Callable[[str], LoRATrainer],
        *,
        halving: Halving | None = None,
    ) -> Population:
        """Members over one plain backbone.

        Args:
            backbone: plain; its weights are shared and stay as they are.
            task: a copy of it counts each member's metrics.
            adapters: by member's name `LoRAModule`'s other arguments, such as `lora` and `optimizer`.
            trainer: makes a member's Trainer from its name.
        """
        start = random_state()
        members = []
        for name, options in adapters.items():
            set_random_state(start)  # the same for each member
            module = LoRAModule(copy_over_base(backbone), copy.deepcopy(task), **options)
            members.append(Member(name=name, module=module, trainer=trainer(name)))
        return cls(members, halving=halving)

    def fit(self, datamodule: LightningDataModule, say: Callable[[Population], None] = lambda _: None) -> None:
        """Fit all members to their end; on SIGTERM or Ctrl-C each saves after its step.

        Args:
            datamodule: is read and encoded once.
            say: called after each round of turns, for a progress bar.

        Raises:
            Interrupted: a signal came, and all members have saved.
            LoRAError: every member's fit failed; this is the first one's error.
        """
        with in_all_processes(self.members[0].trainer, unless=(Interrupted,)):
            self._take_turns(datamodule, say)
            errors = [member.turns.error for member in self.members if member.turns and member.state == "failed"]
            if len(errors) == len(self.members) and errors[0] is not None:
                raise errors[0]

    def _take_turns(self, datamodule: LightningDataModule, say: Callable[[Population], None]) -> None:
        """Give members their turns in the same order in all processes, so that their collectives match."""
        fits: list[tuple[Member, Turns]] = []
        for member in self.members:
            if member.is_left:
                member.state, fit = "fits", functools.partial(member.fit, datamodule)
                member.turns = turns = Turns(fit, member.random, member.log)
                member.trainer.callbacks.insert(0, _TakeTurns(member, turns, self))  # type: ignore[attr-defined]
                fits.append((member, turns))
        signum: int | None = None  # of a signal to any process
        with _record_signals() as received:
            while fits:
                for member, turns in fits:
                    if signum is not None:
                        member.ask_to_leave()
                    elif member.rung == len(self.decisions):
                        continue  # it waits for the others
                    datamodule.trainer = member.trainer
                    turns.resume()
                    if turns.is_over and turns.error is None and member.state == "fits":
                        member.state = "complete"
                    elif isinstance(error := turns.error, PreemptedError):
                        member.state = "waits"
                    elif error is not None:
                        if not all_arrive():
                            raise error  # in this process alone: the others wait in the middle of the member's turn
                        member.state, member.reason = "failed", f"{type(error).__name__}: {error}"
                fits = [(member, turns) for member, turns in fits if not turns.is_over]
                if signum is None:
                    self._decide()
                    signum = next((number for numbers in gather(received[:1]) for number in numbers), None)
                say(self)
        if signum is not None:
            raise Interrupted(signum)

    def _decide(self) -> None:
        """Drop members once all remaining ones have reached the next rung."""
        left = {member.name: member for member in self.members if member.is_left}
        if self.halving is None or not left or any(member.rung != len(self.decisions) for member in left.values()):
            return
        standings = {name: member.standing for name, member in left.items() if member.standing is not None}
        keep, goal = math.ceil(len(left) / self.halving.eta), self.goal
        why = run_in_first(lambda: rules.choose_dropped(standings, keep, goal))
        share, trainer = str(self.halving.rungs[len(self.decisions)]), next(iter(left.values())).trainer
        for name, behind in why.items():
            at = f"at rung {share}, after {trainer.global_step} steps, {self.metric} {standings[name].value:.4f}"
            left[name].state, left[name].reason = "dropped", f"{at}: {behind}"
        decision = {"rung": share, "step": trainer.global_step, "metric": self.metric}
        decision["values"] = {name: reached.value for name, reached in standings.items()}
        decision["losses"] = {name: reached.loss for name, reached in standings.items()}
        decision["dropped"] = {name: left[name].reason for name in why}
        self.decisions.append(decision)
        if self.folder is not None and trainer.is_global_zero:
            write_bytes(self.folder / DECISIONS, json.dumps(self.decisions, indent=2).encode())


def refuse_strategy(trainer: Trainer) -> None:
    """Raise for a strategy that shards W0, or whose processes cannot run several fits."""
    strategy: Any = trainer.strategy
    launcher = strategy.launcher
    if isinstance(strategy, ShardedStrategy) or isinstance(launcher, _MultiProcessingLauncher):
        how = "shards W0" if isinstance(strategy, ShardedStrategy) else f"{launcher._start_method}s its processes"
        raise LoRAError(
            f"members of one fit share a whole W0, in processes that start once, and {type(strategy).__name__} {how}"
            " for each: take strategy ddp (configs/strategy/ddp.yaml), or a fit for each"
        )


class Interrupted(Exception):
    """A signal came, and all members have saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def share_w0(first: Member, member: Member) -> None:
    """Move a member to its precision and device, over the first member's W0; a second call changes nothing."""
    device = member.trainer.strategy.root_device
    convert(member.module, member.trainer.precision_plugin)
    here = {place.name: place.tensor for place in iter_base(first.module.backbone)}
    for place in iter_base(member.module.backbone) if member is not first else ():
        shared, given = here.get(place.name), place.tensor
        if shared is not None and shared is not given and not given.is_meta:
            moved = given.to(shared.device)  # on the way to which bitsandbytes quantizes
            shared = shared if shared.dtype == moved.dtype and torch.equal(shared, moved) else None
        if shared is None:
            raise LoRAError(f"the members' backbones differ, first in '{place.name}': all of them need one W0")
        store: dict[str, Any] = place.module._parameters if place.is_parameter else place.module._buffers
        store[place.key] = shared
    fill_from_files(member.module.backbone, device)
    member.module.to(device)


def copy_over_base(backbone: nn.Module) -> nn.Module:
    """A copy of the modules over the same storage, whose parameters can be cast without changing `backbone`."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in backbone.buffers()}
    for p in backbone.parameters():
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=p.requires_grad) if type(p) is nn.Parameter else p
    return copy.deepcopy(backbone, memo)


@contextmanager
def _record_signals() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM are recorded, to be handled between two turns."""
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, lambda n, frame: received.append(n)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Turns:
    """A fit `run`, which calls `pause` where others may go on, with its random states and the file it prints to.

    Lightning's loop cannot be left and entered again, so each fit runs in a thread, and at most one thread goes on at a
    time, with the random states and the screen of its fit. So a fit computes what it computes alone.
    """

    def __init__(self, run: Callable[[], object], random: dict[str, Any], log: Path | None = None) -> None:
        share_heap()
        self._log, self._random = log, random
        self._threads = torch.get_num_threads()
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.is_over = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run, run), daemon=True)
        self._thread.start()

    def _run(self, run: Callable[[], object]) -> None:
        self._go.acquire()
        torch.set_num_threads(self._threads)  # torch keeps their number by thread
        try:
            run()
        except BaseException as error:  # an error ends this fit alone
            self.error = error
        self.is_over = True
        self._back.release()

    def pause(self) -> None:
        """Called in the fit: let others go on until its next turn."""
        self._back.release()
        self._go.acquire()

    def resume(self) -> None:
        """Let the fit go on until it pauses or is over."""
        before = random_state()
        set_random_state(self._random)
        try:
            with ExitStack() as stack:
                if self._log is not None:
                    self._log.parent.mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context(self._log.open("a", encoding="utf-8"))
                    stack.enter_context(redirect_stdout(file))
                    stack.enter_context(redirect_stderr(file))
                self._go.release()
                self._back.acquire()
            if self.is_over:
                self._thread.join()
        finally:
            self._random = random_state()
            set_random_state(before)
