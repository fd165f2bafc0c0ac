"""Images from a folder to files that others open: fit, test, export and predict, by transformers' and timm's models."""

import json
import random
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from lora_lightning.backbones.vision import timm_model
from lora_lightning.cli.main import LoRACLI
from tests.pictures import COLOURS, class_folders, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("images") / "set")


def config_of(file, folder, backbone, lora, **data):
    file.write_text(
        json.dumps(
            {
                "name": "pictures",
                "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
                "model": {
                    "backbone": backbone,
                    "lora": lora,
                    "task": {"class_path": "lora_lightning.tasks.classification.ImageClassification"},
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.03}},
                },
                "data": {
                    "class_path": "lora_lightning.data.images.data.ImageData",
                    "init_args": {
                        "path": str(folder), "batch_size": 6, "split": {"validation": 0.25, "test": 0.25}, **data
                    },
                },
            }
        )
    )  # fmt: skip
    return ["--config", str(file)]


def vit_of(directory):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(directory)
    return {
        "class_path": "lora_lightning.huggingface",
        "init_args": {"pretrained_model_name_or_path": str(directory), "auto_class": "AutoModelForImageClassification"},
    }


def test_a_transformers_export_opens_with_its_labels_and_its_image_processor(folder, tmp_path):
    lora = {"r": 2, "modules_to_save": ["classifier"]}
    given = config_of(tmp_path / "run.yaml", folder, vit_of(tmp_path / "vit"), lora, image_size=16, crop_share=1)
    cli = LoRACLI(args=["fit", *given])
    run = tmp_path / "runs" / "pictures" / "version_0"
    LoRACLI(args=["export", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")])
    export = run / "export"
    for name in ("adapter", "merged"):
        assert (export / name / "preprocessor_config.json").is_file()
    assert json.loads((export / "adapter" / "label_names.json").read_text()) == sorted(COLOURS)

    model = AutoModelForImageClassification.from_pretrained(export / "merged")
    processor = AutoImageProcessor.from_pretrained(export / "merged")
    files = list(cli.datamodule.tables["validation"]["image"])
    batch = next(iter(cli.datamodule.every("validation")))
    with torch.no_grad():
        theirs = model(**processor(images=[Image.open(file) for file in files], return_tensors="pt")).logits
        ours = cli.model.eval().backbone(batch["pixel_values"]).logits
    torch.testing.assert_close(theirs[: len(ours)], ours, rtol=1e-4, atol=1e-5)
    assert [model.config.id2label[i] for i in range(3)] == sorted(COLOURS)


@pytest.mark.slow
def test_a_timm_model_is_trained_tested_exported_and_asked(folder, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(timm_model("test_efficientnet", pretrained=False, num_classes=7).state_dict(), weights)
    backbone = {
        "class_path": "lora_lightning.backbones.vision.timm_model",
        "init_args": {"model_name": "test_efficientnet", "checkpoint_path": str(weights)},
    }
    lora = {"r": 2, "target_modules": ["conv_pw", "conv_pwl"], "modules_to_save": ["classifier"]}
    given = config_of(tmp_path / "run.yaml", folder, backbone, lora, image_size=32)
    cli = LoRACLI(args=["fit", *given])
    assert cli.model.backbone.classifier.out_features == 3, "the data say how many classes there are"
    assert {name for name, _ in cli.model.named_buffers() if "running" in name}
    LoRACLI(args=["test", *given, "--ckpt_path", "best"])
    LoRACLI(args=["export", *given, "--ckpt_path", "best"])
    run = tmp_path / "runs" / "pictures" / "version_0"
    report = json.loads((run / "report.json").read_text())
    assert report["w0_unchanged"]
    assert {"val_accuracy", "test_accuracy", "export_max_rel_diff"} <= set(report)
    for name in ("adapter", "merged"):
        assert json.loads((run / "export" / name / "label_names.json").read_text()) == sorted(COLOURS)

    plain = timm_model("test_efficientnet", pretrained=False, num_classes=3).eval()
    plain.load_state_dict(load_file(run / "export" / "merged" / "model.safetensors"))
    batch = next(iter(cli.datamodule.test_dataloader()))
    with torch.no_grad():
        expected = plain(batch["pixel_values"]).softmax(-1)
    loose = tmp_path / "loose"
    loose.mkdir()
    for i in range(2):
        picture(random.Random(i), "red").save(loose / f"{i}.png")
    LoRACLI(args=["predict", "--ckpt_path", "runs/pictures"])
    rows = [json.loads(line) for line in (run / "predict" / "predictions.jsonl").read_text().splitlines()]
    torch.testing.assert_close(
        torch.tensor([row["probabilities"] for row in rows])[: len(expected)], expected, rtol=1e-3, atol=1e-4
    )
    assert all(row["label"] == sorted(COLOURS)[row["prediction"]] for row in rows)
    LoRACLI(args=["predict", "--ckpt_path", "runs/pictures", "--data.path", f"{{predict: {loose}}}"])
    assert len((run / "predict" / "predictions.jsonl").read_text().splitlines()) == 2


def test_a_start_that_is_measured_on_images_takes_them_by_the_backbones_own_name(folder, tmp_path):
    backbone = {
        "class_path": "lora_lightning.backbones.vision.timm_model",
        "init_args": {"model_name": "test_vit", "pretrained": False, "model_kwargs": {"img_size": 32}},
    }
    lora = {"r": 2, "init": "eva", "modules_to_save": ["head"]}
    given = config_of(tmp_path / "run.yaml", folder, backbone, lora, image_size=32)
    cli = LoRACLI(args=["fit", *given, "--trainer.fast_dev_run", "1"])
    assert cli.trainer.global_step == 1


def test_without_torchvision_one_line_says_what_to_install(tmp_path):
    config_of(tmp_path / "run.yaml", tmp_path, vit_of(tmp_path / "vit"), {"r": 2})
    code = (
        "import sys, lora_lightning.cli.main, lora_lightning.backbones.huggingface;"
        "from lora_lightning.__main__ import main;"
        "[sys.modules.pop(name) for name in list(sys.modules) if name.partition('.')[0] == 'torchvision'];"
        "sys.modules['torchvision'] = None;"
        "sys.argv = ['lora-lightning', 'fit', '-c', 'run.yaml']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("lora-lightning: error: ")
    assert "images need torchvision and pillow: pip install 'lora_lightning[vision]'" in last
