"""`nn.Conv1d/2d/3d` beside the laws, whose geometry is drawn in `test_properties.py`: groups in PEFT, subclasses."""

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lightning import inject, merge
from lora_lightning.lora.errors import AdapterError
from tests.lora.kinds import KINDS
from tests.lora.laws import check_peft_opens_ours, check_we_open_pefts, config, relative, stir

GROUPED = KINDS["Conv2d grouped"]


def test_unbatched_input():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    inject(model, config(target_modules=["0"]))
    stir(model)
    x = torch.randn(4, 5, 5)
    assert torch.allclose(model(x), model(x[None])[0], atol=1e-6)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_peft_opens_ours_of_a_grouped_convolution_and_its_own_that_no_weight_can_hold_is_refused(tmp_path):
    theirs = check_peft_opens_ours(GROUPED.make, GROUPED.run, config(target_modules=["1"]), tmp_path)
    assert theirs.base_model.model[1].lora_A["default"].weight.shape == (2, 4, 3, 3)
    with pytest.raises(AdapterError, match="reaches across groups"):
        check_we_open_pefts(GROUPED.make, GROUPED.run, peft.LoraConfig(r=2, target_modules=["1"]), tmp_path)


def test_a_subclass_that_calls_super_is_adapted():
    class Padded(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(F.pad(x, (0, 1, 0, 1)))

    model, x = nn.Sequential(Padded(4, 4, 3)).double(), torch.randn(1, 4, 5, 5, dtype=torch.float64)
    inject(model, config(target_modules=["0"]))
    adapted = stir(model)(x)
    merge(model)
    assert relative(model(x), adapted) < 1e-12
