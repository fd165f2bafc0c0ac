"""The laws of the design, asked of every option of LoRAConfig on linear layers."""

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model

from lora_lightning import LoRAConfig, disabled, inject, load_adapter, merge, remove, save_adapter
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors, base_tensors
from lora_lightning.lora.inject import grafted_modules
from tests.lora.options_support import DTYPES, assert_close, batches, inputs, net, shake, square_loss, trained_tensors

OPTIONS = {
    "plain": {},
    "dropout": {"dropout": 0.5},
    "dropout_pattern": {"dropout_pattern": {"up": 0.5}},
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "dropout": 0.5},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"square": 2}},
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "exclude_modules": ["down"]},
    "dora-bias-all": {"use_dora": True, "bias": "all"},
    "lora_bias-bias-all": {"lora_bias": True, "bias": "all", "exclude_modules": ["down"]},
    "bias-all-saved": {"bias": "all", "modules_to_save": ["head"]},
    "kaiming": {"init": "kaiming"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "pissa_niter": {"init": "pissa_niter_4"},
    "olora": {"init": "olora"},
    "eva": {"init": "eva"},
    "lora_ga": {"init": "lora_ga"},
    "pissa-dora-rslora": {"init": "pissa", "use_dora": True, "use_rslora": True, "alpha_pattern": {"square": 3.0}},
    "olora-all": {"init": "olora", "lora_bias": True, "bias": "all", "dropout": 0.3, "exclude_modules": ["down"]},
}
DATA = {"eva", "lora_ga"}
each_option = pytest.mark.parametrize("option", OPTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def adapted(option, dtype=torch.float32, seed=0):
    model = net(dtype, seed)
    needs_data = OPTIONS[option].get("init") in DATA
    data = {"data": batches(dtype), "loss": square_loss} if needs_data else {}
    inject(model, LoRAConfig(r=4, alpha=6, **OPTIONS[option]), **data)
    return model


@each_dtype
@each_option
def test_fresh_adapter_changes_nothing(option, dtype):
    model, x = adapted(option, dtype), inputs(dtype)
    expected = net(dtype)(x)
    assert torch.equal(model(x), expected)
    assert torch.equal(model.train()(x), expected)


@each_dtype
@each_option
def test_w0_never_moves(option, dtype):
    model, x = adapted(option, dtype).train(), inputs(dtype)
    before = {key: tensor.clone() for key, tensor in base_tensors(model).items()}
    print_before = fingerprint(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    first = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).float().square().sum().backward()
        optimizer.step()
    assert fingerprint(model).digest == print_before.digest
    assert all(torch.equal(tensor, before[key]) for key, tensor in base_tensors(model).items())
    assert all(not torch.equal(a, b) for a, b in zip(first, trained, strict=True))


@each_option
def test_exactly_the_adapter_trains_and_every_gradient_is_finite(option):
    model = shake(adapted(option)).train()
    model(inputs()).square().sum().backward()
    wanted = trained_tensors(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n in wanted)
    assert all(p.grad is None for n, p in model.named_parameters() if n not in wanted)


@each_option
def test_base_keys_survive_and_layers_stay_instances(option):
    plain, model = net(), adapted(option)
    assert plain.state_dict().keys() <= model.state_dict().keys()
    for name, module in plain.named_modules():
        assert isinstance(model.get_submodule(name), type(module))


@each_dtype
@each_option
def test_merged_equals_adapted(option, dtype):
    model, x = shake(adapted(option, dtype)), inputs(dtype)
    expected = model(x)
    report = merge(model)
    plain = net(dtype)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_close(model(x), expected, dtype)
    assert not report.untied
    assert not report.dequantized


@each_option
def test_bfloat16_base_trains_float32_adapters(option):
    model = adapted(option, torch.bfloat16)
    names = trained_tensors(model)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n in names and "lora_copy" not in n)


@each_option
def test_disabled_and_remove_give_the_backbone_back(option):
    model, x, expected = shake(adapted(option)), inputs(), net()(inputs())
    adapted_output = model(x)
    with disabled(model):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), adapted_output)
    assert not torch.equal(adapted_output, expected)
    remove(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    assert list(model.state_dict()) == list(net().state_dict())
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in net().modules()]
    assert torch.equal(model(x), expected)
    inject(model, LoRAConfig(r=2))  # and it may be adapted again


@each_option
def test_copies_and_pickles_compute_the_same(option):
    model, x = shake(adapted(option)), inputs()
    expected = model(x)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    unpickled = torch.load(buffer, weights_only=False)
    shake(model, seed=9)
    assert torch.equal(twin(x), expected)
    assert torch.equal(unpickled(x), expected)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    remove(unpickled)
    assert torch.equal(unpickled(x), net()(x))


@each_dtype
@each_option
def test_what_is_saved_is_what_is_loaded(option, dtype, tmp_path):
    model, x = shake(adapted(option, dtype)), inputs(dtype)
    save_adapter(model, tmp_path / "a")
    loaded = net(dtype)
    load_adapter(loaded, tmp_path / "a")
    assert_close(loaded(x), model(x), dtype)
    save_adapter(loaded, tmp_path / "b")
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()
    if "lora_A0" not in model.up.lora_tensors():  # a start is exported as one adapter of twice the rank
        assert torch.equal(loaded(x), model(x))


@each_option
def test_peft_opens_ours_with_the_same_outputs(option, tmp_path):
    model, x = shake(adapted(option, torch.float64)), inputs(torch.float64)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(net(torch.float64), tmp_path)
    assert_close(theirs(x), model(x), torch.float64)


PEFT_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in {"eva", "lora_ga", "dropout_pattern", "kaiming"}])
def test_we_open_peft_with_the_same_outputs(option, tmp_path):
    from peft import LoraConfig

    settings = {"r": 4, "alpha": 6, **OPTIONS[option]}
    excluded = settings.pop("exclude_modules", [])
    settings["target_modules"] = [name for name in ("up", "down", "square") if name not in excluded]
    settings.pop("init", None)  # the saved tensors are an adapter's whatever they started from
    base = net(torch.float64)
    theirs = get_peft_model(base, LoraConfig(**{PEFT_NAMES.get(k, k): v for k, v in settings.items()})).eval()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "lora_" in name)
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours = net(torch.float64)
    load_adapter(ours, tmp_path)
    x = inputs(torch.float64)
    assert_close(ours(x), theirs(x), torch.float64)
    save_adapter(ours, tmp_path / "again")
    assert_close(PeftModel.from_pretrained(net(torch.float64), tmp_path / "again")(x), theirs(x), torch.float64)


@pytest.mark.parametrize("option", [o for o in OPTIONS if OPTIONS[o].get("init") not in DATA])
def test_injection_on_the_meta_device_then_filling(option):
    with torch.device("meta"):
        model = net()
    inject(model, LoRAConfig(r=4, alpha=6, **OPTIONS[option]))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    missing = model.load_state_dict(net().state_dict(), strict=False).missing_keys
    assert set(missing) == set(adapter_tensors(model))
    for _, module in grafted_modules(model):
        module.reset_lora_parameters()
    assert torch.equal(model(inputs()), net()(inputs()))
    assert not torch.equal(shake(model)(inputs()), net()(inputs()))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}, {"init": "pissa"}], ids=str)
def test_dynamo_traces_every_option_in_one_graph(options):
    model, x = net(), inputs()
    inject(model, LoRAConfig(r=2, **options))
    shake(model)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
