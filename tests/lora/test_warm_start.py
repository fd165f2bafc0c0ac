"""A run starts at an earlier run's adapter, bit for bit; only a head of another shape keeps its own start."""

import pytest
import torch

from lora_lightning import LoRAConfig, inject, save_adapter
from lora_lightning.lora.errors import AdapterError, AdapterWarning
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.init.from_adapter import start_from_directory, start_from_state
from tests.factories import bert, move, output
from tests.lora.bank_support import gpt2
from tests.lora.directories import of_peft, refused
from tests.lora.kinds import fields_of, inputs, net, shake

# What PEFT would read otherwise of these adapters.
pytestmark = pytest.mark.filterwarnings("ignore::lora_lightning.lora.errors.AdapterWarning")

OPTIONS = ["plain", "rslora", "dora", "lora_bias", "bias-all", "patterns", "bias-all-saved"]
sources = pytest.mark.parametrize("source", ["directory", "checkpoint"])


def start(source, model, first, config, folder, config_here=None, **allow):
    """Start `model` at what `first` was trained to, from its directory or from its checkpoint."""
    if source == "directory":
        return start_from_directory(model, save_adapter(first, folder), **allow)
    return start_from_state(model, state_of(first), config, config_here or config, fingerprint(first), **allow)


def state_of(model):
    return {key: tensor.detach().clone() for key, tensor in adapter_tensors(model).items()}


def earlier(config):
    """A trained model."""
    model = net()
    inject(model, config)
    return shake(model)


@sources
@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_w0_are_the_earlier_runs(option, source, tmp_path):
    config = LoRAConfig(**fields_of("Linear", option))
    first, second = earlier(config), net()
    inject(second, config)
    before, w0 = second(inputs()), fingerprint(second)
    found = start(source, second, first, config, tmp_path)
    assert torch.equal(second(inputs()), first(inputs()))
    assert not torch.equal(second(inputs()), before)
    assert fingerprint(second) == w0
    assert (found.tensors, found.own_start) == (len(adapter_tensors(second)), {})


def test_parts_of_a_fused_projection_and_token_rows_are_taken_over_and_others_refused(tmp_path):
    def injected(rows=(3, 1), parts=("q", "v")):
        model = gpt2().eval()
        fields = {"slices": {"c_attn": [*parts]}, "trainable_token_indices": {"wte": [*rows]}}
        inject(model, LoRAConfig(r=2, target_modules=["c_attn"], **fields))
        return model

    first, second, ids = move(injected()), injected(), torch.arange(10)[None]
    save_adapter(first, tmp_path, task_type="CAUSAL_LM")
    start_from_directory(second, tmp_path)
    assert torch.equal(output(second, ids), output(first, ids))
    with pytest.raises(AdapterError, match=r"trains other tokens of 'transformer\.wte'"):
        start_from_directory(injected(rows=(3, 2)), tmp_path)
    with pytest.raises(AdapterError, match=r"trained on the parts .*'q'.* this run says .*'k'"):
        start_from_directory(injected(parts=("k", "v")), tmp_path)


def heads(labels):
    torch.manual_seed(0)
    body = bert().bert.state_dict()
    model = bert(num_labels=labels).eval()
    model.bert.load_state_dict(body)
    return model


def hidden(model):
    return model.bert(torch.arange(1, 7)[None]).last_hidden_state


@sources
@pytest.mark.parametrize(("labels", "why"), [(2, "(3, 16) in the adapter, (2, 16) here"), (3, None)])
def test_a_head_of_another_shape_keeps_its_own_start_and_a_fitting_one_is_taken_over(labels, why, source, tmp_path):
    config, key = LoRAConfig(r=2, modules_to_save=["classifier"]), "classifier.lora_copy.weight"
    first, second = heads(3), heads(labels)
    for model in (first, second):
        inject(model, config)
    own = state_of(second)[key]
    found = start(source, second, move(first), config, tmp_path)
    assert torch.equal(hidden(second), hidden(first))
    assert torch.equal(adapter_tensors(second)[key], own if why else adapter_tensors(first)[key])
    assert found.own_start == ({"classifier": why} if why else {})
    assert found.tensors == len(adapter_tensors(second)) - 2 * bool(why)


