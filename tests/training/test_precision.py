"""Precision in one word: what each part's dtype is, and that the laws hold over a narrow W0."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import nn

from lora_lightning import Checkpoints, FreezeBase, LoRAConfig, LoRAError, huggingface, inject
from lora_lightning.cli.config_overrides import NF4, set_precision
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.frozen.dtype import base_dtypes, base_floats, cast_base
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.frozen.tensors import adapter_tensors, base_tensors
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from lora_lightning.training.precision import HalfBase, convert, load_dtypes
from lora_lightning.training.trainer import LoRATrainer
from tests.factories import hf, move, output
from tests.training.small import Vision, fit, loader, trainer_of

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
EXPERTS = {"moe_intermediate_size": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
GROUPS = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
KINDS = {
    "bert": ("BertForSequenceClassification", SIZES),
    "llama": ("LlamaForCausalLM", SIZES | {"num_key_value_heads": 1}),
    "batch statistics": ("ResNetForImageClassification", RESNET),
    "a router in float32": ("Dots1ForCausalLM", SIZES | EXPERTS | GROUPS),
}
TARGETS = {"batch statistics": ["convolution"]}


def quiet(tmp_path, precision="bf16-base", **options):
    own = {"callbacks": [FreezeBase(show_table=False)], "devices": 1, "precision": precision}
    return trainer_of(tmp_path, LoRATrainer, **own | options)


@pytest.mark.parametrize("kind", KINDS)
def test_cast_and_loaded_in_bfloat16_are_one_base(kind, tmp_path):
    name, sizes = KINDS[kind]
    hf(name, **sizes).save_pretrained(tmp_path)
    wide, narrow = (getattr(transformers, name).from_pretrained(tmp_path, dtype=d) for d in (None, torch.bfloat16))
    for model in (wide, narrow):
        inject(model, LoRAConfig(r=2, use_dora=kind == "bert", target_modules=TARGETS.get(kind, "all-linear")))
    adapter = {k: v.clone() for k, v in adapter_tensors(move(wide)).items()}
    for _ in range(2):  # done again it changes nothing
        cast_base(wide, torch.bfloat16, load_dtypes(wide, torch.bfloat16))
        assert fingerprint(wide).differences(fingerprint(narrow)) == []
    assert all(torch.equal(adapter[k], v) and v.dtype == torch.float32 for k, v in adapter_tensors(wide).items())
    if kind == "a router in float32":
        assert base_dtypes(wide).keys() == {"bfloat16", "float32"}
    plain = {k: v.dtype for k, v in narrow.named_buffers() if "lora" not in k}
    assert {k: v.dtype for k, v in wide.named_buffers() if k in plain} == plain  # the rotary frequencies among them


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fresh_adapter_changes_nothing_of_the_rounded_base(family, use_dora, monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)  # which rounds in an order of its own
    plain = family.build()
    adapted = family.build()
    targets = ["first", "second", "head"] if family.name == "own" else "all-linear"
    if use_dora and family.name == "encoder":
        targets = ["linear1", "linear2"]  # attention has no DoRA form
    inject(adapted, LoRAConfig(r=2, target_modules=targets, use_dora=use_dora))
    cast_base(adapted, torch.bfloat16)
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = family.inputs(torch.bfloat16)
        assert torch.equal(output(adapted, x), output(plain, x))


def test_what_trains_in_full_and_narrower_storage_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[4].weight = nn.Parameter(model[4].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    for layer in model[2:4].parameters():
        layer.requires_grad_(True)
    for layer in (*model[:2].parameters(), model[4].bias):
        layer.requires_grad_(False)
    cast = {place.name for place in base_floats(model)}
    assert cast == {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "4.bias"}
    tied = nn.ModuleList([nn.Embedding(3, 4), nn.Linear(4, 3, bias=False)]).requires_grad_(False)
    tied[1].weight = tied[0].weight
    cast_base(tied, torch.bfloat16)
    assert tied[1].weight is tied[0].weight
    assert tied[1].weight.dtype == torch.bfloat16


def test_a_fit_over_a_bfloat16_base_and_all_that_follows_it(tmp_path, make_module, make_data, capsys):
    data, whole = make_data(), make_module()
    callbacks = [FreezeBase(proves_at="checkpoint"), Checkpoints(dirpath=str(tmp_path / "checkpoints"))]
    quiet(tmp_path, max_epochs=2, callbacks=callbacks, gradient_clip_val=1.0).fit(whole, data)
    last = str(tmp_path / "checkpoints/last.ckpt")
    told = " ".join(capsys.readouterr().out.split())
    assert "dtypes: W0 bfloat16; A and B float32; classifier float32; bfloat16 autocast (precision bf16-base)" in told
    assert "modes: the backbone in eval (backbone_mode): its own dropout off" in told
    assert {t.dtype for t in base_tensors(whole.backbone).values() if t.is_floating_point()} == {torch.bfloat16}
    state = load_checkpoint(last)
    moments = [v for entry in state["optimizer_states"][0]["state"].values() for k, v in entry.items() if "exp" in k]
    assert {t.dtype for t in (*moments, *state["state_dict"].values())} == {torch.float32}
    # The same adapter by a trainer and a module of their own, from float32 weights; twice over the same module.
    again, tester = make_module(), quiet(tmp_path)
    (first,), (second,) = (tester.test(again, data, ckpt_path=last, verbose=False) for _ in "ab")
    assert first == second
    assert fingerprint(again.backbone) == fingerprint(whole.backbone)
    report = tester.export(make_module(), data, ckpt_path=last, output_dir=str(tmp_path / "o"))
    assert report.w0_unchanged
    assert (report.w0_before, report.dtype) == (fingerprint(whole.backbone).digest, "bfloat16")
    with pytest.raises(AdapterError, match=r"trained in precision bf16-base, and this run is in 32-true"):
        quiet(tmp_path, "float32").test(make_module(), data, ckpt_path=last)
    quiet(tmp_path, limit_train_batches=1).fit(make_module(init_adapter=last), data)


def test_a_plain_trainer_takes_it_as_a_plugin(tmp_path, make_module, make_data):
    ours, plugged, few = make_module(), make_module(), {"limit_train_batches": 2, "limit_val_batches": 0}
    quiet(tmp_path, **few).fit(ours, make_data())
    fit(tmp_path, plugged, data=make_data(), plugins=[HalfBase()], **few)
    for key, value in adapter_tensors(ours.backbone).items():
        assert torch.equal(value, adapter_tensors(plugged.backbone)[key]), key

    class Own(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
            inject(self.net, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch["x"]), batch["labels"])

        def configure_optimizers(self):
            return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)

    own = Own()
    trainer_of(tmp_path, plugins=[HalfBase()]).fit(own, loader())
    assert {p.requires_grad: p.dtype for p in own.parameters()} == {True: torch.float32, False: torch.bfloat16}


def test_double_precision_is_there_before_w0_is_looked_at(tmp_path, make_module, make_data):
    """Lightning converts a module after it has loaded a checkpoint: then W0 would not be the one of the checkpoint."""
    callbacks = [FreezeBase(show_table=False), Checkpoints(dirpath=str(tmp_path / "checkpoints"))]
    quiet(tmp_path, "64-true", callbacks=callbacks, limit_train_batches=1).fit(make_module(), make_data())
    again = make_module()
    quiet(tmp_path, "64-true").test(again, make_data(), ckpt_path=str(tmp_path / "checkpoints/last.ckpt"))
    assert {p.dtype for p in again.parameters()} == {torch.float64}


def test_16_mixed_on_a_cpu_says_what_it_is(tmp_path, make_module, make_data, capsys):
    few = {"limit_train_batches": 1, "limit_val_batches": 0, "callbacks": [FreezeBase()]}
    quiet(tmp_path, "16-mixed", **few).fit(make_module(), make_data())
    told = " ".join(capsys.readouterr().out.split())
    assert "W0 float32; A and B float32; classifier float32; bfloat16 autocast" in told
    assert "(precision bf16-mixed, for 16-mixed, which CPUs do not have)" in told


def test_a_model_of_ones_own(tmp_path, make_module):
    """Floating-point inputs go through fit and export; where torch refuses the mixture, the way out is named."""

    class NormFirst(Vision):
        def forward(self, x):
            return super().forward(nn.functional.layer_norm(x, (6,), self.body[0].weight[0]))

    head = LoRAConfig(r=2, modules_to_save=["head"])
    trainer = quiet(tmp_path, callbacks=[FreezeBase(), Checkpoints(dirpath=str(tmp_path / "c"))])
    torch.manual_seed(5)
    trainer.fit(make_module(Vision(), head), loader())
    torch.manual_seed(5)
    module = make_module(Vision(), head)
    convert(module, trainer.precision_plugin)
    data = SimpleNamespace(prepare_data=lambda: None, setup=lambda stage: None, train_dataloader=loader)
    report = trainer.export(module, data, ckpt_path=str(tmp_path / "c"), output_dir=str(tmp_path / "out"))
    assert report.dtype == "bfloat16"
    with pytest.raises(LoRAError, match="use precision bf16-mixed, which keeps W0 in float32"):
        quiet(tmp_path).fit(make_module(NormFirst(), head), loader())


def test_nf4_is_for_a_base_that_was_loaded_so(tmp_path, make_module, make_data):
    with pytest.raises(LoRAError, match="nf4-base is for a backbone that is quantized as it is loaded"):
        quiet(tmp_path, "nf4-base").fit(make_module(), make_data())
    pytest.importorskip("bitsandbytes")
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128}
    hf("LlamaForCausalLM", **sizes).save_pretrained(tmp_path / "llama")
    given = {"dtype": "bfloat16", "model_kwargs": {"quantization_config": NF4}}
    model = huggingface(str(tmp_path / "llama"), "AutoModelForCausalLM", **given)
    module = make_module(model, LoRAConfig(r=2))
    before = fingerprint(model).digest
    convert(module, HalfBase("nf4-base", "cpu"))
    assert fingerprint(model).digest == before
    assert scheme(model.model.layers[0].mlp.up_proj) == "bitsandbytes 4-bit"
    assert base_dtypes(model).keys() == {"bitsandbytes 4-bit", "bfloat16"}
    assert {p.dtype for _, layer in adapted_layers(model) for p in (layer.lora_A, layer.lora_B)} == {torch.float32}


def test_the_command_hands_the_words_meaning_down_and_forgets_it():
    own = {"dtype": "float16", "model_kwargs": {"a": 1}}
    cases = [
        ("bf16-base", {"dtype": None, "model_kwargs": None}, {"dtype": "bfloat16"}),
        ("nf4-base", own, {"model_kwargs": {"a": 1, "quantization_config": NF4}}),
    ]
    for word, given, wanted in cases:
        backbone = SimpleNamespace(class_path="lora_lightning.huggingface", init_args=dict(given))
        set_precision({"trainer.precision": word, "model.backbone": backbone})
        assert backbone.init_args == given | wanted
    other = SimpleNamespace(class_path="torch.nn.Identity", init_args={})
    set_precision({"trainer.precision": "nf4-base", "model.backbone": other})
    assert other.init_args == {}
