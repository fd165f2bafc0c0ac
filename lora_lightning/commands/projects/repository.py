"""git, where there is one."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(*args: str, cwd: Path | None = None) -> str | None:
    """What git says, or None where there is none or it fails."""
    try:
        done = subprocess.run(["git", *args], cwd=cwd, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def start_repository(target: Path) -> bool:
    """A git repository with a first commit; what a person has not set up for git is left to them.

    Returns:
        Whether there is a commit.
    """
    if git("rev-parse", "--is-inside-work-tree", cwd=target) == "true":
        return False  # a project within a repository belongs to it
    if git("init", "--quiet", "--initial-branch=main", cwd=target) is None:
        return False
    git("add", "--all", cwd=target)
    return git("commit", "--quiet", "--message", "Start from the template of lora_lightning", cwd=target) is not None
