"""Small models with an adapter of every kind and option, for the tests of the bank."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lora_lightning import AdapterBank, LoRAConfig, inject, load_adapter, save_adapter
from tests.factories import FAMILIES
from tests.lora.kinds import KINDS, Attended, Mixture, Tied, inputs, net, run_attended
from tests.lora.kinds import run_ids as run_tied
from tests.lora.kinds import run_six as run_mixture


class Normed(nn.Module):
    """Batch statistics between two convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Conv1d(6, 4, 1)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


def run_normed(model):
    x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model(x.to(model.first.weight.dtype))


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation="eager"))


def run_gpt2(model):
    return model(torch.randint(1, 40, (3, 6), generator=torch.Generator().manual_seed(2))).logits


def run_net(model):
    return model(inputs(model.up.weight.dtype))


def with_kdim():
    torch.manual_seed(0)
    return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=6, vdim=4)})


def run_kdim(model):
    random = torch.Generator().manual_seed(1)
    dtype = model["attention"].out_proj.weight.dtype
    q, k, v = (
        torch.randn(n, 2, w, generator=random, dtype=torch.float64).to(dtype) for n, w in [(3, 8), (5, 6), (5, 4)]
    )
    return model["attention"](q, k, v)[0]


def of_kind(name):
    return KINDS[name].make, KINDS[name].run


# By name: a model, its output, and configs of adapters that can share its base.
ZOO = {
    "linear": (net, run_net, [{"r": 2}, {"r": 4, "use_rslora": True, "target_modules": ["up", "square"]}]),
    "dora": (net, run_net, [{"r": 2, "use_dora": True}, {"r": 3}]),
    "heads": (net, run_net, [{"r": 2, "modules_to_save": ["head"]}, {"modules_to_save": ["norm"], "dropout": 0.1}]),
    "biases": (net, run_net, [{"r": 2, "bias": "all"}, {"bias": "lora_only", "target_modules": ["square"]}]),
    "lora_bias": (net, run_net, [{"r": 2, "lora_bias": True, "exclude_modules": ["down"]}, {"r": 1}]),
    "starts": (net, run_net, [{"r": 2, "init": "pissa"}, {"r": 4, "init": "orthogonal"}, {"r": 3, "init": "olora"}]),
    "tokens": (
        Tied,
        run_tied,
        [{"trainable_token_indices": {"embed": [1, 5]}, "target_modules": []}, {"target_modules": ["embed"], "r": 2}],
    ),
    "experts": (Mixture, run_mixture, [{"target_parameters": ["up", "mix"]}, {"target_parameters": ["down"], "r": 2}]),
    "slices": (gpt2, run_gpt2, [{"slices": {"c_attn": ["q", "v"]}}, {"slices": {"c_attn": ["v"]}, "r": 2}, {"r": 3}]),
    "gpt2": (gpt2, run_gpt2, [{"r": 2}, {"target_modules": ["wte", "c_proj"], "r": 4}]),
    "conv": (*of_kind("Conv2d"), [{"target_modules": ["1"], "r": 2}, {"target_modules": ["1"], "r": 4}]),
    "groups": (*of_kind("Conv2d grouped"), [{"target_modules": ["1"], "r": 2}, {"target_modules": ["1"], "r": 4}]),
    "embedding": (
        *of_kind("Embedding"),
        [{"target_modules": ["0"], "r": 2}, {"target_modules": ["0", "2"], "r": 3}],
    ),
    "attention": (Attended, run_attended, [{"r": 2}, {"target_modules": ["attention.out_proj"], "r": 4}]),
    "kdim": (with_kdim, run_kdim, [{"r": 2, "target_modules": ["attention"]}, {"r": 4}]),
    "normed": (Normed, run_normed, [{"r": 2, "target_modules": ["first"]}, {"r": 2, "target_modules": ["second"]}]),
    **{
        f.name: (f.make, lambda model, f=f: f.run(model, next(model.parameters()).dtype), [{"r": 2}, {"r": 3}])
        for f in FAMILIES.values()
    },
}


def base(name, dtype=torch.float64):
    torch.manual_seed(0)
    return ZOO[name][0]().to(dtype).eval()


def trained(model, fields, seed):
    """An adapted `model`, as if trained."""
    inject(model, LoRAConfig(**{"r": 3, **fields}))
    return shake(model, seed)


@torch.no_grad()
def shake(model, seed, size=0.2):
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            parameter.add_((size * noise).to(parameter.dtype))
    return model


def adapters(name, folder, dtype=torch.float64):
    """The directory and the adapted model of every config in the zoo, by a letter."""
    configs = enumerate(zip("abc", ZOO[name][2], strict=False))
    models = {letter: trained(base(name, dtype), fields, seed) for seed, (letter, fields) in configs}
    return {letter: (save_adapter(model, folder / letter), model) for letter, model in models.items()}


def bank_of(name, folder, dtype=torch.float64):
    """One base with all of them loaded."""
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
