"""The bank on quantized bases: W0's bytes stay, adapters follow each other bit for bit, rows have their own."""

import pytest
import torch

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao.quantization")

from lora_lightning import AdapterBank
from lora_lightning.lora.frozen.fingerprint import fingerprint
from tests.lora.bank_support import trained
from tests.lora.test_quantized import SCHEMES, adapted, float_net, inputs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_adapters_on_a_quantized_base(scheme):
    model, wanted = SCHEMES[scheme](float_net()), fingerprint(adapted(scheme)).digest
    x, names = inputs().repeat(2, 1, 1)[:3], ["b", None, "a"]
    bank, outs = AdapterBank(model), {None: model(x)}
    for name, fields in (("a", {"r": 2}), ("b", {"r": 4, "use_dora": True})):
        bank.activate(None)
        trained(model, fields, seed=len(outs))
        bank.add(name)
        outs[name] = model(x)
    for name in ("a", None, "b", "a"):
        bank.activate(name)
        assert torch.equal(model(x), outs[name])
        assert fingerprint(model).digest == wanted
    with bank.rows(names):
        got = model(x)
    for i, name in enumerate(names):
        # int8's forward also rounds the inputs to 8 bits, where a last bit more or less may turn a number.
        assert (got[i] - outs[name][i]).abs().max() < (2e-2 if scheme == "int8" else 1e-5) * outs[name].abs().max()
    bank.combine("mix", {"a": 1.0}, "svd", rank=1)
    assert fingerprint(model).digest == wanted
