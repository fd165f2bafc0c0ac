"""Each guard taken away once, and the tests that must then fail: `python -m tests.mutations [WORD ...]` runs it.

A mutation is one text in one function that is replaced by another. The function is compiled anew and its code put
into the function that is there, in a process that is forked from one in which all packages are loaded, so that all of
them take minutes and not an hour. A guard whose mutation no test catches is a guard that nobody would miss.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "lightning.pytorch.cli", "torchmetrics", "transformers", "datasets", "peft")

# After `==` the guard and its function; after `-` the lines that become those after `+`, or nothing; after `by` each
# test that must then fail: `by lora/inject::test_x` is `tests/lora/test_inject.py::test_x`.
TABLE = """
== law 2: W0 at the end of a fit, in training.callbacks.guards.FreezeBase.on_train_end
-        self._prove(pl_module)
by training/guards::test_a_moved_w0_stops_the_fit[body.4.bias]
by training/guards::test_a_moved_w0_stops_the_fit[body.1.running_mean]
== law 2: W0 before a checkpoint is written, in training.callbacks.guards.FreezeBase.on_save_checkpoint
-        if self.proves_at == "checkpoint" or best != scores:
-            self._prove(pl_module)
+        del best
by training/guards::test_no_checkpoint_is_written_over_a_good_one_once_w0_has_moved
== law 2: W0 at the start is that of this fit, in training.module.LoRAModule.setup
-        self._w0 = None
-        if (trainer := trainer_of(self)) is not None:
+        if (trainer := trainer_of(self)) is not None:
by training/module::test_a_second_fit_on_a_w0_that_was_written_to_starts_from_that
== law 2: what someone thaws is frozen again, in training.callbacks.guards.FreezeBase.setup
-                parameter.requires_grad_(False)
+                pass
by training/guards::test_a_parameter_that_someone_thaws_is_frozen_again
== law 2: batch statistics stand still, in lora.layers.trained.frozen_norm.FrozenStatistics.forward
-mode, self.training = self.training, False
+mode = self.training
by training/guards::test_batch_statistics_hold_though_someone_wakes_the_norm
== law 4: every adapter has a gradient, in training.callbacks.guards.check_gradients
-    if without:
+    if without and False:
by training/guards::test_an_adapter_that_the_forward_bypasses_stops_the_run
== law 4: the first gradient is finite, in training.callbacks.guards.check_gradients
-    if finite and infinite:
+    if finite and infinite and False:
by training/guards::test_a_gradient_that_is_not_finite_stops_the_run_but_for_a_loss_scalers_first_step
== law 4: a pattern that matches nothing, in lora.targets.select._by_name
-            raise TargetError(_unused_target(entry, pattern, names, candidates))
+            continue
by lora/targets::test_a_pattern_that_matches_nothing_names_near_misses
== law 5: a second injection, in lora.inject.inject
-    if any(isinstance(module, Grafted) for module in modules):
+    if False:
by lora/inject::test_a_second_injection_is_refused
== law 5: two layers on one weight, in lora.inject.inject
-    refuse_shared_weights(selection)
by lora/inject::test_two_layers_with_one_weight_are_refused_by_name
== law 7: missing keys, in lora.frozen.tensors.refuse_misfits
-for key in expected if key not in tensors]
+for key in expected if False]
by training/module::test_a_checkpoint_that_does_not_fit_is_refused[another case]
by training/module::test_a_checkpoint_that_does_not_fit_is_refused[a key less]
== law 7: keys left over, in lora.frozen.tensors.refuse_misfits
-for key in tensors if key not in expected]
+for key in tensors if False]
by training/module::test_a_checkpoint_that_does_not_fit_is_refused[a key more]
== law 7: shapes, in lora.frozen.tensors.refuse_misfits
-        if got.shape != want.shape
+        if False
by training/module::test_a_checkpoint_that_does_not_fit_is_refused[another shape]
== law 7: another W0, in training.module.LoRAModule.on_load_checkpoint
-            refuse_other_base(made_on, self._w0, allow_other_base=self.allow_other_base)
+            pass
by training/module::test_a_checkpoint_of_another_base_is_refused
== law 7: other settings, in training.checkpoints.adapter_state.refuse_other_config
-if trained.get(name) != here.get(name) and name not in
+if False and name not in
by training/module::test_a_checkpoint_of_other_settings_is_refused
== law 8: random states, in training.checkpoints.resume.Resume._put_back
-        set_random_state(state["random"])
by training/resume::test_resumed_from_any_state_is_uninterrupted[plain]
== law 8: the sampler's place, in data.loading.sampler.EpochSampler.skip
-self._skip = (self.epoch, batches * self.block // self.num_replicas)
+pass
by training/resume::test_resumed_from_any_state_is_uninterrupted[plain]
== law 8: places of loaders that were made early, in training.checkpoints.resume.Resume.on_train_start
-        loop_state.restore_loader_places(trainer)
by training/resume::test_resumed_from_any_state_is_uninterrupted[plain]
== law 8: figures that training has gathered, in training.checkpoints.resume.Resume._put_back
-                    setattr(metric, key, value)
+                    pass
by training/resume::test_resumed_from_any_state_is_uninterrupted[no validation]
== law 8: an epoch that is over is not begun again, in training.checkpoints.resume.Resume.on_train_epoch_start
-        self._put_back(trainer, pl_module)
-        loop_state.begin_epoch_anew(trainer)
+        self._put_back(trainer, pl_module)
by training/resume::test_resumed_from_any_state_is_uninterrupted[max_steps]
== law 8: the steps that were logged, in training.checkpoints.loop_state.canonical_state
-epoch_loop["_batches_that_stepped"] = stepped - (place.kind == "batch" and place.at_step)
+del stepped
by training/resume::test_best_resumes_from_an_epochs_end_with_the_plateau_that_was_due
== law 8: the plateau that was due, in training.checkpoints.resume.Resume.on_train_epoch_start
-trainer.lr_scheduler_configs[number].scheduler.step(value)
+del value
by training/resume::test_best_resumes_from_an_epochs_end_with_the_plateau_that_was_due
== law 8: another order of rows in an epoch's middle, in data.loading.sampler.ResumableLoader._skip_to_place
-if other := [name for name in was if was[name] != now.get(name)]:
+if other := []:
by training/resume::test_another_order_is_refused_in_an_epochs_middle
== law 8: a resume that cannot be exact is said, in training.checkpoints.resume.Resume.on_train_start
-        for sentence in reasons_against(self._loaded, trainer.world_size, loop_state.restarting_loaders(trainer)):
+        for sentence in ():
by training/resume::test_a_checkpoint_without_random_states_and_one_of_other_processes_are_named
== law 8: the newest state is last.ckpt, not the best, in training.checkpoints.model_checkpoint.Checkpoints._save_newest
-        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
by training/resume::test_last_is_the_newest_state_and_best_the_best
== law 9: the mean is over all units of a step, in training.loss_weighting.UnitMean.weigh
-        return loss * (units / self._share)
+        return loss
by training/averaging::test_accumulated_batches_equal_the_whole_batch
== law 9: what keeps step counts for nothing, in data.loading.sampler.EpochSampler.is_padding
-return batch * self.batch_size == last and self.rank + last * self.num_replicas >= self.count
+return False
by data/sampler::test_all_examples_count_once_in_training_and_padding_for_nothing
== law 9: a step that trains on nothing, in training.loss_weighting.UnitMean.finish
-        if not units:
-            raise LoRAError(
-                "nothing
+        if False:
+            raise LoRAError(
+                "nothing
by training/averaging::test_a_step_that_trains_on_nothing_is_refused
== law 10: nothing that trains is missing, in training.callbacks.guards.check_optimizers
-    if missing:
+    if missing and False:
by training/guards::test_an_optimizer_that_holds_too_much_or_too_little_is_refused_before_the_first_step
== law 10: nothing frozen is held, in training.callbacks.guards.check_optimizers
-    if surplus:
+    if surplus and False:
by training/guards::test_an_optimizer_that_holds_too_much_or_too_little_is_refused_before_the_first_step
== law 10: it is looked at when a fit starts, in training.callbacks.guards.FreezeBase.on_train_start
-        check_optimizers(trainer.optimizers, pl_module)
by training/guards::test_an_optimizer_that_holds_too_much_or_too_little_is_refused_before_the_first_step
== files: by their own sums, in training.checkpoints.file_io.check_whole
-            if damaged := archive.testzip():
+            if damaged := None:
by training/checkpoint_io::test_a_file_of_plain_lightning_is_checked_by_its_own_sums
== files: written aside, in lora.formats.atomic_dir.write_aside
-part = hidden_path(path, "new")
+part = path
by training/checkpoint_io::test_a_full_disk_leaves_the_older_checkpoint_and_says_so
== files: synced before the move, in lora.formats.atomic_dir.write_aside
-            os.fsync(file.fileno())
by training/guards::test_a_file_is_synced_before_it_is_moved_and_the_move_after_it
== files: the move is synced, in training.checkpoints.file_io.write_checkpoint
-        _sync(path.parent)
by training/guards::test_a_file_is_synced_before_it_is_moved_and_the_move_after_it
== files: the one before is kept, in training.checkpoints.file_io.write_checkpoint
-        _keep_previous(path)
by training/checkpoint_io::test_a_damaged_file_gives_way_to_the_one_before_it_aloud
== files: the one before is said aloud, in training.checkpoints.file_io.whole_file
-        rank_zero_warn(f"{error}; the one before it is used: '{before}'")
by training/checkpoint_io::test_a_damaged_file_gives_way_to_the_one_before_it_aloud
== files: a failed write is one clear error, in training.checkpoints.file_io.write_checkpoint
-    except (OSError, RuntimeError) as error:  # torch
+    except ZeroDivisionError as error:  # torch
by training/checkpoint_io::test_a_folder_that_cannot_be_written_is_one_clear_error
== files: written and read so by the command, in training.trainer.LoRATrainer.__init__
-            self.strategy._checkpoint_io = WholeFiles()
+            pass
by training/guards::test_every_guard_is_on_by_default_in_the_command
== SIGTERM: the exit code, in training.checkpoints.model_checkpoint.Checkpoints._leave
-raise PreemptedError(self.exit_code if trainer.local_rank == 0 else 0)
+raise PreemptedError(0)
by training/guards::test_sigterm_saves_after_the_step_and_ends_with_the_code_that_asks_for_more
== SIGTERM: the step's state is saved, in training.checkpoints.model_checkpoint.Checkpoints.on_train_batch_end
-        if due or self._leaves or self._steps == trainer.max_steps:
+        if due or self._steps == trainer.max_steps:
by training/guards::test_sigterm_saves_after_the_step_and_ends_with_the_code_that_asks_for_more
== not finite: the loss, in training.callbacks.guards.StopOnNonFinite.on_before_optimizer_step
-for x in (*self._losses, norm)])
+for x in (torch.zeros(()), norm)])
by training/guards::test_what_is_not_finite_stops_the_fit_by_name_and_leaves_the_last_good_checkpoint[loss]
by training/guards::test_with_a_loss_scaler_gradients_may_overflow_and_the_loss_may_not
== not finite: a gradient, in training.callbacks.guards.StopOnNonFinite.on_before_optimizer_step
-for x in (*self._losses, norm)])
+for x in self._losses])
by training/guards::test_what_is_not_finite_stops_the_fit_by_name_and_leaves_the_last_good_checkpoint[overflow]
== not finite: a loss scaler may overflow, in training.callbacks.guards.StopOnNonFinite.on_before_optimizer_step
-            named = []
+            pass
by training/guards::test_with_a_loss_scaler_gradients_may_overflow_and_the_loss_may_not
== not finite: the rows and the first bad layer are named, in training.callbacks.guards.first_bad_layer
-    return bad_layers[0] if bad_layers else None
+    return None
by training/guards::test_what_is_not_finite_stops_the_fit_by_name_and_leaves_the_last_good_checkpoint[nan]
== notice: a checkpoint's settings that win over a flag, in training.checkpoints.resume.Resume.on_train_start
-            if now is not None and then != now:
+            if False:
by training/resume::test_what_a_checkpoint_overrules_is_said
== notice: a best by another metric, in training.checkpoints.model_checkpoint.Checkpoints.load_state_dict
-if state.get("best_model_path") and state.get("monitor") != self.monitor:
+if False:
by training/guards::test_another_metric_than_the_checkpoints_begins_its_own_best
== on by default, in cli.main.LoRACLI.instantiate_trainer
-        first = [Throughput, StepFigures, StopOnNonFinite, Resume, PredictionWriter, FreezeBase]
+        first = [Throughput, StepFigures, Resume, PredictionWriter, FreezeBase]
by training/guards::test_every_guard_is_on_by_default_in_the_command
== loggers: the run of the newest state goes on, in training.tracking.loggers.go_on_with
-            logger.go_on_with(str(mine[1]))
+            pass
by training/logger_resume::test_only_the_newest_state_of_a_run_is_that_run_going_on
== loggers: rows after the checkpoint are forgotten, in training.checkpoints.resume.Resume.on_train_start
-                logger.go_on_from(steps)
+                pass
by training/resume::test_rows_after_the_checkpoint_are_forgotten_though_no_step_makes_them_anew
"""


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
        function.__code__ = inspect.unwrap(names["make"](None)).__code__


def read(entry: str) -> Mutation:
    """An entry of the table, from the guard's name on."""
    head, *lines = entry.splitlines()
    guard, _, dotted = head.rpartition(", in ")
    old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
    tests = (re.sub(r"by (\w+)/(\w+)", r"tests/\1/test_\2.py", line) for line in lines if line.startswith("by "))
    return Mutation(guard, dotted, old, new, tuple(tests))


MUTATIONS = tuple(map(read, re.findall(r"^== (.*?)\n(?===|\Z)", TABLE, re.S | re.M)))


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
    failed = set()

    class Note:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:  # in its body: what fails before or after it proves nothing
                (failed.add if report.when == "call" else failed.discard)(report.nodeid)

    options = ["-q", "-W", "ignore", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={scratch}"]
    code = pytest.main([*options, *tests], plugins=[Note()])
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
