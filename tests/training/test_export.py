"""What is exported is what was trained, or nothing is left behind."""

import errno
import gc
import json
import os
import warnings

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file, load_model
from torch import nn

from lora_lightning import (
    LoRAConfig,
    LoRAError,
    LoRAModule,
    MultiLabelClassification,
    SequenceClassification,
    SequenceRegression,
    huggingface,
    merge,
    save_adapter,
)
from lora_lightning.export import verification as proof
from lora_lightning.export.export import bytes_needed
from lora_lightning.export.model_files import write_tensors
from lora_lightning.lora.errors import MergeError
from lora_lightning.reports.console import report_rows
from lora_lightning.training.callbacks.export_on_fit_end import record_export
from tests.factories import export_of, llama
from tests.training.small import Vision, shaken


@pytest.fixture
def moved(make_module):
    """A backbone of one's own whose adapter is away from zero."""
    return shaken(make_module(Vision(), LoRAConfig(r=2, modules_to_save=["head"])))


TEXTS = {"input_ids": torch.arange(1, 13).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
BATCH = {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), "labels": torch.zeros(5).long()}


def merged_in(folder):
    return load_file(folder / "merged" / "model.safetensors")


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_export_leaves_the_module_adapted_and_in_its_modes_and_is_the_same_bytes_again(moved, tmp_path):
    moved.backbone.body.train()
    before = {k: v.clone() for k, v in moved.state_dict().items()}
    for name in ("a", "b"):
        export_of(moved, tmp_path / name, BATCH)
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged/model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert moved.backbone.body.training
    assert not moved.backbone.head.training
    assert all(torch.equal(before[k], v) for k, v in moved.state_dict().items())


def merge_of_another_weight(model, **options):
    report = merge(model, **options)
    model.body[0].weight.data[0, 0] += 0.01
    return report


def adapter_of_another_scale(model, folder, **options):
    scale = model.body[0].lora_B.data
    scale.mul_(1.5)
    save_adapter(model, folder, **options)
    scale.div_(1.5)


def tensors_less_one(file, tensors, *args):
    write_tensors(file, {k: tensors[k] for k in tensors if k != "head.bias"}, *args)


WRONG = {
    "verification.merge": (merge_of_another_weight, "the merged model differs from the adapted one by"),
    "export.save_adapter": (adapter_of_another_scale, "the adapter read back differs from the adapted one by"),
    "model_files.write_tensors": (tensors_less_one, "the merged model read back differs"),
}


@pytest.mark.parametrize("place", WRONG)
def test_a_merge_that_is_wrong_fails_and_leaves_the_older_export(place, moved, tmp_path, monkeypatch):
    """In memory, and in the files of either."""
    export_of(moved, tmp_path / "out", BATCH)
    before = files_in(tmp_path / "out")
    off, said = WRONG[place]
    monkeypatch.setattr(f"lora_lightning.export.{place}", off)
    with pytest.raises(MergeError, match=said):
        export_of(moved, tmp_path / "out", BATCH)
    assert files_in(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_moved_w0_is_not_exported(moved, tmp_path):
    moved.w0_fingerprint()
    moved.backbone.body[4].weight.data[0, 0] += 1
    with pytest.raises(MergeError, match=r"W0 moved.*body\.4\.weight"):
        export_of(moved, tmp_path / "out", BATCH)
    assert not (tmp_path / "out").exists()


def test_a_merged_transformer_opens_in_shards_with_tokenizer_head_and_labels(make_module, tiny, tmp_path):
    module = shaken(make_module(lora=LoRAConfig(r=4, modules_to_save=["classifier"])))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.bert)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    options = {"tokenizer": tokenizer, "label_names": ["fresh", "rotten"], "max_shard_size": "20KB"}
    report = export_of(module, tmp_path / "out", TEXTS, **options)
    merged = tmp_path / "out" / "merged"
    shards = sorted(merged.glob("model-*.safetensors"))
    assert len(shards) == report.merged_files > 2
    assert report.merged_bytes == sum(file.stat().st_size for file in shards)
    found = transformers.AutoModelForSequenceClassification.from_pretrained(merged).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(merged)(["the film is lovely"], return_tensors="pt")
    torch.testing.assert_close(found(**tokens).logits, module.backbone(**tokens).logits, rtol=1e-5, atol=1e-6)
    assert (merged / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert found.config.id2label == {0: "fresh", 1: "rotten"}
    assert module.backbone.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}, "the trained model is left as it is"


