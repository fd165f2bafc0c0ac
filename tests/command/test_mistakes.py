"""A mistake ends in one line that says what to do, and never in a traceback: those of `mistakes.txt`, word for word."""

import re
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from lora_lightning.cli.registry import ENTRIES
from tests.command.process import ends, files_in

BROKEN = """
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        raise RuntimeError("weights are on the other disk")


def plain():
    return nn.Linear(2, 2)
"""
LONG = "text,label\n" + "".join(f"{'film ' * 40},{i % 2}\n" for i in range(20))


@dataclass
class Mistake:
    command: str
    said: str = ""
    files: dict[str, bytes] = field(default_factory=dict)


def read(text):
    """The mistakes of a transcript: lines of a file follow its name up to the answer."""
    mistakes, file, encoding = [], "", ""
    for line in text.partition("# ----")[2].splitlines()[1:]:
        if line.startswith("$ "):
            mistakes.append(Mistake(line[2:]))
        elif line.startswith("> "):
            file, _, how = line[2:].partition(" ")
            encoding = how.strip("()") if how.startswith("(") else "utf-8"
            mistakes[-1].files[file] = {"= BROKEN": BROKEN, "= LONG": LONG}.get(how, "").encode()
        elif line.startswith("! "):
            mistakes[-1].said, file = line[2:], ""
        elif file:
            mistakes[-1].files[file] += f"{line}\n".encode(encoding)
    return mistakes


MISTAKES = read(Path(__file__).with_name("mistakes.txt").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tiny, trained, tmp_path):
    """Holds what a mistake speaks of."""

    def make(mistake):
        (tmp_path / "bert").symlink_to(tiny.bert)
        shutil.copyfile(tiny.reviews, tmp_path / "reviews.csv")
        text = Path(tiny.config).read_text().replace(tiny.bert, "bert").replace(tiny.reviews, "reviews.csv")
        (tmp_path / "run.yaml").write_text(text.replace("max_epochs: 6", "max_epochs: 1"))
        if "runs/" in mistake.command:
            shutil.copytree(trained, tmp_path / "runs" / "tiny" / "version_0")
        for name, content in mistake.files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return tmp_path

    return make


@pytest.fixture
def taken():
    """A port that something listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one.getsockname()[1]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.command[:50]} {mistake.said[:30]}")
def test_a_mistake_is_answered_word_for_word(mistake, folder, taken, monkeypatch, capsys):
    if mistake.command.endswith("accelerator gpu") and torch.cuda.is_available():
        pytest.skip("the line is for machines without a GPU")
    here = folder(mistake)
    before = files_in(here)
    monkeypatch.setattr("sys.path", list(sys.path))
    words = shlex.split(mistake.command)
    while re.match(r"[A-Z_]+=", words[0]):
        key, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(key, value.format(taken=taken)) if value else monkeypatch.delenv(key, raising=False)
    said, code = ends(monkeypatch, capsys, *words)
    how, wanted = re.fullmatch(r"(?:\[(\w+)\] )?(.*)", mistake.said).groups()
    assert (said, code) == (wanted.replace("COMMANDS", ", ".join(ENTRIES)), 1 if how == "1" else 2)
    left = {path for path in files_in(here) if path not in before}
    assert bool(left) == (how == "late"), "a mistake leaves no run behind"


def test_there_are_many_and_each_answer_is_one_sentence_that_fits_a_screen():
    assert len(MISTAKES) > 90
    assert all(len(mistake.said) < 330 and "<class" not in mistake.said for mistake in MISTAKES)
