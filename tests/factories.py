"""Small models of several families, and LoRA's formula written a second time, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn


class Own(nn.Module):
    """A user's module: a missing bias, an unused slot, a layer used in two places, a name with regex characters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a+b (c)": nn.Linear(8, 8, bias=False), "a": nn.Linear(8, 8)})
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 12)
        self.again = self.second
        self.nothing = None
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)
        self.overhead = nn.Linear(3, 3)
        self.lm_head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner["a"](torch.tanh(self.inner["a+b (c)"](x)))
        x = self.again(torch.tanh(self.second(self.first(x))))
        return self.lm_head(self.overhead(self.head(self.norm(x))))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12, bias=False), nn.Tanh(), nn.Linear(12, 4))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def bert(**changes: Any) -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(**{**_sizes(), "num_labels": 3, **changes}))


def llama(**changes: Any) -> nn.Module:
    sizes = {**_sizes(), "num_key_value_heads": 1, "pad_token_id": 0, **changes}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes))


def gpt(**changes: Any) -> nn.Module:
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**{**_sizes(), "rotary_pct": 1.0, **changes}))


def hf(model: str, config: str = "", **sizes: Any) -> nn.Module:
    """A small model of transformers by the name of its class, with the same weights each time."""
    torch.manual_seed(0)
    config = config or f"{model.partition('For')[0].removesuffix('Model')}Config"
    return getattr(tf, model)(getattr(tf, config)(**sizes))


def _sizes() -> dict[str, Any]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return {**sizes, "vocab_size": 40, "max_position_embeddings": 16, "attn_implementation": "eager"}


@dataclass(frozen=True)
class Family:
    """A model, an input for it, and its output as one tensor."""

    name: str
    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    tokens: bool = False

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same weights each time, in eval mode."""
        torch.manual_seed(1)
        return self.make().to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        random = torch.Generator().manual_seed(2)
        if self.tokens:
            return torch.randint(1, 40, self.shape, generator=random)
        return torch.randn(self.shape, generator=random, dtype=torch.float64).to(dtype)

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return output(model, self.inputs(dtype))


FAMILIES = {
    family.name: family
    for family in [
        Family("sequential", sequential, (5, 8)),
        Family("own", Own, (2, 3, 8)),
        Family("encoder", encoder, (2, 5, 16)),
        Family("bert", bert, (3, 6), tokens=True),
        Family("llama", llama, (2, 6), tokens=True),
        Family("gpt", gpt, (2, 6), tokens=True),
    ]
}


HEADS = {
    "sequential": "4",
    "own": "head",
    "encoder": "layers.1.norm2",
    "bert": "classifier",
    "llama": "lm_head",
    "gpt": "lm_head",
}
"""What of each family may train in full."""


def output(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def move(model: nn.Module, size: float = 0.3) -> nn.Module:
    """As if trained: random numbers in all that trains."""
    random = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            parameter.add_((size * noise).to(parameter.dtype))
    return model


def factors(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """A and B of one module in float64."""
    state = model.state_dict()
    return state[f"{name}.lora_A"].double(), state[f"{name}.lora_B"].double()


@torch.no_grad()
def folded(plain: nn.Module, adapted: nn.Module, scales: dict[str, float]) -> nn.Module:
    """`plain` in float64 with W0 + s B A by hand in the named modules: the formula, with no code of the package."""
    model = copy.deepcopy(plain).double()
    for name, scale in scales.items():
        A, B = factors(adapted, name)
        module = model.get_submodule(name)
        weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
        weight += scale * (B @ A)
    return model


def distance(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest entry wanted."""
    assert got.shape == wanted.shape
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that must be the same in a model that is "as before": values, classes, modes, what trains, hooks."""
    return {
        "state": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "classes": [(n, type(m)) for n, m in model.named_modules(remove_duplicate=False)],
        "modes": [(n, m.training) for n, m in model.named_modules()],
        "trains": [(n, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
        "hooks": [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        "attributes": [(n, sorted(m.__dict__)) for n, m in model.named_modules()],
    }


def assert_same(model: nn.Module, before: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    now = snapshot(model)
    for part in before.keys() - {"state", *but}:
        assert now[part] == before[part], part
    if "state" not in but:
        assert now["state"].keys() == before["state"].keys()
        for key, value in before["state"].items():
            assert torch.equal(now["state"][key], value), key


def export_of(module, folder, batch=None, **options):
    """`export` of a LoRAModule's parts."""
    from lora_lightning.export.export import export

    w0 = module.w0_fingerprint()
    return export(module.backbone, module.task, w0, folder, batch=batch, example=module.example_input_array, **options)
