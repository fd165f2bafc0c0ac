"""What a run hands over: models that open where nothing of ours is, and adapters that know their base."""

import re
import shutil

import pytest
import safetensors.torch
import torch
from transformers import AutoModel

from lora_lightning import huggingface, load_adapter
from lora_lightning.lora.errors import AdapterError
from tests.command.process import command, files_in, mistake
from tests.factories import assert_same, snapshot
from tests.tiny import make_bert

# ---- another base of equal shapes

OTHERS = [None, *(f"encoder.layer.{at}" for at in ("1.output.dense.weight", "0.attention.self.key.bias"))]
"""All weights, or one by the smallest step there is."""


@torch.no_grad()
def moved(folder, name):
    model = AutoModel.from_pretrained(folder)
    weight = model.get_parameter(name).view(-1)
    weight[-1] = torch.nextafter(weight[-1], torch.tensor(torch.inf))  # the smallest step there is
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The adapter of a run that took real steps, as the command writes it."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    with pytest.MonkeyPatch.context() as patch:
        command(patch, "export", "--ckpt_path", trained, "--output_dir", folder, "--formats", "adapter")
    trained_B = [t for k, t in safetensors.torch.load_file(folder / "adapter/adapter_model.safetensors").items()]
    assert all(tensor.any() for tensor in trained_B)
    return folder / "adapter"


@pytest.mark.parametrize("other", OTHERS)
def test_a_trained_adapter_is_refused_on_another_base_of_equal_shapes(other, exported, trained, tiny, tmp_path):
    model = huggingface(
        str(make_bert(tmp_path / "other", seed=1) if other is None else moved(make_bert(tmp_path / "other"), other)),
        num_labels=2,
    )
    here = huggingface(tiny.bert, num_labels=2)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in here.state_dict().items()}
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"made on another base.*first .*allow_other_base=True"):
        load_adapter(model, exported)
    assert_same(model, before)
    load_adapter(model, exported, allow_other_base=True)
    load_adapter(here, exported)


@pytest.mark.parametrize("action", ["export", "test", "fit"])
def test_the_command_refuses_a_run_on_another_base(action, trained, tiny, tmp_path, monkeypatch, capsys):
    other = make_bert(tmp_path / "other", seed=1)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "test").mkdir(exist_ok=True)
    (run / "test" / "metrics.csv").write_text("what an earlier test found\n")
    before = files_in(run)
    checkpoint = run / "checkpoints" / "best.ckpt"
    backbone = ("--model.backbone.init_args.pretrained_model_name_or_path", other)
    said = mistake(monkeypatch, capsys, action, "--config", tiny.config, *backbone, "--ckpt_path", checkpoint)
    assert re.search("was made on another base.*tensors differ, first bert.*allow_other_base", said), said
    assert files_in(run) == before, "nothing was written into the run"
