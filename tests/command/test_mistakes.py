"""A mistake ends in one line that says what to do, and never in a traceback."""

import importlib.util
import os
import shlex
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch

from lora_lightning.__main__ import main
from tests.command.mistakes import MISTAKES

START = "lora-lightning: error: "


def ends(capsys):
    """What the command that runs here answers, and its exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr().err
    lines = [line.removeprefix(START) for line in shown.splitlines() if line.startswith(START)]
    assert len(lines) == 1, shown
    assert "Traceback" not in shown
    return lines[0], stopped.value.code


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
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return make


@pytest.fixture
def taken():
    """A port that something listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one.getsockname()[1]


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_word_for_word(name, folder, taken, monkeypatch, capsys):
    mistake = MISTAKES[name]
    if "gpu" in mistake.said and torch.cuda.is_available():
        pytest.skip("the line is for machines without a GPU")
    here = folder(mistake)
    before = files_in(here)
    monkeypatch.setattr("sys.argv", ["lora-lightning", *shlex.split(mistake.command)])
    monkeypatch.setattr("sys.path", list(sys.path))
    for key, value in mistake.env.items():
        monkeypatch.delenv(key, raising=False)
        if value is not None:
            monkeypatch.setenv(key, value.format(taken=taken))
    if mistake.lacks:
        there = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == mistake.lacks else there(n, *a))
    said, code = ends(capsys)
    if os.environ.get("SHOW"):
        Path(os.environ["SHOW"]).open("a").write(f"{name}\t{code}\t{said}\n")
        return
    assert (said, code) == (mistake.said, mistake.code)
    left = {path for path in files_in(here) if path not in before}
    assert not left or "val/los" in mistake.said, "a mistake leaves no run behind"
