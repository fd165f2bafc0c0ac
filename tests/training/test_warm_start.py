"""`--model.init_adapter`: a fit starts at an earlier run's adapter, and one that is resumed goes on from its own."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lora_lightning import CausalLM, FreezeBase, LoRAConfig, LoRAError, inject
from lora_lightning.cli.main import LoRACLI
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.training import module as module_file
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from lora_lightning.training.initialization import start_from_adapter, start_from_batches
from tests.tiny_lm import VOCABULARY, make_model
from tests.training.small import fit


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """The same texts with three labels, and the earlier run's config for them."""
    file = tmp_path_factory.mktemp("other") / "reviews.csv"
    file.write_text(Path(tiny.reviews).read_text().replace(",fresh,film 1", ",unseen,film 1"))
    return ["fit", "--config", tiny.config, "--data.path", str(file), "--name", "other", "--trainer.max_epochs", "1"]


class Start(FreezeBase):
    """Looks at the adapter before the first batch."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.seen = {key: tensor.detach().clone() for key, tensor in adapter_tensors(pl_module.backbone).items()}


@pytest.mark.parametrize("named", ["run", "checkpoint", "adapter"])
def test_the_body_is_the_earlier_runs_and_the_head_is_new(named, trained, other, tmp_path, make_module):
    path = {"run": trained.parent, "checkpoint": trained / "checkpoints" / "best.ckpt"}.get(named)
    path = path or tmp_path / "out" / "adapter"
    if named == "adapter":
        LoRACLI(args=["export", "--ckpt_path", str(trained), "--output_dir", str(path.parent)])
        module = make_module()  # an export is named as a whole too
        said = start_from_adapter(module.backbone, str(path.parent), module.lora, allow_other_base=False)
        assert said.own_start == {}
    start = {"class_path": f"{__name__}.Start", "init_args": {"show_table": False}}
    cli = LoRACLI(args=[*other, "--model.init_adapter", str(path), "--trainer.callbacks", json.dumps([start])])
    looked = next(c for c in cli.trainer.callbacks if isinstance(c, Start))
    earlier = make_module()
    content = load_checkpoint(trained / "checkpoints" / "best.ckpt")
    earlier.load_state_dict(content["state_dict"])
    body = {key: t for key, t in adapter_tensors(earlier.backbone).items() if "classifier" not in key}
    assert all(torch.equal(looked.seen[key], tensor) for key, tensor in body.items())
    assert cli.model.w0_fingerprint() == fingerprint(cli.model.backbone) == looked.before
    report = json.loads((tmp_path / "runs/other/report.json").read_text())
    assert report["w0_unchanged"]
    assert report["init_adapter"] == str(path)


def test_a_resumed_fit_goes_on_from_its_own_checkpoint(trained, other, tmp_path, monkeypatch):
    LoRACLI(args=[*other, "--model.init_adapter", str(trained)])
    monkeypatch.setattr(module_file.initialization, "start_from_adapter", lambda *_, **__: pytest.fail("read again"))
    config = str(tmp_path / "runs/other/version_0/config.yaml")
    resumed = ["--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    assert LoRACLI(args=["fit", *resumed]).trainer.current_epoch == 2
    LoRACLI(args=["test", "--config", config, "--ckpt_path", "best"])


def test_what_is_no_adapter_is_refused_before_training(tmp_path, make_module, make_data):
    (tmp_path / "torn.ckpt").write_bytes(b"PK")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    for path in ("nothing", "torn.ckpt", "plain.ckpt"):
        with pytest.raises(LoRAError):
            fit(tmp_path, make_module(init_adapter=path), data=make_data())
    with pytest.raises(LoRAError, match=r"init_adapter and lora\.init=eva are two starts"):
        make_module(lora=LoRAConfig(r=2, init="eva"), init_adapter="runs/mnli")


# A start that is measured on batches weighs what they hold.


def rows(*lengths):
    """Texts of these lengths, padded to the longest."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(VOCABULARY), (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def started(batches):
    model = make_model("llama", dtype=torch.float64)
    inject(model, LoRAConfig(r=3, init="lora_ga"), run_init=False)
    trainer = SimpleNamespace(train_dataloader=batches, strategy=SingleDeviceStrategy(torch.device("cpu")))
    start_from_batches(model, CausalLM(), "lora_ga", trainer)
    return adapter_tensors(model)


def test_batches_that_are_cut_in_another_way_give_the_same_start():
    whole = rows(9, 2, 3, 2, 8)
    parts = [{name: tensor[part] for name, tensor in whole.items()} for part in (slice(0, 1), slice(1, 5))]
    one, two = started([whole]), started(parts)
    for name, tensor in one.items():
        signs = torch.sign((two[name] * tensor).sum(0 if "lora_B" in name else 1, keepdim=True))  # SVD leaves them open
        assert float((two[name] * signs - tensor).norm()) <= 1e-6 * float(tensor.norm()), name
