"""What trains, in which mode, and what a checkpoint holds."""

import copy

import pytest
import torch

from lora_lightning import FreezeBase, LoRAConfig, LoRAModule, SequenceClassification, WarmupDecay, huggingface
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors, base_tensors, frozen_keys
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.factories import export_of
from tests.training.small import Vision, fit, loader, trainer_of


def test_w0_and_batch_statistics_do_not_move_in_a_fit(tmp_path, make_module):
    module = make_module(Vision(), LoRAConfig(r=2, modules_to_save=["head"]), backbone_mode="train")
    before = {k: v.clone() for k, v in base_tensors(module.backbone).items()}
    start = {k: v.clone() for k, v in adapter_tensors(module.backbone).items()}
    fit(tmp_path, module, max_epochs=3)
    assert all(torch.equal(before[k], v) for k, v in base_tensors(module.backbone).items())
    assert not any(torch.equal(start[k], v) for k, v in adapter_tensors(module.backbone).items())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_backbone_mode_is_what_was_said_and_lora_dropout_is_on(tmp_path, make_module, mode):
    module = make_module(Vision(), LoRAConfig(r=2, dropout=0.1, modules_to_save=["head"]), backbone_mode=mode)
    seen, body = [], module.backbone.body

    def look(*_):
        if torch.is_grad_enabled():
            seen.append([part.training for part in (body[3], body[1], body[0].lora_dropout)])

    body.register_forward_hook(look)
    trainer_of(tmp_path, max_epochs=2, callbacks=[FreezeBase(False)]).fit(module, loader(), loader(8))
    assert seen == [[mode == "train", mode == "train", True]] * 2 * len(loader())


def test_the_optimizer_holds_exactly_what_trains(make_module):
    module = make_module()
    held = [p for group in module.configure_optimizers().param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters() if p.requires_grad}
    assert sum(p.numel() for p in held) == module.report.trainable


def best_of(trained):
    return load_checkpoint(trained / "checkpoints" / "best.ckpt")


def test_a_checkpoint_holds_the_adapter_and_plain_data_alone_and_loads_as_it_was_saved(make_module, trained, tiny):
    content = best_of(trained)
    assert content["state_dict"]
    assert all(".lora_" in key for key in content["state_dict"])
    assert content["lora_lightning"]["config"]["r"] == 4
    assert "hyper_parameters" not in content, "flags must win over a checkpoint's settings, or be refused"
    assert (trained / "checkpoints" / "best.ckpt").stat().st_size < 200_000
    module = make_module()
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    again = LoRAModule.load_from_checkpoint(
        trained / "checkpoints" / "best.ckpt",
        backbone=huggingface(tiny.bert, num_labels=2),
        task=SequenceClassification(2),
        lora=module.lora,
    )
    for loaded in (module, again, copy.deepcopy(module)):
        for key, value in adapter_tensors(loaded.backbone).items():
            assert torch.equal(value, content["state_dict"][f"backbone.{key}"])
        assert frozen_keys(loaded.backbone) == frozen_keys(module.backbone)


