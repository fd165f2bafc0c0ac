"""Entry of the `lora-lightning` command."""

from __future__ import annotations

import os
import select
import sys

from lora_lightning.cli.config_files import check
from lora_lightning.cli.exit_codes import CLOSED, DEBUG, report_error
from lora_lightning.cli.help import command_words
from lora_lightning.training.population.heap import share_heap


def main() -> None:
    """Run the command; an error ends in one line and an exit code of `cli.exit_codes`."""
    # OpenMP's barriers spin: with another program on the second core a step takes ten times as long. The runtime reads
    # this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns where a DataLoader forks
    # Where a process is gone, torch's store and gloo would print forty lines of C++ before our one.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "--together" in sys.argv:
        share_heap()  # before libraries begin threads, each of which would get a heap
    sys.path.insert(0, os.getcwd())  # noqa: PTH109  (for a user's class in a file beside the config)
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        os.environ[DEBUG] = "1"
    try:
        run(sys.argv[1:])
        sys.stdout.flush()
    except SystemExit as stopped:
        # Lightning ends a run that Ctrl-C has stopped with 1.
        if isinstance(stopped.__context__, KeyboardInterrupt):
            sys.exit(report_error(stopped.__context__, sys.argv[1:]))
        raise
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(CLOSED)
        sys.exit(report_error(error, sys.argv[1:]))


def run(args: list[str]) -> None:
    """Run one command."""
    if not (args := command_words(args)):
        return
    check(args)  # YAML errors come before torch is imported
    from lora_lightning.cli.log_filters import silence_others
    from lora_lightning.cli.registry import COMMANDS

    silence_others()
    if args[0] in COMMANDS:
        from lora_lightning.cli.parser import run_command

        run_command(args[0], args[1:])
    else:
        from lora_lightning.cli.main import LoRACLI

        LoRACLI(args=args)


def _nobody_reads() -> bool:
    """Whether stdout's pipe is broken, as after `| head`; it is then replaced, since Python writes to it at its end."""
    try:
        screen = sys.stdout.fileno()
        poll = select.poll()
    except (OSError, ValueError, AttributeError):  # no file, or a system without it
        return False
    poll.register(screen, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), screen)
    return True


if __name__ == "__main__":
    main()
