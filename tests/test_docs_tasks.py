"""docs/tasks.md is true: its rows are read by the DataModules that it names, and every name is there."""

import re

import pytest
import yaml

import lora_lightning
from tests.chats import CHATML
from tests.command.process import REPOSITORY
from tests.recipes.recipe import parse
from tests.tiny_lm import make_lm

PAGE = (REPOSITORY / "docs" / "tasks.md").read_text()
PAIRS = re.findall(r"^```json\n(.*?)^```\n+```yaml\n(.*?)^```", PAGE, flags=re.S | re.M)


def test_every_name_of_ours_on_the_page_is_there():
    names = set(re.findall(r"lora_lightning\.(\w+)", PAGE)) | set(
        re.findall(r"`([A-Z]\w+(?:Data|Classification))`", PAGE)
    )
    assert len(names) > 15
    assert [name for name in sorted(names) if not hasattr(lora_lightning, name)] == []


def test_every_task_and_data_module_is_on_the_page():
    public = [
        name
        for name in lora_lightning.__all__
        if name.endswith("Data") or hasattr(getattr(lora_lightning, name), "monitor")
    ]
    assert [name for name in public if f"`{name}`" not in PAGE and f"lora_lightning.{name}" not in PAGE] == []


@pytest.mark.parametrize(("rows", "config"), PAIRS, ids=[re.search(r"\.(\w+Data)", c)[1] for _, c in PAIRS])
def test_rows_of_the_page_become_batches(rows, config, tmp_path, tiny):
    file = tmp_path / "mine.jsonl"
    file.write_text(rows * 10)
    data = yaml.safe_load(config)["data"]
    cls = getattr(lora_lightning, data["class_path"].rpartition(".")[2])
    tokenizer = tiny.bert
    if "CausalLM" in config or "Seq2Seq" in config:
        tokenizer = str(make_lm(tmp_path / "lm"))
    extra = {"chat_template": CHATML} if cls.__name__ == "ChatData" else {}
    module = cls(**data["init_args"] | {"path": str(file), "tokenizer": tokenizer, "batch_size": 4, **extra})
    module.prepare_data()
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert {"input_ids", "anchor"} & set(batch)
    assert len(list(module.val_dataloader())) > 0


@pytest.mark.slow  # the whole parser for each
@pytest.mark.parametrize(
    "config", re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.S | re.M), ids=re.findall(r"\.(\w+Data)$", PAGE, re.M)
)
def test_a_config_of_the_page_is_parsed(config, tmp_path):
    content = yaml.safe_load(config)
    bare = {"pretrained_model_name_or_path": "x"} | content["model"].get("backbone", {}).get("init_args", {})
    content["model"]["backbone"] = {"class_path": "lora_lightning.huggingface", "init_args": bare}
    (tmp_path / "page.yaml").write_text(yaml.safe_dump(content))
    assert parse([tmp_path / "page.yaml"]).data.class_path
