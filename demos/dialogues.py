"""Dialogues as the ChatterBot corpora are written: YAML files of `conversations`, each a list of lines.

What stands behind the first two lines is sometimes the conversation's next turn and sometimes one more answer to its
first line; so a row is the first line and the first answer to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import yaml

from lora_lightning import ChatData, LoRAError
from lora_lightning.backbones.locate import resolve

SUFFIXES = (".yml", ".yaml")


class DialogueData(ChatData):
    """`ChatData` whose `path` is a YAML file of dialogues, or a directory of them."""

    def read(self) -> dict[str, datasets.Dataset]:
        return {"train": read_dialogues(str(self.path))}


def read_dialogues(path: str) -> datasets.Dataset:
    """Each pair of a question and an answer once, with the name of its file as `topic`.

    Raises:
        LoRAError: a file that is no such YAML, or a line that is no text, by file and conversation.
    """
    found = Path(resolve(path))
    if not found.exists():
        raise LoRAError(f"no file {found}")
    pairs: dict[tuple[str, str], str] = {}
    for file in _files(found) if found.is_dir() else [found]:
        for number, lines in enumerate(_conversations(file), 1):
            # Where a conversation's first dash was forgotten, YAML reads its lines as one text with dashes in it.
            lines = lines.split(" - ") if isinstance(lines, str) else lines  # noqa: PLW2901
            if not isinstance(lines, list) or len(lines) < 2 or not all(isinstance(line, str) for line in lines[:2]):
                raise LoRAError(
                    f"{file.name}, conversation {number}: expected two or more lines of text, got {lines!r}"
                )
            pairs.setdefault((lines[0], lines[1]), file.stem)
    if not pairs:
        raise LoRAError(f"{found} holds no conversations")
    columns = zip(*((question, answer, topic) for (question, answer), topic in pairs.items()), strict=True)
    return datasets.Dataset.from_dict(dict(zip(("question", "answer", "topic"), map(list, columns), strict=True)))


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)


def _conversations(file: Path) -> list[Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LoRAError(f"{file} cannot be read as YAML: {str(error).strip().splitlines()[0]}") from error
    conversations = content.get("conversations") if isinstance(content, dict) else None
    if not isinstance(conversations, list):
        raise LoRAError(f"{file}: expected a mapping with `conversations`, a list of lists of lines")
    return conversations
