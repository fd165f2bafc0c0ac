"""Places where a module's weight is read and the module not called: handled, or refused by name (law 4)."""

import copy

import pytest
import torch
from torch import nn

from lora_lightning import inject, merge, remove
from lora_lightning.lora.errors import TargetError
from tests.lora.laws import config, relative, stir


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("saved", ["layers.0.linear1", "layers.1.self_attn.out_proj", "layers.0.self_attn"])
@torch.no_grad()
def test_a_module_to_save_inside_an_encoder_layer_counts_in_eval(saved):
    plain, x = encoder(), torch.randn(2, 3, 8)
    model = copy.deepcopy(plain)
    inject(model, config(target_modules=["layers.0.linear2"], modules_to_save=[saved]))
    before = model(x)
    assert torch.allclose(before, plain(x), atol=1e-5)
    for parameter in model.get_submodule(saved).lora_copy.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    changed = model(x)
    assert relative(changed, before) > 1e-3
    merge(model)
    assert relative(model(x), changed) < 1e-5
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_a_parameter_and_a_module_of_one_attention_together():
    plain, x = encoder(), torch.randn(2, 3, 8)
    chosen = config(target_modules=["out_proj"], target_parameters=["self_attn.in_proj_weight"])
    model = copy.deepcopy(plain)
    inject(model, chosen)
    with torch.no_grad():
        stir(model)
        adapted = model(x)
    removed = remove(copy.deepcopy(model))
    assert [type(m) for m in removed.modules()] == [type(m) for m in plain.modules()]
    assert relative(removed(x), plain(x)) < 1e-6
    assert relative(adapted, plain(x)) > 1e-3
    merge(model)
    assert relative(model(x), adapted) < 1e-5
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_a_weight_that_its_parent_reads_is_adapted_as_a_parameter():
    """BEiT's attention in timm reads `qkv.weight` and does not call `qkv`."""
    from timm.models.beit import Attention

    torch.manual_seed(0)
    plain, x = nn.ModuleDict({"attn": Attention(8, 2, qkv_bias=True)}), torch.randn(2, 3, 8)
    model = copy.deepcopy(plain)
    inject(model, config(target_modules=[], target_parameters=["qkv.weight"]))
    assert torch.equal(model["attn"](x), plain["attn"](x))
    stir(model)
    adapted = model["attn"](x)
    adapted.sum().backward()
    assert model["attn"].qkv.get_submodule("lora_of_weight").lora_B.grad.any()
    merge(model)
    assert relative(model["attn"](x), adapted) < 1e-5
    assert relative(adapted, plain["attn"](x)) > 1e-3


