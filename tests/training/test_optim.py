"""The schedule against transformers' own."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lora_lightning import LoRAError, WarmupDecay


def rates(make, steps=20):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, seen = make(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("decay", "reference"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
@pytest.mark.parametrize(("warmup", "steps"), [(4, 4), (0.2, 4), (0, 0)])
def test_decay_is_that_of_transformers(decay, reference, warmup, steps):
    ours = rates(lambda o: WarmupDecay(o, warmup=warmup, decay=decay, total_steps=20))
    assert ours == pytest.approx(rates(lambda o: reference(o, steps, 20)))


def test_constant_stays_after_the_warm_up():
    assert rates(lambda o: WarmupDecay(o, warmup=2, decay="constant", total_steps=20))[2:] == [0.5] * 18


@pytest.mark.parametrize("warmup", [-0.1, 1.5])
def test_a_warm_up_that_means_nothing_is_refused(warmup):
    with pytest.raises(LoRAError, match="a share below 1 or a whole number"):
        rates(lambda o: WarmupDecay(o, warmup=warmup, total_steps=20))
