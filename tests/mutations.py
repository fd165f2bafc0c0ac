"""Each guard taken away once, and the tests that must then fail: `python -m tests.mutations [WORD ...]` runs it.

A mutation is one text in one function that is replaced by another. The function is compiled anew and its code put
into the function that is there, in a process that is forked from one in which all packages are loaded, so that all of
them take minutes and not an hour. A guard whose mutation no test catches is a guard that nobody would miss.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "lightning.pytorch.cli", "torchmetrics", "transformers", "datasets", "peft", "pytest")


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new`, once, in the function `dotted` of the package; then each of `tests` must fail."""

    guard: str
    dotted: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself, below its decorators."""
        module, _, name = self.dotted.rpartition(".")
        try:
            owner: Any = importlib.import_module(f"lora_lightning.{module}")
        except ModuleNotFoundError:
            module, _, cls = module.rpartition(".")
            owner = getattr(importlib.import_module(f"lora_lightning.{module}"), cls)
        return inspect.unwrap(inspect.getattr_static(owner, name))

    @property
    def source(self) -> str:
        return inspect.getsource(self.function)

    def apply(self) -> None:
        """Put the changed code into the function that is there, whoever has imported it by name."""
        function = self.function
        source = textwrap.indent(textwrap.dedent(self.source.replace(self.old, self.new)), "    ")
        # In a function that has `__class__`, so that `super()` finds the class of a method.
        names: dict[str, Any] = {}
        exec(
            f"from __future__ import annotations\ndef make(__class__):\n{source}\n    return {function.__name__}",
            function.__globals__,
            names,
        )
        function.__code__ = names["make"](None).__code__


GUARDS, RESUME = (f"tests/training/test_{name}.py" for name in ("guards", "resume"))
MODULE, FILES, AVERAGING = (f"tests/training/test_{name}.py" for name in ("module", "checkpoint_io", "averaging"))
LOGGERS, SAMPLER = "tests/training/test_logger_resume.py", "tests/data/test_sampler.py"
INJECT, TARGETS = "tests/lora/test_inject.py", "tests/lora/test_targets.py"
ANY_STATE = f"{RESUME}::test_resumed_from_any_state_is_uninterrupted"
MISFIT = f"{MODULE}::test_a_checkpoint_that_does_not_fit_is_refused"

MUTATIONS = (
    Mutation(
        "law 2: W0 at the end of a fit",
        "training.callbacks.freeze_base.FreezeBase.on_train_end",
        "        self._prove(pl_module)\n",
        "",
        (f"{GUARDS}::test_a_moved_w0_stops_the_fit", f"{GUARDS}::test_moved_batch_statistics_stop_the_fit"),
    ),
    Mutation(
        "law 2: W0 before a checkpoint is written",
        "training.callbacks.freeze_base.FreezeBase.on_save_checkpoint",
        '        if self.proves_at == "checkpoint" or best != scores:\n            self._prove(pl_module)',
        "        del best",
        (f"{GUARDS}::test_no_checkpoint_is_written_over_a_good_one_once_w0_has_moved",),
    ),
    Mutation(
        "law 2: W0 at the start is that of this fit",
        "training.module.LoRAModule.setup",
        """        self._w0 = None
        if (trainer := trainer_of(self)) is not None:""",
        """        if (trainer := trainer_of(self)) is not None:""",
        (f"{MODULE}::test_a_second_fit_on_a_w0_that_was_written_to_starts_from_that",),
    ),
    Mutation(
        "law 2: what someone thaws is frozen again",
        "training.callbacks.freeze_base.freeze",
        "            parameter.requires_grad_(False)",
        "            pass",
        (f"{GUARDS}::test_a_parameter_that_someone_thaws_is_frozen_again",),
    ),
    Mutation(
        "law 2: batch statistics stand still",
        "lora.layers.trained.frozen_norm.FrozenStatistics.forward",
        "mode, self.training = self.training, False",
        "mode = self.training",
        (f"{GUARDS}::test_batch_statistics_hold_though_someone_wakes_the_norm",),
    ),
    Mutation(
        "law 4: every adapter has a gradient",
        "training.callbacks.freeze_base.check_gradients",
        "    if without:",
        "    if without and False:",
        (f"{GUARDS}::test_an_adapter_that_the_forward_bypasses_stops_the_run",),
    ),
    Mutation(
        "law 4: the first gradient is finite",
        "training.callbacks.freeze_base.check_gradients",
        "    if finite and infinite:",
        "    if finite and infinite and False:",
        (
            f"{GUARDS}::test_a_gradient_that_is_not_finite_stops_the_run",
            f"{GUARDS}::test_a_loss_scaler_may_overflow_in_its_first_step",
        ),
    ),
    Mutation(
        "law 4: a pattern that matches nothing",
        "lora.targets.select._by_name",
        "            raise TargetError(_unused_target(entry, pattern, names, candidates))",
        "            continue",
        (f"{TARGETS}::test_a_pattern_that_matches_nothing_names_near_misses",),
    ),
    Mutation(
        "law 5: a second injection",
        "lora.inject.inject",
        "    if any(isinstance(module, Grafted) for module in modules):",
        "    if False:",
        (f"{INJECT}::test_a_second_injection_is_refused",),
    ),
    Mutation(
        "law 5: two layers on one weight",
        "lora.inject.inject",
        "    _refuse_tied_targets(selection)\n",
        "",
        (f"{INJECT}::test_two_layers_with_one_weight_are_refused_by_name",),
    ),
    Mutation(
        "law 7: missing keys",
        "training.checkpoints.adapter_state.refuse_misfits",
        "if k not in state and k not in frozen]",
        "if False]",
        (f"{MISFIT}[another case]", f"{MISFIT}[a key less]"),
    ),
    Mutation(
        "law 7: keys left over",
        "training.checkpoints.adapter_state.refuse_misfits",
        "for k in state if k not in own]",
        "for k in state if False]",
        (f"{MISFIT}[a key more]",),
    ),
    Mutation(
        "law 7: shapes",
        "training.checkpoints.adapter_state.refuse_misfits",
        "isinstance(own[k], Tensor) and state[k].shape != own[k].shape",
        "False",
        (f"{MISFIT}[another shape]",),
    ),
    Mutation(
        "law 7: another W0",
        "training.module.LoRAModule.on_load_checkpoint",
        "        refuse_other_base(made_on, self._w0, allow_other_base=self.allow_other_base)\n",
        "",
        (f"{MODULE}::test_a_checkpoint_of_another_base_is_refused",),
    ),
    Mutation(
        "law 7: other settings",
        "training.checkpoints.adapter_state.refuse_other_config",
        "if trained.get(name) != here.get(name) and name not in",
        "if False and name not in",
        (f"{MODULE}::test_a_checkpoint_of_other_settings_is_refused",),
    ),
    Mutation(
        "law 8: random states",
        "training.checkpoints.resume.Resume._put_back",
        '            set_random_state(own["random"])\n',
        "",
        (f"{ANY_STATE}[plain]",),
    ),
    Mutation(
        "law 8: the sampler's place",
        "data.loading.sampler.EpochSampler.skip",
        "self._skip = (self.epoch, batches * self.block // self.num_replicas)",
        "pass",
        (f"{ANY_STATE}[plain]",),
    ),
    Mutation(
        "law 8: places of loaders that were made early",
        "training.checkpoints.resume.Resume.on_train_start",
        "        load_left_places(trainer)\n",
        "",
        (f"{ANY_STATE}[plain]",),
    ),
    Mutation(
        "law 8: figures that training has gathered",
        "training.checkpoints.resume.Resume._put_back",
        '            put_figures(module, own["figures"])\n',
        "",
        (f"{ANY_STATE}[no validation]",),
    ),
    Mutation(
        "law 8: an epoch that is over is not begun again",
        "training.checkpoints.resume.Resume.on_train_epoch_start",
        "        self._put_back(trainer, pl_module)\n        begin_epoch_anew(trainer)",
        "        self._put_back(trainer, pl_module)",
        (f"{ANY_STATE}[max_steps]",),
    ),
    Mutation(
        "law 8: the steps that were logged",
        "training.checkpoints.loop_state.canonical_state",
        'own["_batches_that_stepped"] = stepped - (place.kind == "batch" and place.at_step)',
        "del stepped",
        (f"{RESUME}::test_best_resumes_from_an_epochs_end_with_the_plateau_that_was_due",),
    ),
    Mutation(
        "law 8: the plateau that was due",
        "training.checkpoints.resume.Resume.on_train_epoch_start",
        "trainer.lr_scheduler_configs[number].scheduler.step(value)",
        "del value",
        (f"{RESUME}::test_best_resumes_from_an_epochs_end_with_the_plateau_that_was_due",),
    ),
    Mutation(
        "law 8: another order of rows in an epoch's middle",
        "data.loading.loader.ResumableLoader._skip_to_place",
        "if other := [name for name in was if was[name] != now.get(name)]:",
        "if other := []:",
        (f"{RESUME}::test_another_order_is_refused_in_an_epochs_middle",),
    ),
    Mutation(
        "law 8: a resume that cannot be exact is said",
        "training.checkpoints.resume.Resume.on_train_start",
        "        for sentence in reasons_against(self._found, trainer.world_size, restarting_loaders(trainer)):",
        "        for sentence in ():",
        (f"{RESUME}::test_a_checkpoint_without_random_states_and_one_of_other_processes_are_named",),
    ),
    Mutation(
        "law 8: the newest state is last.ckpt, not the best",
        "training.checkpoints.model_checkpoint.Checkpoints._save_newest",
        "        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))\n",
        "",
        (f"{RESUME}::test_last_is_the_newest_state_and_best_the_best",),
    ),
    Mutation(
        "law 9: the mean is over all units of a step",
        "training.loss_weighting.UnitMean.weigh",
        "        return loss * (units / self._share)",
        "        return loss",
        (f"{AVERAGING}::test_accumulated_batches_equal_the_whole_batch",),
    ),
    Mutation(
        "law 9: what keeps step counts for nothing",
        "data.loading.sampler.EpochSampler.is_padding",
        "return batch * self.batch_size == last and self.rank + last * self.num_replicas >= self.count",
        "return False",
        (f"{SAMPLER}::test_all_examples_count_once_in_training_and_padding_for_nothing",),
    ),
    Mutation(
        "law 9: a step that trains on nothing",
        "training.loss_weighting.UnitMean.finish",
        '        if not units:\n            raise LoRAError(\n                "nothing',
        '        if False:\n            raise LoRAError(\n                "nothing',
        (f"{AVERAGING}::test_a_step_that_trains_on_nothing_is_refused",),
    ),
    Mutation(
        "law 10: nothing that trains is missing",
        "training.callbacks.freeze_base.check_optimizers",
        "    if missing:",
        "    if missing and False:",
        (f"{GUARDS}::test_an_optimizer_that_holds_too_much_or_too_little_is_refused",),
    ),
    Mutation(
        "law 10: nothing frozen is held",
        "training.callbacks.freeze_base.check_optimizers",
        "    if surplus:",
        "    if surplus and False:",
        (f"{GUARDS}::test_an_optimizer_that_holds_too_much_or_too_little_is_refused",),
    ),
    Mutation(
        "law 10: it is looked at when a fit starts",
        "training.callbacks.freeze_base.FreezeBase.on_train_start",
        "        check_optimizers(trainer.optimizers, pl_module)\n",
        "",
        (f"{GUARDS}::test_an_optimizer_of_everything_stops_the_fit_before_its_first_step",),
    ),
    Mutation(
        "files: by their own sums",
        "training.checkpoints.file_io.check_whole",
        "            if damaged := archive.testzip():",
        "            if damaged := None:",
        (f"{FILES}::test_a_file_of_plain_lightning_is_checked_by_its_own_sums",),
    ),
    Mutation(
        "files: written aside",
        "training.checkpoints.file_io.write_checkpoint",
        'aside = path.with_name(f".{path.name}.{os.getpid()}.part")',
        "aside = path",
        (f"{FILES}::test_a_full_disk_leaves_the_older_checkpoint_and_says_so",),
    ),
    Mutation(
        "files: synced before the move",
        "training.checkpoints.file_io.write_checkpoint",
        "            os.fsync(file.fileno())\n",
        "",
        (f"{GUARDS}::test_a_file_is_synced_before_it_is_moved_and_the_move_after_it",),
    ),
    Mutation(
        "files: the move is synced",
        "training.checkpoints.file_io.write_checkpoint",
        "        _sync(path.parent)\n",
        "",
        (f"{GUARDS}::test_a_file_is_synced_before_it_is_moved_and_the_move_after_it",),
    ),
    Mutation(
        "files: the one before is kept",
        "training.checkpoints.file_io.write_checkpoint",
        "        _keep_previous(path)\n",
        "",
        (f"{FILES}::test_a_damaged_file_gives_way_to_the_one_before_it_aloud",),
    ),
    Mutation(
        "files: the one before is said aloud",
        "training.checkpoints.file_io.whole_file",
        "        rank_zero_warn(f\"{error}; the one before it is used: '{before}'\")\n",
        "",
        (f"{FILES}::test_a_damaged_file_gives_way_to_the_one_before_it_aloud",),
    ),
    Mutation(
        "files: a failed write is one clear error",
        "training.checkpoints.file_io.write_checkpoint",
        "    except (OSError, RuntimeError) as error:  # torch",
        "    except ZeroDivisionError as error:  # torch",
        (f"{FILES}::test_a_folder_that_cannot_be_written_is_one_clear_error",),
    ),
    Mutation(
        "files: written and read so by the command",
        "training.trainer.LoRATrainer.__init__",
        "            self.strategy._checkpoint_io = WholeFiles()",
        "            pass",
        (f"{GUARDS}::test_every_guard_is_on_by_default_in_the_command",),
    ),
    Mutation(
        "SIGTERM: the exit code",
        "training.checkpoints.model_checkpoint.Checkpoints._leave",
        "raise PreemptedError(self.exit_code if trainer.local_rank == 0 else 0)",
        "raise PreemptedError(0)",
        (f"{GUARDS}::test_sigterm_saves_after_the_step_and_ends_with_the_code_that_asks_for_more",),
    ),
    Mutation(
        "SIGTERM: the step's state is saved",
        "training.checkpoints.model_checkpoint.Checkpoints.on_train_batch_end",
        "        if due or self._leaves or self._steps == trainer.max_steps:",
        "        if due or self._steps == trainer.max_steps:",
        (f"{GUARDS}::test_sigterm_saves_after_the_step_and_ends_with_the_code_that_asks_for_more",),
    ),
    Mutation(
        "not finite: the loss",
        "training.callbacks.nan_guard.StopOnNonFinite.on_before_optimizer_step",
        "for x in (*self._losses, norm)])",
        "for x in (torch.zeros(()), norm)])",
        (
            f"{GUARDS}::test_a_loss_that_is_not_finite_stops_the_fit_though_its_gradients_are",
            f"{GUARDS}::test_with_a_loss_scaler_gradients_may_overflow_and_the_loss_may_not",
        ),
    ),
    Mutation(
        "not finite: a gradient",
        "training.callbacks.nan_guard.StopOnNonFinite.on_before_optimizer_step",
        "for x in (*self._losses, norm)])",
        "for x in self._losses])",
        (f"{GUARDS}::test_a_bad_gradient_stops_before_the_optimizer_and_names_the_tensor",),
    ),
    Mutation(
        "not finite: a loss scaler may overflow",
        "training.callbacks.nan_guard.StopOnNonFinite.on_before_optimizer_step",
        "            named = []\n",
        "            pass\n",
        (f"{GUARDS}::test_with_a_loss_scaler_gradients_may_overflow_and_the_loss_may_not",),
    ),
    Mutation(
        "not finite: the rows and the first bad layer are named",
        "training.callbacks.nan_guard.first_bad_layer",
        "    return bad_layers[0] if bad_layers else None",
        "    return None",
        (f"{GUARDS}::test_a_bad_loss_stops_with_the_step_the_rows_and_the_layer_and_leaves_the_last_good_checkpoint",),
    ),
    Mutation(
        "notice: a checkpoint's settings that win over a flag",
        "training.checkpoints.resume.Resume.on_train_start",
        '        for sentence in overruled_settings(self._found["settings"], self._settings):',
        "        for sentence in ():",
        (f"{RESUME}::test_what_a_checkpoint_overrules_is_said",),
    ),
    Mutation(
        "notice: a best by another metric",
        "training.checkpoints.model_checkpoint.Checkpoints.load_state_dict",
        'if state.get("best_model_path") and state.get("monitor") != self.monitor:',
        "if False:",
        (f"{GUARDS}::test_another_metric_than_the_checkpoints_begins_its_own_best",),
    ),
    Mutation(
        "on by default",
        "cli.main.LoRACLI.instantiate_trainer",
        "        for default in (FreezeBase, PredictionWriter, Resume, StopOnNonFinite, StepFigures, Throughput):",
        "        for default in (FreezeBase, PredictionWriter, Resume, StepFigures, Throughput):",
        (f"{GUARDS}::test_every_guard_is_on_by_default_in_the_command",),
    ),
    Mutation(
        "loggers: the run of the newest state goes on",
        "training.tracking.wandb_logger.go_on_with",
        "            logger.go_on_with(str(mine[1]))",
        "            pass",
        (f"{LOGGERS}::test_only_the_newest_state_of_a_run_is_that_run_going_on",),
    ),
    Mutation(
        "loggers: rows after the checkpoint are forgotten",
        "training.checkpoints.resume.Resume.on_train_start",
        "                logger.go_on_from(steps)",
        "                pass",
        (f"{RESUME}::test_rows_after_the_checkpoint_are_forgotten_though_no_step_makes_them_anew",),
    ),
)


def caught(mutation: Mutation) -> tuple[bool, str]:
    """Whether each of the tests fails once the change is made, and what pytest said."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        out = Path(folder) / "out.txt"
        child = os.fork()
        if child == 0:
            _run(mutation, out, Path(folder) / "pytest")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code == 0, out.read_text(encoding="utf-8", errors="replace")


