"""A mistake ends in one line that says what to do, and never in a traceback."""

import importlib.util
import shlex
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch

from lora_lightning.__main__ import main
from lora_lightning.cli.registry import ENTRIES
from tests.command.mistakes import MISTAKES
from tests.command.process import run
from tests.tiny import make_bert

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
    if "torch sees no GPU" in mistake.said and torch.cuda.is_available():
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
    assert (said, code) == (mistake.said.replace("COMMANDS", ", ".join(ENTRIES)), mistake.code)
    left = {path for path in files_in(here) if path not in before}
    assert bool(left) == mistake.late, "a mistake leaves no run behind"


def test_there_are_thirty_and_each_line_is_one_sentence_that_fits_a_screen():
    assert len(MISTAKES) >= 30
    for name, mistake in MISTAKES.items():
        assert mistake.said, name
        assert "\n" not in mistake.said
        assert len(mistake.said) < 330, name
        assert "<class" not in mistake.said, name


# ---- what needs a file of its own


LATER = {
    "from_pretrained as a class path": (
        ["fit", "--config", "{config}", "--model.backbone", "transformers.AutoModelForMaskedLM.from_pretrained"],
        "model.backbone: write class_path: lora_lightning.huggingface, and the class as init_args.auto_class",
    ),
    "a format for the end of a fit that is not there": (
        ["fit", "--config", "{config}", "--trainer.callbacks+=ExportAtEnd", "--trainer.callbacks.formats", "merge"],
        "unknown export format 'merge'; did you mean 'merged'? (known: adapter, merged)",
    ),
    "a server without an adapter": (
        ["export", "--ckpt_path", "{run}", "--formats", "merged", "--serving", "vllm"],
        "is a form of the adapter, got the formats merged: add adapter to them",
    ),
    "another base than the checkpoint's": (
        ["export", "--ckpt_path", "{run}", "--model.backbone.init_args.pretrained_model_name_or_path", "{other}"],
        "tensors differ, first bert.embeddings.word_embeddings.weight",
    ),
    "other settings than the checkpoint's": (
        ["export", "--config", "{config}", "--ckpt_path", "{run}", "--model.lora.r", "2"],
        "the checkpoint was trained with lora.r=4, this run says 2",
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_a_mistake_is_one_line_and_exit_code_2(name, tiny, trained, monkeypatch, capsys, tmp_path):
    args, said = LATER[name]
    if "{other}" in args:
        make_bert(tmp_path / "other", seed=1)
    filled = [arg.format(config=tiny.config, run=trained, other=tmp_path / "other") for arg in args]
    monkeypatch.setattr("sys.argv", ["lora-lightning", *filled])
    line, code = ends(capsys)
    assert code == 2
    assert said in line


def test_a_mistyped_target_in_a_users_shell(tiny, tmp_path):
    done = run("fit", "--config", tiny.config, "--model.lora.target_modules", "[qurey]", cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "lora-lightning: error: target_modules: no module matches 'qurey'; did you mean 'query'?"
    )
    assert not (tmp_path / "runs").exists(), "a mistake leaves no run behind"
