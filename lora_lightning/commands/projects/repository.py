"""Calls of git, where it is installed."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(*args: str, cwd: Path | None = None) -> str | None:
    """git's output, or None where it is not installed or fails."""
    try:
        done = subprocess.run(["git", *args], cwd=cwd, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def start_repository(target: Path) -> bool:
    """Make a git repository with a first commit, as far as the user's git is set up.

    Returns:
        Whether there is a commit.
    """
    if git("rev-parse", "--is-inside-work-tree", cwd=target) == "true":
        return False  # the project is part of an existing repository
    if git("init", "--quiet", "--initial-branch=main", cwd=target) is None:
        return False
    git("add", "--all", cwd=target)
    return git("commit", "--quiet", "--message", "Start from the template of lora_lightning", cwd=target) is not None