def _run(mutation: Mutation, out: Path, scratch: Path) -> None:
    """In the child: ends the process with 0 where every one of the tests failed, in its own body."""
    code = 1
    try:
        with out.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            mutation.apply()
            code = 0 if _all_fail(mutation.tests, scratch) else 1
    finally:
        os._exit(code)


def _all_fail(tests: tuple[str, ...], scratch: Path) -> bool:
    import pytest

    outcomes: dict[str, list[str]] = {}

    class Note:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.failed:
                told = report.outcome if report.when == "call" else "error"
                outcomes.setdefault(report.nodeid, []).append(told)

    options = ["-q", "-W", "ignore", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={scratch}"]
    code = pytest.main([*options, *tests], plugins=[Note()])
    print(outcomes)
    failed = [name for name, told in outcomes.items() if told == ["failed"]]
    return code == 1 and all(any(name == test or name.startswith(f"{test}[") for name in failed) for test in tests)


def run(words: list[str]) -> list[str]:
    """Those of the table with one of the words in their name, or all. Returns the guards that no test would miss."""
    chosen = [m for m in MUTATIONS if not words or any(word in m.guard for word in words)]
    for name in HEAVY:
        importlib.import_module(name)
    missed = []
    for number, mutation in enumerate(chosen, 1):
        began = time.monotonic()
        found, said = caught(mutation)
        verdict = "caught" if found else "NOT CAUGHT"
        print(f"{number:3}/{len(chosen)} {verdict:10} {time.monotonic() - began:5.1f} s  {mutation.guard}", flush=True)
        if not found:
            missed.append(mutation.guard)
            print("\n".join(said.splitlines()[-40:]), flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutations are caught")
    return missed


if __name__ == "__main__":
    sys.exit(1 if run(sys.argv[1:]) else 0)
