"""An adapter's directory in tests: made by PEFT, edited, and refused with the model as it was."""

from __future__ import annotations

import json

import peft
import pytest

from lora_lightning import LoRAError, load_adapter
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS
from lora_lightning.lora.formats.tensor_files import read_tensors, write_tensors
from tests.factories import assert_same, move, snapshot


def of_peft(directory, model, **fields):
    """A trained PEFT model, saved."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"], **fields})
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    move(theirs).save_pretrained(directory)
    return theirs


def edit_config(directory, file=CONFIG, **fields):
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(directory, change=lambda tensors: None, *, record=False):
    """Rewrite the weights, as PEFT would without our record unless that is kept."""
    tensors, metadata = read_tensors(directory / WEIGHTS)
    change(tensors)
    write_tensors(directory / WEIGHTS, tensors, metadata if record else {"format": "pt"})


def rename(directory, change):
    """Give every tensor the key that `change` makes of its own."""

    def all_keys(tensors):
        renamed = {change(key): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(directory, all_keys)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same_files(*directories):
    """Whether weights and config are the same bytes in all."""
    return all(len({(directory / file).read_bytes() for directory in directories}) == 1 for file in (WEIGHTS, CONFIG))


def refused(source, match, model, load=load_adapter, **options):
    """`load(model, source)` raises one line with these words, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(LoRAError, match=match) as caught:
        load(model, source, **options)
    assert "\n" not in str(caught.value)
    assert_same(model, before)
