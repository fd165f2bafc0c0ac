"""Small models with an adapter of every kind and option, for the tests of the bank."""

from functools import partial

import torch
from torch import nn

from lora_lightning import AdapterBank, LoRAConfig, inject, load_adapter, save_adapter
from tests.factories import FAMILIES, hf
from tests.lora.kinds import KINDS, drawn, on, run_family, run_tokens
from tests.lora.laws import stir


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Conv1d(6, 4, 1)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


def run_normed(model):
    return model(on(drawn(4, 3, 7), model))


gpt2 = partial(hf, "GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
gpt2 = partial(gpt2, attn_implementation="eager")
run_net = KINDS["Linear"].run


def of(kind, *configs):
    return KINDS[kind].make, KINDS[kind].run, [*configs]


ROWS = {"trainable_token_indices": {"embed": [1, 5]}, "target_modules": []}
# By name: a model, its output, and configs of adapters that can share its base.
ZOO = {
    "linear": of("Linear", {"r": 2}, {"r": 4, "use_rslora": True, "target_modules": ["up", "square"]}),
    "dora": of("Linear", {"r": 2, "use_dora": True}, {"r": 3}),
    "heads": of("Linear", {"r": 2, "modules_to_save": ["head"]}, {"modules_to_save": ["norm"], "dropout": 0.1}),
    "biases": of("Linear", {"r": 2, "bias": "all"}, {"bias": "lora_only", "target_modules": ["square"]}),
    "lora_bias": of("Linear", {"r": 2, "lora_bias": True, "exclude_modules": ["down"]}, {"r": 1}),
    "starts": of("Linear", {"r": 2, "init": "pissa"}, {"r": 4, "init": "orthogonal"}, {"r": 3, "init": "olora"}),
    "tokens": of("token rows with a tied head", ROWS, {"target_modules": ["embed"], "r": 2}),
    "experts": of("Parameter of experts", {"target_parameters": ["up", "mix"]}, {"target_parameters": ["down"]}),
    "conv": of("Conv2d", {"target_modules": ["1"], "r": 2}, {"target_modules": ["1"], "r": 4}),
    "groups": of("Conv2d grouped", {"target_modules": ["1"], "r": 2}, {"target_modules": ["1"], "r": 4}),
    "embedding": of("Embedding", {"target_modules": ["0"], "r": 2}, {"target_modules": ["0", "2"], "r": 3}),
    "attention": of(
        "every bias beside conv and attention", {"r": 2}, {"target_modules": ["attention.out_proj"], "r": 4}
    ),
    "kdim": of("attention, unfused", {"r": 2, "target_modules": ["attn"]}, {"r": 4}),
    "slices": (gpt2, run_tokens, [{"slices": {"c_attn": ["q", "v"]}}, {"slices": {"c_attn": ["v"]}}, {"r": 2}]),
    "gpt2": (gpt2, run_tokens, [{"r": 2}, {"target_modules": ["wte", "c_proj"], "r": 4}]),
    "normed": (Normed, run_normed, [{"r": 2, "target_modules": ["first"]}, {"r": 2, "target_modules": ["second"]}]),
    **{name: (family.make, partial(run_family, name=name), [{"r": 2}, {"r": 3}]) for name, family in FAMILIES.items()},
}


def base(name, dtype=torch.float64):
    torch.manual_seed(0)
    return ZOO[name][0]().to(dtype).eval()


def trained(model, fields, seed):
    inject(model, LoRAConfig(**{"r": 3, **fields}))
    return stir(model, size=0.2, seed=seed)


def adapters(name, folder, dtype=torch.float64):
    """The directory and the adapted model of every config in the zoo, by a letter."""
    configs = enumerate(zip("abc", ZOO[name][2], strict=False))
    models = {letter: trained(base(name, dtype), fields, seed) for seed, (letter, fields) in configs}
    return {letter: (save_adapter(model, folder / letter), model) for letter, model in models.items()}


def bank_of(name, folder, dtype=torch.float64):
    bank = AdapterBank(base(name, dtype))
    for letter, (directory, _) in adapters(name, folder, dtype).items():
        bank.load(letter, directory)
    return bank


def bank_over(model, *configs):
    """A model with adapters "a", "b", ... of these configs, the last one active."""
    bank = AdapterBank(model)
    for seed, (name, fields) in enumerate(zip("abcd", configs, strict=False)):
        bank.activate(None)
        trained(model, fields, seed)
        bank.add(name)
    return bank


def alone(name, directory, dtype=torch.float64):
    """The adapted model as `load_adapter` gives it on a base of its own."""
    model = base(name, dtype)
    load_adapter(model, directory)
    return model
