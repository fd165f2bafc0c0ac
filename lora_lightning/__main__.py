"""Entry of the `lora-lightning` command."""

from __future__ import annotations

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
    sys.path.insert(0, os.getcwd())  # noqa: PTH109  (a class of one's own in a file beside the config)
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


if __name__ == "__main__":
    main()