@pytest.mark.parametrize(
    ("task", "scores"),
    [
        (MultiLabelClassification(3), torch.sigmoid),
        (SequenceRegression(), lambda numbers: numbers),
        (SequenceClassification(3), lambda numbers: numbers.softmax(-1)),
    ],
    ids=["labels", "number", "label"],
)
def test_transformers_pipeline_says_what_the_task_predicts(task, scores, tiny, tmp_path):
    outputs = 1 if isinstance(task, SequenceRegression) else 3
    backbone = huggingface(tiny.bert, num_labels=outputs)
    backbone.config.problem_type = "multi_label_classification"  # a trace of what it was trained for before
    module = shaken(LoRAModule(backbone, task, LoRAConfig(r=4, modules_to_save=["classifier"])))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.bert)
    export_of(module, tmp_path / "out", TEXTS, tokenizer=tokenizer)
    pipe = transformers.pipeline("text-classification", str(tmp_path / "out" / "merged"), top_k=None, device="cpu")
    found = {said["label"]: said["score"] for said in pipe(["the film is warm"])[0]}
    with torch.no_grad():
        expected = scores(backbone(**tokenizer("the film is warm", return_tensors="pt")).logits[0])
    assert [found[f"LABEL_{i}"] for i in range(outputs)] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_language_model_keeps_its_ties_and_how_it_generates(make_module, tmp_path):
    backbone = llama(tie_word_embeddings=True)
    backbone.generation_config.update(do_sample=True, top_k=7)
    backbone.config._name_or_path = ""
    module = shaken(make_module(backbone, LoRAConfig(r=2)), 0.3)
    report = export_of(module, tmp_path / "out", TEXTS)
    assert "lm_head.weight" not in merged_in(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.generation_config.top_k == 7
    x = torch.arange(1, 9)[None]
    torch.testing.assert_close(again(x).logits, module.backbone(x).logits, rtol=1e-5, atol=1e-6)
    assert report.compared["the merged model read back"].outputs == 5, "logits, and keys and values of two layers"
    backbone.generation_config.do_sample = False
    with pytest.raises(MergeError, match=r"transformers does not save the merged model: (?s:.*)top_k"):
        export_of(module, tmp_path / "refused", TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


VIT = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
VISION = {
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", **VIT), "all-linear"),
    "torchvision vit": (lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64), "all-linear"),
    "torchvision resnet": (lambda: torchvision.models.resnet18(num_classes=3), ["conv1", "conv2"]),
}


@pytest.mark.parametrize("kind", VISION)
def test_timm_and_torchvision_models_become_tensors_under_their_own_keys(kind, make_module, tmp_path):
    make, targets = VISION[kind]
    backbone = make().to(memory_format=torch.channels_last)
    module = shaken(make_module(backbone, LoRAConfig(r=2, target_modules=targets)), 0.05)
    report = export_of(module, tmp_path / "out", {"x": torch.randn(2, 3, 32, 32)}, label_names=["a", "b", "c"])
    tensors = merged_in(tmp_path / "out")
    plain = make().eval()
    assert tensors.keys() == plain.state_dict().keys()
    plain.load_state_dict(tensors)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), module.backbone(x), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out" / "merged" / "label_names.json").read_text()) == ["a", "b", "c"]
    assert report.w0_unchanged
    assert report.max_rel_diff <= 1e-5


