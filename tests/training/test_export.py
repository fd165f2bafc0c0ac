"""What is exported is what was trained, or nothing is left behind."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_lightning import LoRAConfig, LoRAError, load_adapter
from lora_lightning.lora.adapter import adapter_tensors
from lora_lightning.lora.errors import MergeError
from lora_lightning.training import export as export_module
from lora_lightning.training import proof
from lora_lightning.training.export import export
from tests.training.test_module import Vision


@pytest.fixture
def moved(make_module):
    """A backbone of one's own whose adapter is away from zero."""
    module = make_module(Vision(), LoRAConfig(r=2, modules_to_save=["head"]))
    with torch.no_grad():
        for tensor in adapter_tensors(module.backbone).values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    module.eval()
    return module


BATCH = {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), "labels": torch.zeros(5).long()}


def test_a_plain_module_becomes_tensors_under_its_own_keys(moved, tmp_path):
    expected = moved.backbone(BATCH["x"])
    report = export(moved, tmp_path / "out", batch=BATCH)
    plain = Vision().eval()
    plain.load_state_dict(load_file(tmp_path / "out" / "merged" / "model.safetensors"), strict=True)
    torch.testing.assert_close(plain(BATCH["x"]), expected, rtol=1e-5, atol=1e-6)
    assert report.w0_unchanged
    assert report.max_rel_diff < 1e-5
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["trainable"] == moved.report.trainable


def test_an_export_says_what_the_classes_mean(moved, tmp_path):
    export(moved, tmp_path / "out", batch=BATCH, label_names=["bad", "good"])
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["label_names"] == ["bad", "good"]


def test_the_exported_adapter_loads_onto_the_plain_backbone(moved, tmp_path):
    export(moved, tmp_path / "out", batch=BATCH, formats=["adapter"])
    plain = Vision().eval()
    plain.load_state_dict({k: v for k, v in moved.backbone.state_dict().items() if ".lora_" not in k})
    load_adapter(plain, tmp_path / "out" / "adapter")
    assert torch.equal(plain(BATCH["x"]), moved.backbone(BATCH["x"]))
    assert not (tmp_path / "out" / "merged").exists()


def test_export_leaves_the_module_adapted_and_in_its_modes(moved, tmp_path):
    moved.backbone.body.train()
    before = {k: v.clone() for k, v in moved.state_dict().items()}
    export(moved, tmp_path / "out", batch=BATCH)
    assert moved.backbone.body.training
    assert not moved.backbone.head.training
    assert all(torch.equal(before[k], v) for k, v in moved.state_dict().items())


def test_exporting_twice_gives_the_same_bytes(moved, tmp_path):
    for name in ("a", "b"):
        export(moved, tmp_path / name, batch=BATCH)
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged/model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_merge_that_is_wrong_fails_and_leaves_the_older_export(moved, tmp_path, monkeypatch):
    export(moved, tmp_path / "out", batch=BATCH)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    real = proof.merge

    def off(model, **kwargs):
        report = real(model, **kwargs)
        model.body[0].weight[0, 0] += 0.01
        return report

    monkeypatch.setattr(proof, "merge", off)
    with pytest.raises(MergeError, match="the merged model differs from the adapted one by"):
        export(moved, tmp_path / "out", batch=BATCH)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_adapter_that_is_wrong_on_disk_fails(moved, tmp_path, monkeypatch):
    real = export_module.save_adapter

    def off(model, folder, **kwargs):
        scale = model.body[0].lora_B.data
        scale.mul_(1.5)
        real(model, folder, **kwargs)
        scale.div_(1.5)

    monkeypatch.setattr(export_module, "save_adapter", off)
    with pytest.raises(MergeError, match="the adapter read back differs from the adapted one by"):
        export(moved, tmp_path / "out", batch=BATCH, formats=["adapter"])
    assert not (tmp_path / "out").exists()


def test_a_moved_w0_is_not_exported(moved, tmp_path):
    moved.w0_fingerprint()
    with torch.no_grad():
        moved.backbone.body[4].weight[0, 0] += 1
    with pytest.raises(MergeError, match=r"W0 moved.*body\.4\.weight"):
        export(moved, tmp_path / "out", batch=BATCH)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_files_is_left_alone(moved, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(LoRAError, match="holds files that are not an export"):
        export(moved, tmp_path, batch=BATCH)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_an_unknown_format_names_the_known(moved, tmp_path):
    with pytest.raises(LoRAError, match="unknown export format 'merge'; did you mean 'merged'"):
        export(moved, tmp_path / "out", batch=BATCH, formats=["merge"])


def test_half_precision_is_held_to_its_own_rule(make_module, tmp_path):
    module = make_module(Vision().to(torch.bfloat16), LoRAConfig(r=2))
    with torch.no_grad():
        for tensor in adapter_tensors(module.backbone).values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    report = export(module, tmp_path / "out", batch={"x": BATCH["x"].bfloat16()})
    assert 1e-5 < report.tolerance < 0.2
    assert all(0 < kept < 1 for kept in report.kept.values())
    assert load_file(tmp_path / "out" / "merged" / "model.safetensors")["body.0.weight"].dtype == torch.bfloat16
