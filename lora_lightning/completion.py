"""`lora-lightning completion bash|zsh`: the script that completes commands, options and their values."""

from __future__ import annotations

from typing import Literal

from lora_lightning.lora.errors import MissingPackageError


def completion(shell: Literal["bash", "zsh", "tcsh"]) -> None:
    """Print the script that lets a shell complete commands, options and their values.

    `eval "$(lora-lightning completion bash)"` tries it. Made in seconds and kept in a file, it is loaded at once: for
    bash ~/.local/share/bash-completion/completions/lora-lightning, for zsh _lora-lightning in a folder of fpath.

    Args:
        shell: the shell that will read it.
    """
    try:
        import shtab  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("completion needs shtab: pip install shtab") from error
    from lora_lightning.cli import parser_of_all

    print(parser_of_all().get_completion_script(f"shtab-{shell}"))