class Tied(nn.Module):
    """Two names for one weight, a view into another's memory, a transposed weight, and an empty buffer."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.out.weight = self.embed.weight
        self.body.weight = nn.Parameter(torch.randn(6, 6).t())
        self.register_buffer("whole", torch.randn(4, 6))
        self.register_buffer("part", self.whole[1:3])
        self.register_buffer("none", torch.zeros(0))

    def forward(self, ids):
        return self.out(self.body(self.embed(ids)) + self.part.sum(0) + self.whole.mean())


def test_a_plain_module_with_ties_views_and_strides_reads_back_as_it_was(make_module, tmp_path):
    module = shaken(make_module(Tied(), LoRAConfig(r=2, target_modules=["body"])))
    ids = torch.arange(9)
    export_of(module, tmp_path / "out", {"ids": ids})
    file = tmp_path / "out" / "merged" / "model.safetensors"
    assert load_file(file).keys() == {"embed.weight", "body.weight", "body.bias", "whole", "none"}
    plain = Tied().eval()
    with torch.no_grad():
        plain.embed.weight.zero_()
    assert load_model(plain, file) == (set(), [])
    assert plain.out.weight is plain.embed.weight
    torch.testing.assert_close(plain(ids), module.backbone(ids), rtol=1e-5, atol=1e-6)


def test_float32_takes_the_whole_update_of_a_half_precision_base(make_module, tmp_path):
    module = shaken(make_module(Vision().to(torch.bfloat16), LoRAConfig(r=2, modules_to_save=["head"])), 0.01)
    batch = {"x": BATCH["x"].bfloat16()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = export_of(module, tmp_path / "out", batch, dtype="float32")
    tensors = merged_in(tmp_path / "out")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    layer = module.backbone.body[0]
    wanted = layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(tensors["body.0.weight"].double(), wanted, rtol=1e-6, atol=1e-9)
    assert torch.equal(tensors["head.weight"], module.backbone.head.lora_copy.weight), "not by way of bfloat16"
    assert report.dtype == "float32"
    assert min(report.kept.values()) > 0.999
    backbone = module.backbone
    asked = bytes_needed(backbone, ["merged"], torch.float32) - bytes_needed(backbone, ["adapter"], torch.float32)
    assert 0 <= report.merged_bytes - asked < 2000, "the space asked for is what the files take, but for a header"


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 1e-3), ("float16", 1e-4)])
def test_what_rounding_erased_is_told_with_the_way_out(dtype, size, make_module, tmp_path):
    module = shaken(make_module(Vision(), LoRAConfig(r=2, modules_to_save=["head"])), size)
    with pytest.warns(UserWarning, match=rf"{dtype} kept less than 90%.* in 2 of 2 layers.*--dtype float32") as said:
        report = export_of(module, tmp_path / "out", BATCH, dtype=dtype)
    assert len(said) == 1
    tensors, low = merged_in(tmp_path / "out"), getattr(torch, dtype)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {low}
    for name, share in report.kept.items():
        layer = module.backbone.get_submodule(name)
        update = 2 * layer.lora_B.double() @ layer.lora_A.double()
        lost = tensors[f"{name}.weight"].double() - layer.weight.double() - update
        assert share == pytest.approx(max(0.0, 1 - float(lost.norm() / update.norm())), abs=1e-3)
    assert layer.weight.dtype == torch.float32, "the trained model stays as it is"


def test_a_quantized_base_becomes_plain_and_is_said(make_module, tmp_path):
    pytest.importorskip("bitsandbytes")
    from tests.lora.test_quantized import QUANTISED, base, inputs

    backbone = base("nf4")
    module = shaken(make_module(backbone, LoRAConfig(r=2, target_modules=["up", "square"], modules_to_save=["head"])))
    report = export_of(module, tmp_path / "out", {"x": inputs()})
    assert sorted(report.dequantized) == sorted(QUANTISED), "one of them without an adapter"
    assert report.rule == "for 4-bit products in float32"
    tensors = merged_in(tmp_path / "out")
    assert tensors["down.weight"].shape == (64, 128)
    assert bytes_needed(module.backbone, ["merged"], None) > sum(t.nbytes for t in tensors.values())


def test_a_limit_on_file_sizes_is_one_line_with_its_cure_and_leaves_nothing(moved, tmp_path, monkeypatch):
    def refuses(*args, **kwargs):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr("lora_lightning.export.model_files.write_tensors", refuses)
    with pytest.raises(LoRAError, match=r"limit on file sizes.*nothing was.*ulimit -f.*--max_shard_size") as refused:
        export_of(moved, tmp_path / "out", BATCH)
    assert f"'{tmp_path / 'out'}'" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("formats", [["adapter"], ["adapter", "merged"]], ids="+".join)
def test_there_is_never_more_than_one_other_copy_of_w0(formats, make_module, tmp_path, monkeypatch):
    """The adapter is read back onto the same W0; a merged transformer is let go before its files are read."""
    module, real, alive = make_module(), proof.outputs, []
    shape = module.backbone.get_input_embeddings().weight.shape

    def counted(model, inputs):
        gc.collect()
        tables = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.shape == shape]
        alive.append(len({t.data_ptr() for t in tables}))
        return real(model, inputs)

    monkeypatch.setattr(proof, "outputs", counted)
    gc.freeze()  # what was there before is not counted
    try:
        export_of(module, tmp_path / "out", TEXTS, formats=formats)
    finally:
        gc.unfreeze()
    assert max(alive) == len(formats) - 1


def test_a_runs_report_is_of_its_latest_export(make_module, moved, tmp_path):
    merged = record_export(tmp_path, export_of(moved, tmp_path / "out", BATCH, formats=["merged"]))
    assert (merged["merged_dir"], merged["adapter_dir"]) == (str(tmp_path / "out" / "merged"), None)
    told = record_export(tmp_path, export_of(moved, tmp_path / "a", BATCH, formats=["adapter"]))
    assert (told["merged_dir"], told["adapter_dir"]) == (None, str(tmp_path / "a" / "adapter"))
    assert not (tmp_path / "a" / "merged").exists()
    assert dict(report_rows(merged))["W0 before, after"].endswith("unchanged")
    assert "adapter read back" in dict(report_rows(told))