def test_a_head_that_the_earlier_run_did_not_have_keeps_its_own_start(tmp_path):
    first, second = heads(3), heads(3)
    inject(first, LoRAConfig(r=2, exclude_modules=["pooler.dense"]))
    inject(second, LoRAConfig(r=2, modules_to_save=["classifier", "pooler"]))
    save_adapter(move(first), tmp_path, task_type="SEQ_CLS")
    start = start_from_directory(second, tmp_path)
    assert start.own_start == dict.fromkeys(["bert.pooler", "classifier"], "the adapter brings none")
    assert torch.equal(hidden(second), hidden(first))


def test_an_adapter_of_peft_is_taken_with_a_notice(tmp_path):
    theirs, model = of_peft(tmp_path, net(), target_modules=["up", "down"]), net()
    inject(model, LoRAConfig(r=2, alpha=5, target_modules=["up", "down"]))
    with pytest.warns(AdapterWarning):
        start_from_directory(model, tmp_path)
    torch.testing.assert_close(model(inputs()), theirs(inputs()))


CONFIG = {"r": 4, "alpha": 8, "target_modules": ["up", "down"], "modules_to_save": ["head"]}
MISFITS = [
    ({"r": 2, "alpha": 4}, r"'up\.lora_A(\.weight)?' has shape|lora_A.*has shape"),
    ({"alpha": 4}, r"trained with a scale of 2 in 'up', this run's is 1: set lora\.alpha"),
    ({"use_rslora": True}, r"trained with a scale of 2 in 'up', this run's is 4"),
    ({"alpha_pattern": {"down": 2}}, r"a scale of 2 in 'down', this run's is 0\.5"),
    ({"target_modules": ["up", "down", "square"]}, "missing .*square"),
    ({"target_modules": ["up"]}, "left over .*down"),
    ({"modules_to_save": None}, "another base|left over .*head"),
    ({"use_dora": True}, "missing .*magnitude"),
    ({"bias": "all"}, "missing .*bias"),
]


@sources
@pytest.mark.parametrize(("changes", "said"), MISFITS)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(changes, said, source, tmp_path):
    trained = LoRAConfig(**CONFIG)
    first = earlier(trained)
    config = LoRAConfig(**{**CONFIG, **changes})
    model = net()
    inject(model, config)
    options = {"load": lambda model, _: start(source, model, first, trained, tmp_path, config)}
    refused(tmp_path, said, model, **options)


@sources
def test_another_base_is_refused_unless_it_is_allowed(source, tmp_path):
    config = LoRAConfig(**CONFIG)
    first, model = earlier(config), net()
    with torch.no_grad():
        model.square.weight[0, 0] += 1
    inject(model, config)
    with pytest.raises(AdapterError, match=r"first square\.weight"):
        start(source, model, first, config, tmp_path)
    with pytest.warns(AdapterWarning, match="allow_other_base"):
        start(source, model, first, config, tmp_path, allow_other_base=True)
    assert torch.equal(adapter_tensors(model)["up.lora_B"], adapter_tensors(first)["up.lora_B"])


def test_a_start_that_is_subtracted_is_taken_from_a_checkpoint_and_not_from_a_directory(tmp_path):
    config = LoRAConfig(r=4, target_modules=["up", "down"], init="pissa")
    first = earlier(config)
    second = net()
    inject(second, config)
    save_adapter(first, tmp_path)
    with pytest.raises(AdapterError, match=r"lora\.init subtracts a start, in 'up'"):
        start_from_directory(second, tmp_path)
    start_from_state(second, state_of(first), config, config, fingerprint(first))
    assert torch.equal(second(inputs()), first(inputs()))
    plain, usual = net(), LoRAConfig(r=4, target_modules=["up", "down"])
    inject(plain, usual)
    with pytest.raises(AdapterError, match=r"left over .*lora_A0"):
        start_from_state(plain, state_of(first), config, usual, fingerprint(first))
