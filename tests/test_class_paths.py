"""A class path that leads nowhere, or an argument that a class does not take, is answered with what was meant."""

from pathlib import Path

import pytest

from lora_lightning.__main__ import main
from lora_lightning.cli.diagnostics import wrong_path


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("lora_lightning.SequenceClasification", "did you mean 'lora_lightning.SequenceClassification'"),
        ("SequenceClasification", "is no path to a class, such as module.Class; did you mean 'lora_lightning.Sequence"),
        ("lora_lightning.tasks.clasification.X", "did you mean 'lora_lightning.tasks.classification'"),
        ("lora_lightnin.LoRAModule", "there is no module 'lora_lightnin'; did you mean 'lora_lightning'"),
        ("torch.optim.AdmW", "there is no 'torch.optim.AdmW'; did you mean 'torch.optim.AdamW'"),
        ("torch.nn.Linear.forwards", "did you mean 'torch.nn.Linear.forward'"),
        ("zzqqx.Task", "there is no module 'zzqqx': a file zzqqx.py of your own is looked for in the folder where"),
    ],
)
def test_near_misses(path, said):
    assert said in wrong_path(path)


@pytest.mark.parametrize("path", ["lora_lightning.LoRAModule", "torch.optim.AdamW", "torch.nn.Linear.forward"])
def test_a_path_that_leads_somewhere_is_let_be(path):
    assert wrong_path(path) is None


def test_files_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_tasks_1.py").write_text("class Judge: ...\n")
    (tmp_path / "my_broken_1.py").write_text("import nothing_here\n")
    (tmp_path / "my_broken_2.py").write_text("1 / 0\n")
    assert wrong_path("my_tasks_1.Judge") is None
    assert "did you mean 'my_tasks_1.Judge'" in wrong_path("my_tasks_1.Juge")
    assert "did you mean 'my_tasks_1'" in wrong_path("my_task_1.Judge")
    assert wrong_path("my_broken_1.X") == "'my_broken_1' cannot be imported: No module named 'nothing_here'"
    assert wrong_path("my_broken_2.X") == "'my_broken_2' cannot be imported: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "lora_lightning.SequenceClassification",
            "lora_lightning.SequenceClasification",
            "wrong.yaml, line 13: model.task: there is no 'lora_lightning.SequenceClasification'; did you mean 'lora",
        ),
        (
            "tokenizer:",
            "tokeniser:",
            "wrong.yaml, line 20: lora_lightning.TextClassificationData takes no 'tokeniser';"
            " did you mean 'tokenizer'?",
        ),
    ],
)
def test_the_command_answers_in_one_line(old, new, said, tiny, tmp_path, monkeypatch, capsys):
    config = tmp_path / "wrong.yaml"
    config.write_text(Path(tiny.config).read_text().replace(old, new))
    monkeypatch.setattr("sys.argv", ["lora-lightning", "fit", "--config", str(config)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lora-lightning: error: ")]
    assert len(lines) == 1
    assert said in lines[0]
