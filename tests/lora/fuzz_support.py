"""A good adapter's directory, and loads of what accidents made of it."""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import settings
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, remove, save_adapter
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers, modules_of_kind
from lora_lightning.lora.layers import TokenRows
from tests.factories import assert_same, move, snapshot
from tests.lora.accidents import Accident

MORE = os.environ.get("LORA_FUZZ")
SECONDS = 2.0
"""Of processor time, within which any file is loaded or refused."""
IDS = torch.tensor([[1, 4, 2], [0, 5, 3]])


def examples(count: int):
    """The same draw each time; with LORA_FUZZ=N another one of N examples, by `--hypothesis-seed` where given."""
    return settings(max_examples=int(MORE or count), derandomize=MORE is None, deadline=None, database=None)


# ---- a model and two good directories


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attention_of_this_block = nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4, bias=False)})

    def forward(self, x):
        attention = self.self_attention_of_this_block
        return x + torch.tanh(attention["v"](torch.tanh(attention["q"](x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 2)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def write_ours(folder: Path) -> None:
    model = net()
    chosen = {"r": 2, "alpha": 3.0, "target_modules": ["q", "v"], "modules_to_save": ["head"], "bias": "lora_only"}
    patterns = {"rank_pattern": {"0.self_attention_of_this_block.q": 1}, "alpha_pattern": {"v": 5.0}}
    inject(model, LoRAConfig(**chosen, **patterns, trainable_token_indices={"embed": [1, 4]}))
    save_adapter(move(model), folder)


def write_pefts(folder: Path) -> None:
    chosen = {"r": 2, "lora_alpha": 3, "target_modules": ["q", "v"], "modules_to_save": ["head"]}
    model = peft.get_peft_model(net(), peft.LoraConfig(**chosen, rank_pattern={"v": 1}, alpha_pattern={"q": 5}))
    move(model).save_pretrained(folder)


def settings_of(model: nn.Module) -> dict:
    """Rank, alpha, dropout and all else of each layer, and the tokens whose rows train."""
    layers: dict = {name: layer.lora_settings for name, layer in adapted_layers(model)}
    return layers | {name: rows.lora_token_ids.tolist() for name, rows in modules_of_kind(model, TokenRows)}


ABOUT = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version"}
ABOUT |= {"auto_mapping", "runtime_config", "megatron_core", "qalora_group_size"}
ABOUT |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
"""What PEFT's config says of an adapter's origin and next use, and not of its update."""


def meaning(config: bytes) -> dict:
    """What the config says of the update; of these fields, null, false and nothing are one."""
    return {k: v for k, v in json.loads(config).items() if k not in ABOUT and v not in (None, "", [], {}, False)}


class Origin:
    """A good directory, the model that it is for, and what the model then computes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.ours, self.model, self.folder = name == "ours", net(), folder
        (write_ours if self.ours else write_pefts)(folder)
        self.good = {file: (folder / file).read_bytes() for file in (WEIGHTS, CONFIG)}
        self.tensors = safetensors.torch.load(self.good[WEIGHTS])
        load_adapter(self.model, folder)
        with torch.no_grad():
            self.output = self.model(IDS)
        self.settings = settings_of(self.model)
        self.plain()
        self.before = snapshot(self.model)
        with torch.no_grad():
            assert not torch.equal(self.model(IDS), self.output)

    def plain(self) -> None:
        remove(self.model).requires_grad_(True)

    def load(self) -> str:
        """The law: `refused` in one line with the model untouched, or loaded: the `same` model, or an `other` one."""
        model, started, self.said = self.model, time.process_time(), ""
        try:
            with warnings.catch_warnings(action="ignore"):
                load_adapter(model, self.folder)
        except LoRAError as error:
            self.said = str(error)
        assert time.process_time() - started < SECONDS
        if not self.said:
            return self._loaded()
        assert "\n" not in self.said
        assert len(self.said) < 2000
        assert_same(model, self.before)
        return "refused"

    def _loaded(self) -> str:
        model = self.model
        try:
            assert all(torch.isfinite(tensor).all() for tensor in adapter_tensors(model).values()), "not finite"
            self.scales = {name: layer.lora_settings.scale for name, layer in adapted_layers(model)}
            with torch.no_grad():
                same = torch.equal(model(IDS), self.output) and settings_of(model) == self.settings
                return "same" if same else "other"
        finally:
            self.plain()

    def meet(self, accident: Accident, file: str, seed: int) -> str:
        """Load after an accident; what loads as another model must be what the files say."""
        bad = accident(self.good[file], random.Random(seed))
        (self.folder / file).write_bytes(bad)
        try:
            result = self.load()
        finally:
            (self.folder / file).write_bytes(self.good[file])
        if result == "other":
            assert not self.ours, "a file of ours that was changed loaded as something else"
            (self.check_values if file == WEIGHTS else self.check_scales)(bad)
        if result == "same" and self.ours and file == CONFIG:
            assert meaning(bad) == meaning(self.good[file]), "a config of ours that means another thing loaded"
        return result

    def check_values(self, bad: bytes) -> None:
        """PEFT's files carry no checksum: other values in are other values out, and nothing else is."""
        tensors = safetensors.torch.load(bad)
        assert any(not torch.equal(tensor, tensors[key]) for key, tensor in self.tensors.items())

    def check_scales(self, bad: bytes) -> None:
        """The scales are those that the changed config asks for: PEFT's rule, written a second time."""
        config = json.loads(bad)
        for name, scale in self.scales.items():
            hits = [a for p, a in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({p})$", name)]
            r = self.tensors[f"base_model.model.{name}.lora_A.weight"].shape[0]
            alpha = hits[0] if hits else config.get("lora_alpha", 8)
            assert scale == pytest.approx(alpha / (math.sqrt(r) if config.get("use_rslora") else r))
