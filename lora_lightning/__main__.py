"""Entry of the `lora-lightning` command."""

from __future__ import annotations

import errno
import os
import sys

from lora_lightning.noise import quieten


def main() -> None:
    """Run the command; a user's mistake ends in one line and exit code 2."""
    # OpenMP's barriers spin: with another program on the second core a step takes ten times as long. Read by the
    # runtime when torch is loaded, so set before that.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns where a DataLoader forks
    # Where a process is gone, torch's store and gloo would tell of it in forty lines of C++ before our one.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109  (a class of one's own in a file beside the config)
    if sys.argv[1:2] == ["new"]:
        _new(sys.argv[2:])
        return
    quieten()
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lora_lightning.cli import LoRACLI, run_command
    from lora_lightning.commands import COMMANDS
    from lora_lightning.lora.errors import LoRAError, MissingPackageError

    try:
        if sys.argv[1:] and sys.argv[1] in COMMANDS:
            run_command(sys.argv[1], sys.argv[2:])
        else:
            LoRACLI()
    except (LoRAError, MissingPackageError, MisconfigurationException) as error:
        print(f"lora-lightning: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(f"lora-lightning: error: {of_the_disk(error)}", file=sys.stderr)
        sys.exit(2)


def _new(args: list[str]) -> None:
    """Without torch and Lightning, which would take longer to import than the project to make."""
    from lora_lightning.lora.errors import LoRAError, MissingPackageError
    from lora_lightning.new import main as make

    try:
        make(args)
    except (LoRAError, MissingPackageError, OSError) as error:
        print(f"lora-lightning: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT}
"""A disk that is full, or a folder that cannot be written or is none: a user's to mend, and no fault of the code."""


def of_the_disk(error: OSError) -> str:
    """One line; that of a checkpoint that could not be written, where a log failed after it for the same reason."""
    from lora_lightning.lora.errors import LoRAError

    before: BaseException | None = error
    while before is not None:
        if isinstance(before, LoRAError):
            return " ".join(str(before).split())
        before = before.__context__
    where = f": '{error.filename}'" if error.filename else ""
    return (
        f"{error.strerror}{where}; make room or give another --runs_dir, and go on with --ckpt_path auto: checkpoints"
        " that were written are whole"
    )


if __name__ == "__main__":
    main()