MISFITS = {
    "another case": (
        lambda s: s.update({k.replace("lora_A", "lora_a"): s.pop(k) for k in list(s) if "query.lora_A" in k}),
        "missing",
    ),
    "a key less": (lambda s: s.pop(next(iter(s))), "missing"),
    "a key more": (lambda s: s.update(extra=torch.zeros(1)), "left over 'extra'"),
    "another shape": (lambda s: s.update({next(iter(s)): torch.zeros(3)}), r"has shape \(3,\), expected"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused(make_module, trained, misfit):
    state = best_of(trained)["state_dict"]
    change, said = MISFITS[misfit]
    change(state)
    with pytest.raises(AdapterError, match=said):
        make_module().load_state_dict(state)


def test_a_checkpoint_of_other_settings_is_refused(make_module, trained):
    with pytest.raises(AdapterError, match=r"lora\.(r|alpha)="):
        make_module(lora=LoRAConfig(r=2, modules_to_save=["classifier"])).on_load_checkpoint(best_of(trained))
    with pytest.raises(AdapterError):
        make_module().on_load_checkpoint({"state_dict": {}})


def test_a_checkpoint_of_another_base_is_refused(make_module, trained):
    content, module = best_of(trained), make_module()
    module.backbone.bert.encoder.layer[1].output.dense.weight.data[0, 0] += 1
    with pytest.raises(AdapterError, match=r"another base.*first bert\.encoder\.layer\.1\.output\.dense\.weight"):
        module.on_load_checkpoint(content)
    module.allow_other_base = True
    module.on_load_checkpoint(content)
    module = make_module()
    module.backbone.classifier.weight.data += 1  # a new head of other random numbers
    module.on_load_checkpoint(content)


def test_a_run_that_goes_on_for_longer_goes_on_learning(tmp_path, make_module):
    rates = []

    class Rates(WarmupDecay):
        def step(self, *args):
            super().step(*args)
            rates.append(self.get_last_lr()[0])

    def on(epochs, ckpt=None):
        torch.manual_seed(0)
        module = make_module(Vision(), LoRAConfig(r=2), lr_scheduler=lambda o: Rates(o, warmup=0))
        trainer = trainer_of(tmp_path / str(epochs), max_epochs=epochs)
        trainer.fit(module, loader(), ckpt_path=ckpt)
        return adapter_tensors(module.backbone), trainer

    first, trainer = on(2)
    later, _ = on(4, trainer.checkpoint_callback.best_model_path)
    assert rates[-6:] == pytest.approx([1e-3 * (1 - step / 12) for step in range(7, 13)])
    assert any(not torch.equal(value, first[key]) for key, value in later.items())


def test_a_plateau_is_watched_in_its_own_direction(make_module):
    for mode, monitor in (("min", "val/loss"), ("max", "val/accuracy")):
        module = make_module(lr_scheduler=lambda o, m=mode: torch.optim.lr_scheduler.ReduceLROnPlateau(o, mode=m))
        assert module.configure_optimizers()["lr_scheduler"]["monitor"] == monitor


def test_a_frozen_new_head_is_said_aloud(make_module):
    said = r"classifier: new, with random weights, and frozen; to train: lora\.modules_to"
    with pytest.warns(UserWarning, match=said):
        make_module(lora=LoRAConfig(r=4))


@pytest.mark.parametrize("init", ["eva", "lora_ga", "pissa", "orthogonal"])
def test_a_start_trains_resumes_and_exports_without_moving_w0(tmp_path, make_module, make_data, init):
    def module_of():
        return make_module(lora=LoRAConfig(r=4, init=init, modules_to_save=["classifier"]))

    module, data = module_of(), make_data()
    before, fresh = fingerprint(module.backbone), {k: v.clone() for k, v in adapter_tensors(module.backbone).items()}
    trainer = trainer_of(tmp_path, callbacks=[FreezeBase(show_table=False)])
    trainer.fit(module, data)
    assert fingerprint(module.backbone) == before
    if init in ("eva", "lora_ga"):
        moved = sum(float((v - fresh[k]).abs().max()) > 0.1 for k, v in adapter_tensors(module.backbone).items())
        assert moved > 6, "the start was measured"
    again = module_of()
    trainer_of(tmp_path / "on", max_epochs=2).fit(again, data, ckpt_path=trainer.checkpoint_callback.best_model_path)
    report = export_of(again.eval(), tmp_path / "out", next(iter(data.val_dataloader())))
    assert report.max_rel_diff < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_base_trains_a_float32_adapter_and_head(tmp_path, tiny, make_module, make_data, dtype):
    module = make_module(huggingface(tiny.bert, num_labels=2, dtype=dtype))
    fit(tmp_path, module, data=make_data())
    trained = adapter_tensors(module.backbone).values()
    assert {v.dtype for v in trained} == {torch.float32}
    assert all(torch.isfinite(v).all() for v in trained)


WRITES = {"data": lambda weight: weight.data.add_(1), "numpy": lambda weight: weight.detach().numpy().fill(7)}


@pytest.mark.parametrize("write", WRITES)
def test_a_checkpoint_goes_with_the_w0_that_it_meets_however_that_was_written(tmp_path, make_module, write):
    trainer = fit(tmp_path, module := make_module(Vision(), LoRAConfig(r=2)))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    weight = module.backbone.head.weight
    WRITES[write](weight)
    with pytest.raises(AdapterError, match=r"another base.*first head\.weight"):
        module.on_load_checkpoint(load_checkpoint(tmp_path / "first.ckpt"))
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    module.on_load_checkpoint(load_checkpoint(tmp_path / "second.ckpt"))


def test_a_second_fit_on_a_w0_that_was_written_to_starts_from_that(tmp_path, make_module):
    module = make_module(Vision(), LoRAConfig(r=2))
    for _ in range(2):
        fit(tmp_path, module, guard := FreezeBase(show_table=False))
        assert guard.before == guard.after == fingerprint(module.backbone)
        module.backbone.head.weight.data.add_(1)
