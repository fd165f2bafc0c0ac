"""Every kind of run through the whole command: fit, validate, test, predict, export, and others open what came out."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from PIL import Image

from lora_lightning.cli.main import LoRACLI
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.process import mistake
from tests.data.files import write
from tests.pictures import COLOURS, class_folders
from tests.tiny import BAD, GOOD, PLAIN, make_bert
from tests.tiny_pairs import make_llama, preferences
from tests.tiny_text import make_model, make_tagger, restaurants, sentences

HERE = "tests.command.own_data"


@dataclass
class Run:
    """What stands in the config, over a model and rows that `make` writes into a folder; what then holds."""

    task: str
    make: Callable[[Any], Any]
    data: str = "DatasetData"
    auto: str | None = None
    backbone: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    task_args: dict[str, Any] = field(default_factory=dict)
    data_args: dict[str, Any] = field(default_factory=dict)
    predict: str = ""
    """The only column of the rows that are predicted, in a file of their own; without it those of the test."""
    epochs: int = 1
    peft: str | None = None
    check: Callable[[Any], None] = lambda done: None


def texts(make, rows):
    """48 rows: 32 to train on, the others to validate, test and predict."""
    return lambda folder: (make(folder / "model"), rows(48))[1]


def tagged(done):
    for line, row in zip(done.written, done.rows, strict=True):
        assert line["words"] == row["tokens"]
        assert len(line["labels"]) == len(row["tokens"])
        for entity in line["entities"]:
            assert entity["text"] == " ".join(row["tokens"][entity["start"] : entity["end"]])
    names = {0: "O", 1: "B-AREA", 2: "B-FOOD", 3: "B-NAME", 4: "I-NAME"}
    assert transformers.AutoConfig.from_pretrained(done.out / "merged").id2label == names


def preferred(done):
    assert done.seen["val/accuracy"] == done.seen["test/accuracy"] == 1.0
    assert done.seen["val/loss"] < 0.4, "log 2 before"
    margin = done.seen["test/chosen_reward"] - done.seen["test/rejected_reward"]
    assert done.seen["test/margin"] == pytest.approx(margin, rel=1e-4)
    assert all(row["chosen_preferred"] and row["chosen_reward"] > row["rejected_reward"] for row in done.written)
    assert "val_margin" in done.report


def embedded(done):
    assert done.seen["val/recall@5"] > 0.5, "of 28 candidates"
    assert {"test/loss", "test/mrr", "test/recall@1", "val/mrr"} <= set(done.seen)
    assert len(done.written[0]["embedding"]) == len(done.written[0]["positive_embedding"]) == 32
    assert sum(x * x for x in done.written[0]["embedding"]) == pytest.approx(1, rel=1e-5)


def opens_in_transformers(done):
    for name in ("adapter", "merged"):
        assert (done.out / name / "preprocessor_config.json").is_file()
    assert json.loads((done.out / "adapter" / "label_names.json").read_text()) == sorted(COLOURS)
    model = transformers.AutoModelForImageClassification.from_pretrained(done.out / "merged")
    processor = transformers.AutoImageProcessor.from_pretrained(done.out / "merged")
    data = done.cli.datamodule
    files = list(data.tables["validation"]["image"])
    with torch.no_grad():
        theirs = model(**processor(images=[Image.open(file) for file in files], return_tensors="pt")).logits
        ours = done.cli.model.eval().backbone(next(iter(data.every("validation")))["pixel_values"]).logits
    torch.testing.assert_close(theirs[: len(ours)], ours, rtol=1e-4, atol=1e-5)
    assert [model.config.id2label[i] for i in range(3)] == sorted(COLOURS)


def make_vit(folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "model")
    return class_folders(folder / "set")


def told_apart(folder):
    """A film and a story are of one pair where they share a word."""
    make_bert(folder / "model")
    words = [(a, p) for a in GOOD + BAD for p in PLAIN if a != p]
    return [{"anchor": f"{a} film {p} story", "positive": f"the {p} end is {a}"} for a, p in words]


def own(name):
    return {"class_path": f"{HERE}.{name}"}


def sets(name):
    return {split: own(name) for split in ("train", "validation", "test")}


WRITES = {"generation": {"max_new_tokens": 8, "num_beams": 2}}
SPLIT = {"split": {"validation": 0.25, "test": 0.25}}
IMAGES = SPLIT | {"batch_size": 6}
RUNS = {
    "tagger": Run(
        "TokenClassification", texts(make_tagger, sentences), "TokenClassificationData", "TokenClassification",
        lora={"modules_to_save": ["classifier"]}, predict="tokens", epochs=2, peft="TOKEN_CLS", check=tagged,
    ),
    "pairs": Run(
        "SequenceToSequence", texts(lambda f: make_model("t5", f), restaurants), "SequenceToSequenceData", "Seq2SeqLM",
        task_args=WRITES, data_args={"source_column": "context", "target_column": "completion"}, predict="context",
        peft="SEQ_2_SEQ_LM", check=lambda done: [line["prediction"] + "" for line in done.written],
    ),
    "answers": Run(
        "PreferenceTuning", lambda f: (make_llama(f / "model"), preferences(64))[1], "PreferenceData", "CausalLM",
        task_args={"beta": 0.5}, data_args=SPLIT | {"as_chat": True, "batch_size": 16}, epochs=6, peft="CAUSAL_LM",
        check=preferred,
    ),
    "embeddings": Run(
        "ContrastiveEmbedding", told_apart, "PairData", "", lora={"exclude_modules": ["pooler.dense"]}, epochs=4,
        data_args=SPLIT | {"batch_size": 16, "eval_batch_size": 5}, peft="FEATURE_EXTRACTION", check=embedded,
    ),
    "pictures": Run(
        "ImageClassification", lambda f: None, backbone=own("Net"), lora={"r": 2, "target_modules": ["1"]},
        task_args={"num_classes": 4}, data_args=sets("Pictures"),
    ),
    "vit": Run(
        "ImageClassification", make_vit, "ImageData", "ImageClassification", lora={"modules_to_save": ["classifier"]},
        data_args=IMAGES | {"image_size": 16, "crop_share": 1}, check=opens_in_transformers,
    ),
}  # fmt: skip
QUICK = ("tagger", "pictures", "vit")


def config_of(name, folder):
    """The file of a run, with its model and rows beside it; and the rows that are held out."""
    run = RUNS[name]
    made, data, held_out = run.make(folder), {"batch_size": 8, **run.data_args}, None
    auto = f"AutoModelFor{run.auto}".removesuffix("For")
    given = {"pretrained_model_name_or_path": str(folder / "model"), "auto_class": auto}
    backbone = run.backbone or {"class_path": "lora_lightning.huggingface", "init_args": given}
    if run.data not in ("DatasetData", "ImageData"):
        data["tokenizer"] = str(folder / "model")
    if run.predict:
        held_out, only = made[32:], [{run.predict: row[run.predict]} for row in made[32:]]
        parts = {"train": made[:32], "validation": held_out, "test": held_out, "predict": only}
        data["path"] = {split: str(write(folder / f"{split}.jsonl", rows)) for split, rows in parts.items()}
    elif made is not None:
        data["path"] = str(write(folder / "rows.jsonl", made) if isinstance(made, list) else made)
    config = {
        "name": name,
        "seed_everything": 7,
        "trainer": {"max_epochs": run.epochs, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "backbone": backbone,
            "lora": {"r": 4, **run.lora},
            "task": {"class_path": f"lora_lightning.{run.task}", "init_args": run.task_args},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
        },
        "data": {"class_path": f"lora_lightning.{run.data}", "init_args": data},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "run.yaml"), held_out


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in RUNS])
def test_a_run_from_fit_to_export(name, tmp_path):
    run, (config, rows) = RUNS[name], config_of(name, tmp_path)
    cli = LoRACLI(args=["fit", "--config", config])
    folder, monitor = tmp_path / "runs" / name / "version_0", cli.model.task.monitor
    assert cli.trainer.checkpoint_callback.monitor == monitor
    assert monitor in cli.trainer.callback_metrics
    assert load_checkpoint(folder / "checkpoints" / "best.ckpt")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    if name == "pictures":
        assert saved["model"]["task"]["init_args"].items() >= run.task_args.items(), "a count that a user gave"
    seen = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}

    def again(command, *args):
        done = LoRACLI(args=[command, "--ckpt_path", str(folder), *args])
        seen.update({key: float(value) for key, value in done.trainer.callback_metrics.items()})
        lines = next(folder.rglob("predictions.jsonl")).read_text().splitlines() if command == "predict" else []
        return [json.loads(line) for line in lines]

    again("validate"), again("test")
    written = again("predict")
    assert {key[4:] for key in seen if key.startswith("val/")} == {key[5:] for key in seen if key.startswith("test/")}
    if rows is not None:  # validation and test hold the same rows
        assert {k[4:]: v for k, v in seen.items() if k[:4] == "val/"} == pytest.approx(
            {k[5:]: v for k, v in seen.items() if k[:5] == "test/"}
        )
        assert len(written) == len(rows)
    assert [row["row"] for row in written] == list(range(len(written)))
    again("export")
    report, out = json.loads((folder / "report.json").read_text()), folder / "export"
    assert report["w0_unchanged"]
    assert report["export_max_rel_diff"] < 1e-5
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["task_type"] == run.peft
    run.check(SimpleNamespace(**locals()))
    if run.auto and run.peft not in (None, "FEATURE_EXTRACTION"):
        opens_in_peft(run, tmp_path, out)
    if name == "pictures":
        LoRACLI(args=["fit", "--config", str(folder / "config.yaml")])


def opens_in_peft(run, folder, out):
    auto = getattr(transformers, f"AutoModelFor{run.auto}")
    merged = auto.from_pretrained(out / "merged").eval()
    options = {"num_labels": merged.config.num_labels} if run.peft == "TOKEN_CLS" else {}
    theirs = PeftModel.from_pretrained(auto.from_pretrained(folder / "model", **options), out / "adapter").eval()
    ids = {"input_ids": torch.tensor([[3, 7, 5, 1]])}
    if run.peft == "SEQ_2_SEQ_LM":
        ids["decoder_input_ids"] = torch.tensor([[0, 4]])
    with torch.no_grad():
        torch.testing.assert_close(merged(**ids).logits, theirs(**ids).logits, rtol=1e-4, atol=1e-5)


def test_a_count_that_nobody_gave_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RUNS["pictures"].__dict__, "task_args", {})
    said = mistake(monkeypatch, capsys, "fit", "--config", config_of("pictures", tmp_path)[0])
    assert "model.task.init_args.num_classes" in said
    assert "TypeError" not in said


def test_a_start_that_is_measured_on_images_takes_them_by_the_backbones_own_name(tmp_path, monkeypatch):
    backbone = {"model_name": "test_vit", "pretrained": False, "model_kwargs": {"img_size": 32}}
    RUNS["measured"] = Run(
        "ImageClassification", lambda f: class_folders(f / "set"), "ImageData", data_args=IMAGES | {"image_size": 32},
        backbone={"class_path": "lora_lightning.timm_model", "init_args": backbone},
        lora={"r": 2, "init": "eva", "modules_to_save": ["head"]},
    )  # fmt: skip
    cli = LoRACLI(args=["fit", "--config", config_of("measured", tmp_path)[0], "--trainer.fast_dev_run", "1"])
    assert cli.trainer.global_step == 1


def test_without_torchvision_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("lora_lightning.data.images")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    said = mistake(monkeypatch, capsys, "fit", "--config", config_of("vit", tmp_path)[0])
    assert said.startswith("images need torchvision and pillow: pip install 'lora_lightning[vision]'")
