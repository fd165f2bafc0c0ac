"""Renders the template by copier, and writes the template's origin into the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lora_lightning.commands.projects.origin import origin
from lora_lightning.lora.errors import LoRAError, MissingPackageError

TEMPLATE = Path(__file__).parents[2] / "template"
ANSWERS = ".copier-answers.yml"


def render(
    target: Path, data: dict[str, Any], template: str | None, ref: str | None, *, asking: bool
) -> dict[str, Any]:
    """Render by copier, which removes a folder that it made where it fails.

    Returns:
        All answers, defaults included.

    Raises:
        MissingPackageError: copier is not installed.
        LoRAError: copier refuses, or is stopped.
    """
    try:
        import copier
        from copier.errors import CopierAnswersInterrupt, UserMessageError
    except ImportError as error:
        raise MissingPackageError("new needs copier: pip install 'lora_lightning[new]'") from error
    source = template or str(TEMPLATE)
    try:
        done = copier.run_copy(source, target, data, vcs_ref=ref, defaults=not asking, quiet=True)
    except (CopierAnswersInterrupt, KeyboardInterrupt):
        raise LoRAError("stopped, and nothing was written") from None
    except (UserMessageError, ValueError) as error:
        raise LoRAError(f"the template '{source}': {error}") from error
    if template is None:
        _note_origin(target / ANSWERS)
    return dict(done.answers.combined)


def _note_origin(file: Path) -> None:
    """Write where `copier update` finds this template, in place of the installed package's folder."""
    head, _, _ = file.read_text(encoding="utf-8").partition("\n")
    answers = yaml.safe_load(file.read_text(encoding="utf-8"))
    answers.pop("_src_path", None)
    answers = {**origin(TEMPLATE), **answers}
    file.write_text(f"{head}\n{yaml.safe_dump(answers, allow_unicode=True)}", encoding="utf-8")
