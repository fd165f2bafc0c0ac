"""Law: an adapter's files that met an accident are refused in one clear error, or load as what they say.

    LORA_FUZZ=100000 pytest tests/lora/test_fuzz.py --hypothesis-seed 5

runs another and a longer draw; without it the draw is the same each time.
"""

from __future__ import annotations

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS
from tests.lora.accidents import CONFIGS, TENSORS, flip_data
from tests.lora.fuzz_support import Origin, examples


@pytest.fixture(scope="module", params=["ours", "peft"])
def origin(request, tmp_path_factory):
    return Origin(request.param, tmp_path_factory.mktemp(request.param))


@examples(600)
@given(accident=st.sampled_from(TENSORS), seed=st.integers(0, 2**64))
def test_weights_that_met_an_accident(origin, accident, seed):
    result = origin.meet(accident, WEIGHTS, seed)
    event(f"{accident.__name__}: {result}")  # shown by --hypothesis-show-statistics
    if origin.ours and accident is flip_data:
        assert result == "refused"


@examples(300)
@given(accident=st.sampled_from(CONFIGS), seed=st.integers(0, 2**64))
def test_a_config_that_met_an_accident(origin, accident, seed):
    event(f"{accident.__name__}: {origin.meet(accident, CONFIG, seed)}")
