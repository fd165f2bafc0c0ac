"""What is wrong in a config file is said with its line, before anything is imported for it."""

import pytest

from lora_lightning import LoRAError
from lora_lightning.cli.config_files import check_file


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.yaml",
            "name: x\nseed_everything: ${oc.env:SEED}\n",
            "a.yaml, line 2: a config has no variables such as ${oc.env:SEED}",
        ),
        (
            "a.yaml",
            "model:\n  lora:\n    target_modules:\n      - ${oc.env:WHICH}\n",
            "a.yaml, line 4: a config has no variables such as ${oc.env:WHICH}",
        ),
        ("a.yaml", "---\n", "a.yaml is empty"),
        ("a.yaml", "name: x\nlora: \0\n", "a.yaml, line 2: a character that no text holds"),
        ("a.yaml", "# one\ntrainer:\n  # max_epochs: 3\n", "a.yaml, line 2: 'trainer' holds nothing: give it keys"),
        ("a.json", '{"trainer": {"max_steps": 1}', "a.json, line 1: a list or map in brackets lacks a comma or its"),
        ("a.json", "[1, 2]", "a.json must hold keys with values, such as 'name: demo', got a list"),
        ("a.toml", "[trainer]\nmax_steps = 1\n", "a.toml, line 2: a config is YAML: 'key: value' in each line"),
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
        ("a.yaml", "data:\n  init_args:\n    prompt: 'It costs ${price}.'\n"),
    ],
    ids=["no keys", "JSON with tabs", "null beside others", "written nulls alone", "a dollar in a text"],
)
def test_what_is_right(name, text, tmp_path):
    file = tmp_path / name
    file.write_text(text)
    check_file(file)
