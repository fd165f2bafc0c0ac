"""Fixtures for all tests. Models and references are in `tests/factories.py`."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from tests.factories import FAMILIES, Family

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

hypothesis.settings.register_profile("lora", deadline=None, derandomize=True, max_examples=30, database=None)
hypothesis.settings.load_profile("lora")

# By dtype, how far two ways of computing one output may be apart, relative to its largest entry.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=list(FAMILIES))
def family(request) -> Family:
    """Each small model in turn."""
    return FAMILIES[request.param]


@pytest.fixture(params=list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def tolerance(dtype) -> float:
    return TOLERANCE[dtype]
