"""`nn.Conv1d/2d/3d` over their whole geometry."""

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lora_lightning import inject, merge
from lora_lightning.lora.errors import AdapterError, TargetError
from tests.lora.laws import (
    TOLERANCE,
    check_laws,
    check_meta,
    check_peft_opens_ours,
    check_we_open_pefts,
    config,
    dtypes,
    relative,
    stir,
)

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ["zeros", "reflect", "replicate", "circular"]


def net(dims, **kwargs):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(CONVS[dims](4, 6, 3, **kwargs), nn.Tanh(), CONVS[dims](6, 4, 1))

    return make


def run_on(dims, size=6):
    def run(model):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 4, *[size] * dims, generator=generator, dtype=torch.float64)
        return model(x.to(next(model.parameters()).dtype))

    return run


@dtypes
@pytest.mark.parametrize(
    ("dims", "mode"), [(1, "circular"), (2, "zeros"), (2, "reflect"), (2, "replicate"), (2, "circular"), (3, "zeros")]
)
def test_laws(dims, mode, dtype, tmp_path):
    make = net(dims, stride=2, padding=1, dilation=2, padding_mode=mode)
    report = check_laws(make, run_on(dims), config(target_modules=["0", "2"]), dtype, tmp_path)
    assert [row.kind for row in report.modules] == [f"Conv{dims}d"] * 2


@dtypes
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_laws_with_groups(dims, dtype, tmp_path):
    check_laws(net(dims, padding=1, groups=2), run_on(dims), config(target_modules=["0"]), dtype, tmp_path)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_merged_equals_adapted_over_drawn_geometry(data):
    dims, groups = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 3]))
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(data.draw(st.integers(1, 2)) for _ in range(dims))
    same = data.draw(st.booleans())
    padding = "same" if same else tuple(data.draw(st.integers(0, 2)) for _ in range(dims))
    stride = 1 if same else tuple(data.draw(st.integers(1, 3)) for _ in range(dims))
    module = CONVS[dims](
        groups * data.draw(st.integers(1, 2)),
        groups * data.draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=data.draw(st.sampled_from(MODES)),
        bias=data.draw(st.booleans()),
    ).double()
    model = nn.Sequential(module)
    x = torch.randn(2, module.in_channels, *[5] * dims, dtype=torch.float64)
    inject(model, config(r=groups, target_modules=["0"]))
    stir(model)
    adapted = model(x)
    assert model[0].delta_weight().shape == module.weight.shape
    merge(model)
    assert relative(model(x), adapted) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_the_formulas(groups):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=groups)).double()
    inject(model, config(target_modules=["0"]))
    stir(model)
    layer, x = model[0], torch.randn(2, 4, 7, 7, dtype=torch.float64)
    A, B = (t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    # The dense update, entry by entry: group g's outputs see group g's factors only.
    blocks = []
    for g in range(groups):
        a, b = A[g * 2 // groups : (g + 1) * 2 // groups], B[g * 6 // groups : (g + 1) * 6 // groups, :, 0, 0]
        blocks.append(torch.einsum("or,rikl->oikl", b, a))
    delta = 1.5 * torch.cat(blocks)
    assert torch.allclose(layer.delta_weight(), delta, atol=1e-14)
    want = F.conv2d(x, layer.weight + delta, layer.bias, 2, 1, 2, groups)
    got = model(x)
    assert torch.allclose(got, want, atol=1e-12)
    weights = torch.randn_like(want)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    assert torch.allclose(layer.lora_A.grad, A.grad, atol=1e-11)
    assert torch.allclose(layer.lora_B.grad, B.grad, atol=1e-11)


def test_dropout_is_honoured_in_training_only():
    model = net(2)()
    inject(model, config(target_modules=["0"], dropout=0.5))
    stir(model)
    run = run_on(2)
    assert not torch.equal(run(model.train()), run(model))
    assert torch.equal(run(model.eval()), run(model))


def test_unbatched_input():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    inject(model, config(target_modules=["0"]))
    stir(model)
    x = torch.randn(4, 5, 5)
    assert torch.allclose(model(x), model(x[None])[0], atol=1e-6)


def test_meta():
    check_meta(net(2, groups=2), config(target_modules=["0", "2"]))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_peft_opens_ours_and_we_open_pefts(dims, tmp_path):
    make, run = net(dims, stride=2, padding=1), run_on(dims)
    check_peft_opens_ours(make, run, config(target_modules=["0", "2"]), tmp_path)
    check_we_open_pefts(make, run, peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"]), tmp_path)


@dtypes
@pytest.mark.parametrize(("dims", "groups"), [(1, 1), (2, 2), (3, 1)])
def test_laws_with_a_bias_of_b(dims, groups, dtype, tmp_path):
    make, chosen = net(dims, padding=1, groups=groups), config(target_modules=["0"], lora_bias=True)
    report = check_laws(make, run_on(dims), chosen, dtype, tmp_path)
    assert report.modules[0].parameters == 2 * (4 // groups) * 3**dims + 6 * (2 // groups) + 6


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_bias_of_b_is_pefts_both_ways(dims, tmp_path):
    make, run = net(dims, stride=2, padding=1), run_on(dims)
    check_peft_opens_ours(make, run, config(target_modules=["0", "2"], lora_bias=True), tmp_path)
    theirs = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"], lora_bias=True)
    check_we_open_pefts(make, run, theirs, tmp_path)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_peft_opens_ours_of_a_grouped_convolution(tmp_path):
    theirs = check_peft_opens_ours(net(2, groups=2), run_on(2), config(target_modules=["0"]), tmp_path)
    assert theirs.base_model.model[0].lora_A["default"].weight.shape == (2, 4, 3, 3)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_pefts_grouped_convolution_that_no_weight_can_hold_is_refused(tmp_path):
    theirs = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0"])
    with pytest.raises(AdapterError, match="reaches across groups"):
        check_we_open_pefts(net(2, groups=2), run_on(2), theirs, tmp_path)


def test_refusals_name_the_layer():
    with pytest.raises(TargetError, match="cannot adapt '0': it has 4 groups and r=2 is no multiple"):
        inject(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)), config(target_modules=["0"]))
    with pytest.raises(TargetError, match=r"r=5 is larger than the layer '0' allows \(4"):
        inject(nn.Sequential(nn.Conv1d(4, 8, 1)), config(r=5, target_modules=["0"]))
    with pytest.raises(TargetError, match="ConvTranspose2d, which has no LoRA form"):
        inject(nn.Sequential(nn.ConvTranspose2d(4, 8, 3)), config(target_modules=["0"]))


def test_a_subclass_that_reads_its_weight_itself_is_refused_and_one_that_calls_super_is_adapted():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean())

    class Padded(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(F.pad(x, (0, 1, 0, 1)))

    with pytest.raises(TargetError, match="cannot adapt '0': Standardised has a forward of its own"):
        inject(nn.Sequential(Standardised(4, 4, 3)), config(target_modules=["0"]))
    model = nn.Sequential(Padded(4, 4, 3)).double()
    inject(model, config(target_modules=["0"]))
    stir(model)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    adapted = model(x)
    merge(model)
    assert relative(model(x), adapted) < 1e-12
