"""The guards catch what they are there for."""

import csv
import json
from contextlib import nullcontext

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lora_lightning import CausalLM, ExportAtEnd, FreezeBase, LoRAConfig, LoRAError, LoRAModule
from lora_lightning.training.callbacks.freeze_base import W0MovedError, check_gradients, check_optimizers
from tests.factories import export_of
from tests.tiny_lm import make_model
from tests.training.test_module import Vision, loader, trainer_of


def fit(tmp_path, module, *callbacks):
    trainer_of(tmp_path, callbacks=[FreezeBase(show_table=False), *callbacks], enable_checkpointing=False).fit(
        module, loader()
    )


def test_a_moved_w0_stops_the_fit(tmp_path, make_module):
    class Nudge(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            with torch.no_grad():
                pl_module.backbone.body[4].bias[0] += 1e-7 + pl_module.backbone.body[4].bias[0].abs() * 1e-6

    with pytest.raises(W0MovedError, match=r"1 frozen tensors changed, first 'body\.4\.bias'"):
        fit(tmp_path, make_module(Vision(), LoRAConfig(r=2)), Nudge())


def test_moved_batch_statistics_stop_the_fit(tmp_path, make_module):
    class Write(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pl_module.backbone.body[1].running_mean += 1

    with pytest.raises(W0MovedError, match=r"body\.1\.running_mean"):
        fit(tmp_path, make_module(Vision(), LoRAConfig(r=2)), Write())


def test_batch_statistics_hold_though_someone_wakes_the_norm(tmp_path, make_module):
    class Wake(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            pl_module.backbone.body[1].train()

    fit(tmp_path, make_module(Vision(), LoRAConfig(r=2)), Wake())


def test_an_adapter_that_the_forward_bypasses_stops_the_run(tmp_path, make_module):
    class Reads(Vision):
        """Reads a weight instead of calling its module, as fused kernels do."""

        def forward(self, x):
            first = self.body[0]
            return self.head(self.body[4](torch.relu(nn.functional.linear(x, first.weight, first.bias))))

    with pytest.raises(LoRAError, match=r"2 of 4 trainable tensors got no gradient.*body\.0\.lora_A"):
        fit(tmp_path, make_module(Reads(), LoRAConfig(r=2)))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, make_module):
    class Infinite(Vision):
        def forward(self, x):
            return super().forward(x) * torch.tensor(float("inf"))

    with pytest.raises(LoRAError, match="not finite"):
        fit(tmp_path, make_module(Infinite(), LoRAConfig(r=2)))


def test_a_loss_scaler_may_overflow_in_its_first_step(make_module):
    module = make_module(Vision(), LoRAConfig(r=2))
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    check_gradients(module, finite=False)
    with pytest.raises(LoRAError, match="not finite"):
        check_gradients(module)


class Headless(nn.Module):
    """Ends in a repeated block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))


def test_baselines_say_before_the_fit_what_they_cannot_do(tmp_path, make_module, make_data):
    from demos.baselines import Baselines

    with pytest.raises(LoRAError, match=r"such as TextClassificationData: drop it from trainer\.callbacks"):
        fit(tmp_path, make_module(Vision(), LoRAConfig(r=2)), Baselines())
    with pytest.raises(LoRAError, match="Headless has no output head that could be found"):
        trainer_of(tmp_path, callbacks=[Baselines()]).fit(make_module(Headless(), LoRAConfig(r=2)), make_data())


def test_an_optimizer_that_holds_too_much_or_too_little_is_refused(make_module):
    module = make_module(Vision(), LoRAConfig(r=2))
    trains = [p for p in module.parameters() if p.requires_grad]
    with pytest.raises(LoRAError, match="holds 8 frozen parameters"):
        check_optimizers([torch.optim.SGD(module.parameters(), lr=1)], module)
    with pytest.raises(LoRAError, match="lacks 3 parameters"):
        check_optimizers([torch.optim.SGD(trains[:1], lr=1)], module)
    check_optimizers([torch.optim.SGD(trains, lr=1)], module)


@pytest.mark.parametrize("lost", ["lm_head", "model.embed_tokens"])
def test_an_adapter_that_a_later_change_of_the_model_lost_stops_the_fit(tmp_path, lost):
    fields = {"target_modules": ["q_proj", "lm_head"]} if lost == "lm_head" else {"trainable_token_indices": [1, 2]}
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    for resized in (False, True):
        module = LoRAModule(make_model("llama"), CausalLM(), LoRAConfig(r=2, **fields))
        if resized:
            module.backbone.resize_token_embeddings(module.backbone.config.vocab_size + 8)
        trainer = lightning.Trainer(
            max_steps=1, callbacks=[FreezeBase()], logger=False, default_root_dir=tmp_path, accelerator="cpu"
        )
        with pytest.raises(LoRAError, match=f"'{lost}' is gone") if resized else nullcontext():
            trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))


def test_a_parameter_that_someone_thaws_is_frozen_again(tmp_path, make_module):
    module = make_module(Vision(), LoRAConfig(r=2))
    module.backbone.body[4].weight.requires_grad_(True)
    before = module.backbone.body[4].weight.clone()
    fit(tmp_path, module)
    assert torch.equal(before, module.backbone.body[4].weight)


def test_counts_reach_the_log_and_the_report(trained):
    header, *_ = (trained / "metrics.csv").read_text().splitlines()
    assert {"params/trainable", "params/frozen", "params/share", "val/accuracy"} <= set(header.split(","))
    report = json.loads((trained / "report.json").read_text())
    assert report["w0_unchanged"] is True
    assert report["trainable"] == 3906
    assert report["val_accuracy"] > 0.85
    assert json.loads((trained.parent / "report.json").read_text()) == report


def test_baselines_are_above_chance_and_beside_the_majority(tmp_path, make_module, make_data):
    from demos.baselines import Baselines
    from lora_lightning import RunReport

    callbacks = [FreezeBase(show_table=False), RunReport(), Baselines()]
    trainer_of(tmp_path, logger=True, callbacks=callbacks).fit(make_module(), data := make_data())
    report = json.loads(next(tmp_path.rglob("report.json")).read_text())
    assert report["probe_accuracy"] > 0.8, "a bag of words gives the label away"
    assert report["majority_accuracy"] == data.majority_share("validation")
    assert {"probe_test_accuracy", "majority_test_accuracy"} <= set(report)


def test_export_at_end_writes_the_best_checkpoint(tmp_path, make_module, make_data):
    from peft import PeftModel

    from lora_lightning import RunReport, huggingface

    module = make_module(optimizer=lambda params: torch.optim.AdamW(params, lr=0.01))
    trainer = trainer_of(tmp_path, logger=True, callbacks=[FreezeBase(), RunReport(), ExportAtEnd()], max_epochs=2)
    trainer.fit(module, data := make_data())
    folder = next(tmp_path.rglob("export_report.json")).parent
    batch = {k: v for k, v in next(iter(data.val_dataloader())).items() if k != "labels"}
    peft = PeftModel.from_pretrained(huggingface(module.backbone.name_or_path, num_labels=2), folder / "adapter").eval()
    torch.testing.assert_close(peft(**batch).logits, module.eval().backbone(**batch).logits, rtol=1e-5, atol=1e-6)


MEANINGLESS = {
    "unknown export format 'adaptor'; did you mean 'adapter'": {"formats": ["adaptor"]},
    "unknown export format 'merge'; did you mean 'merged'": {"formats": "adapter,merge"},
    "export writes no ONNX: .* docs/export.md": {"formats": "onnx"},
    "no export format given: name some of adapter, merged": {"formats": []},
    "dtype must be auto, float32, bfloat16, float16, got 'fp8'": {"dtype": "fp8"},
    "serving must be 'vllm' or left out, got 'tgi'": {"serving": "tgi"},
    "max_shard_size must be bytes or a size such as 5GB, got '5 pieces'": {"max_shard_size": "5 pieces"},
    "max_shard_size must be bytes or a size such as 5GB, got 0": {"max_shard_size": 0},
    "a form of the adapter, got the formats merged: add adapter": {"formats": ["merged"], "serving": "vllm"},
}


@pytest.mark.parametrize("said", MEANINGLESS)
def test_an_export_that_means_nothing_is_refused_before_any_fit_and_by_export_alike(said, tmp_path, make_module):
    with pytest.raises(LoRAError, match=said):
        ExportAtEnd(**MEANINGLESS[said])
    with pytest.raises(LoRAError, match=said):
        export_of(
            make_module(Vision(), LoRAConfig(r=2)), tmp_path / "out", {"x": torch.ones(1, 6)}, **MEANINGLESS[said]
        )
    assert not (tmp_path / "out").exists()


def test_formats_may_have_commas_between_everywhere(tmp_path, make_module):
    assert ExportAtEnd(formats="adapter, merged").options["formats"] == ["adapter", "merged"]
    batch = {"x": torch.ones(1, 6)}
    module = make_module(Vision(), LoRAConfig(r=2))
    report = export_of(module, tmp_path / "out", batch, formats="merged,adapter")
    assert report.formats == ["merged", "adapter"]


def test_an_export_that_cannot_be_is_told_before_the_first_step(tmp_path, make_module):
    class Steps(Callback):
        def on_train_batch_start(self, *args):
            raise AssertionError("it trained")

    def refused(said, lora=LoRAConfig(r=2), **options):  # noqa: B008
        callbacks = [FreezeBase(show_table=False), Steps(), ExportAtEnd(**options)]
        with pytest.raises(LoRAError, match=said):
            trainer_of(tmp_path, logger=True, callbacks=callbacks).fit(make_module(Vision(), lora), loader())

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    refused("holds files that are not an export", output_dir=str(tmp_path / "mine"))
    refused("vLLM takes A and B of linear layers alone", LoRAConfig(r=2, use_dora=True), serving="vllm")
    with pytest.raises(LoRAError, match="ExportAtEnd exports a LoRAModule, got BoringModel"):
        trainer_of(tmp_path, callbacks=[ExportAtEnd()]).fit(BoringModel())


def test_an_exports_figures_reach_the_log_and_what_was_trained_last_stays(tmp_path, make_module):
    from lightning.pytorch.loggers import CSVLogger

    module = make_module(Vision(), LoRAConfig(r=2, modules_to_save=["head"]))
    ended = {}

    class Remember(Callback):
        def on_train_end(self, trainer, pl_module):
            ended.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    at_end = ExportAtEnd(dtype="bfloat16", output_dir=str(tmp_path / "out"))
    callbacks = [FreezeBase(show_table=False), Remember(), at_end]
    logger = CSVLogger(tmp_path, name="log")
    trainer_of(tmp_path, logger=logger, callbacks=callbacks, max_epochs=2).fit(module, loader(), loader(8))
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    with (tmp_path / "log" / "version_0" / "metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row.get("export/max_rel_diff"))
    for name in ("max_rel_diff", "max_abs_diff", "tolerance", "adapter_bytes", "merged_bytes"):
        assert float(row[f"export/{name}"]) == pytest.approx(report[name])
    assert float(row["export/kept_least"]) == pytest.approx(min(report["kept"].values()))
    assert report["dtype"] == "bfloat16"
    assert all(torch.equal(ended[k], v) for k, v in module.state_dict().items())


def test_a_fit_with_an_export_hashes_w0_once_for_each_of_its_proofs(tmp_path, make_module, monkeypatch):
    """At the start, at the end of training, before the merge, on saving and on loading the adapter."""
    from lora_lightning import RunReport
    from lora_lightning.lora.frozen import fingerprint as module_of

    passes, real = [], module_of._digest

    def count(tensor, pool):
        passes.extend([1] if tensor.shape == (16, 16) else [])
        return real(tensor, pool)

    monkeypatch.setattr(module_of, "_digest", count)
    callbacks = [FreezeBase(show_table=False), RunReport(), ExportAtEnd()]
    trainer_of(tmp_path, logger=True, callbacks=callbacks).fit(make_module(Vision(), LoRAConfig(r=2)), loader())
    assert len(passes) == 6