def deberta():
    from transformers import DebertaV2Config, DebertaV2Model

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
    torch.manual_seed(0)
    return DebertaV2Model(DebertaV2Config(**sizes, **relative, vocab_size=40, initializer_range=0.4)).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["rel_embeddings"]},
        {"modules_to_save": ["rel_embeddings"]},
        {"trainable_token_indices": {"rel_embeddings": [1]}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_debertas_table_which_its_encoder_reads_whole_is_refused_by_name(fields):
    model = deberta()
    keys = list(model.state_dict())
    with pytest.raises(TargetError, match=r"'encoder.rel_embeddings': DebertaV2Encoder reads its weight"):
        inject(model, config(**fields))
    assert list(model.state_dict()) == keys


def test_debertas_table_is_adapted_as_a_parameter():
    model, ids = deberta(), torch.tensor([[1, 5, 9, 2, 7, 3]])
    before = model(ids)[0]
    inject(model, config(target_modules=[], target_parameters=["rel_embeddings.weight"]))
    assert torch.equal(model(ids)[0], before)
    adapted = stir(model)(ids)[0]
    assert relative(adapted, before) > 1e-3
    merge(model)
    assert relative(model(ids)[0], adapted) < 1e-5


class Reader(nn.Module):
    """Reads its children's weights in each way that models do; all but `called` are never called."""

    def __init__(self):
        super().__init__()
        names = ["returned", "indexed", "reshaped", "assigned", "called", "asked", "elsewhere"]
        for name in names:
            setattr(self, name, nn.Embedding(4, 4))

    def table(self):
        return self.returned.weight

    def forward(self, x):
        assert self.asked.weight is not None
        start = self.assigned.weight
        x = self.table()[x] + self.indexed.weight[x] + self.reshaped.weight.unsqueeze(0)[0][x] + start[x]
        return x.to(self.asked.weight.dtype) + self.called.weight[0] + self.called(x.long() % 4)

    def initialise(self):
        self.elsewhere.weight.zero_()


def test_every_way_of_reading_a_weight_is_seen():
    model = nn.Sequential(Reader(), nn.Linear(4, 4))
    for name in ("returned", "indexed", "reshaped", "assigned"):
        with pytest.raises(TargetError, match=f"cannot adapt '0.{name}': Reader reads its weight"):
            inject(model, config(target_modules=[name]))
    inject(model, config(target_modules=["called", "asked", "elsewhere"]))


def cast_like(x, weight, *, shape=None):
    assert weight.isfinite().all(), f"not finite: {weight}"
    return x.to(weight.dtype, copy=weight.shape == shape)


def product(x, weight):
    return x @ weight


def in_place(out, weight):
    out.add_(weight[0])


def handed_on(x, weight):
    return product(x, weight)


def masked(x, weight):
    return x * (weight > 0)[0]


def down(x, weight):
    return x if weight is None else down(x @ weight, weight.weight)


class Looker(nn.Module):
    """Has a child, and methods to help its forward."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def method(self, x, weight):
        return x.type_as(weight)

    @staticmethod
    def static(weight, x):
        return weight.new_zeros(4) + x


def as_type(self, x):
    return self.a(x.type_as(self.a.weight))


def as_to(self, x):
    return self.a(x.to(self.a.weight))


def zeros(self, x):
    return self.a(x) + torch.zeros_like(self.a.weight)[0]


def new(self, x):
    return self.a(x) + self.a.weight.new_zeros(4)


def finite(self, x):
    return self.a(x) if torch.isfinite(self.a.weight).all() else x


def told(self, x):
    print(self.a.weight.norm(), self.a.weight)
    return self.a(x)


def claimed(self, x):
    assert torch.nan_to_num(self.a.weight).any(), self.a.weight
    return self.a(x)


def helped(self, x):
    return self.a(cast_like(x, self.a.weight))


def helped_by_name(self, x):
    return self.a(cast_like(weight=self.a.weight, x=x, shape=None))


def helped_by_method(self, x):
    return self.a(self.method(x, self.a.weight))


def helped_by_static(self, x):
    return self.a(self.static(self.a.weight, x))


def product_too(self, x):
    return self.a(x) + product(x, self.a.weight)


def in_place_too(self, x):
    in_place(x, self.a.weight)
    return self.a(x)


def handed_on_too(self, x):
    return self.a(x) + handed_on(x, self.a.weight)


def masked_too(self, x):
    return self.a(x) + masked(x, self.a.weight)


def recursive_too(self, x):
    return self.a(x) + down(x, self.a.weight)


def linear_too(self, x):
    return self.a(x) + nn.functional.linear(x, self.a.weight)


def unpacked_too(self, x):
    return self.a(x) + cast_like(*(x,), self.a.weight)


def local_too(self, x):
    cast_like = product
    return self.a(x) + cast_like(x, self.a.weight)


LOOKS = [as_type, as_to, zeros, new, finite, told, claimed, helped, helped_by_name, helped_by_method, helped_by_static]
USES = [masked_too, recursive_too, product_too, in_place_too, handed_on_too, linear_too, unpacked_too, local_too]


def looker(forward):
    return nn.Sequential(type("Looks", (Looker,), {"forward": forward, "__module__": __name__})())


@pytest.mark.parametrize("forward", LOOKS)
@torch.no_grad()
def test_a_layer_that_is_called_and_only_looked_at_is_adapted_and_its_adapter_counts(forward):
    model, x = looker(forward), torch.randn(2, 4)
    plain = model(x)
    inject(model, config(target_modules=["a"]))
    adapted = stir(model)(x)
    layer = model[0].a
    wanted = plain + layer.lora_settings.scale * x @ layer.lora_A.T @ layer.lora_B.T
    assert relative(adapted, wanted) < 1e-5
    assert relative(adapted, plain) > 1e-3


@pytest.mark.parametrize("forward", USES)
def test_a_weight_that_goes_into_what_is_computed_is_refused_though_the_layer_is_called(forward):
    with pytest.raises(TargetError, match=r"cannot adapt '0\.a': Looks reads its weight"):
        inject(looker(forward), config(target_modules=["a"]))


@pytest.mark.parametrize("nested", [True, False])
def test_what_torchs_encoder_lets_one_assign_can_be_assigned_after_injection(nested):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    inject(model, config(target_modules=["linear1"]))
    model.use_nested_tensor = nested
    model.layers[0].activation_relu_or_gelu = 2
    remove(model)
    assert model.use_nested_tensor is nested
    assert model.layers[0].activation_relu_or_gelu == 2


def test_layers_to_transform_holds_for_parameters_too():
    chosen = config(target_modules=[], target_parameters=["in_proj_weight"], layers_to_transform=[1])
    assert [row.module for row in inject(encoder(), chosen).modules] == ["layers.1.self_attn.in_proj_weight"]


def test_a_lazy_layer_is_refused_by_name():
    with pytest.raises(TargetError, match="cannot adapt '0': it is lazy"):
        inject(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), config(target_modules=["0"]))


def test_token_rows_of_a_module_to_save_are_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    chosen = config(target_modules=["1"], modules_to_save=["0"], trainable_token_indices={"0": [1]})
    with pytest.raises(TargetError, match="in '0' of modules_to_save"):
        inject(model, chosen)
