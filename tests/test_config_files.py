"""What is wrong in a config file is said with its line, before anything is imported for it."""

import pytest

from lora_lightning import LoRAError
from lora_lightning.cli.config_files import check_file


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "---\n", "a.yaml is empty"),
        ("a.yaml", "name: x\nlora: \0\n", "a.yaml, line 2: a character that no text holds"),
        ("a.yaml", "# one\ntrainer:\n  # max_epochs: 3\n", "a.yaml, line 2: 'trainer' holds nothing: give it keys"),
        ("a.json", '{"trainer": {"max_steps": 1}', "a.json, line 1: no YAML: while parsing a flow mapping that"),
        ("a.json", "[1, 2]", "a.json must hold keys with values, such as 'name: demo', got a list"),
        ("a.toml", "[trainer]\nmax_steps = 1\n", "a.toml, line 2: no YAML: expected '<document start>'"),
    ],
)
def test_what_is_wrong(name, text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(LoRAError) as refused:
        check_file(file.relative_to(tmp_path))
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "{}\n"),
        ("a.json", '{\n\t"trainer": {\n\t\t"max_steps": 1\n\t}\n}'),
        ("a.yaml", "ckpt_path: null\nname: x\n"),
        ("a.yaml", "save_every: null\nckpt_path: ~\n"),
    ],
    ids=["no keys", "JSON with tabs", "null beside others", "written nulls alone"],
)
def test_what_is_right(name, text, tmp_path):
    file = tmp_path / name
    file.write_text(text)
    check_file(file)
