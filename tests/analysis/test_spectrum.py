"""Spectra from factors against dense singular value decompositions, and against the paper's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lora_lightning.analysis import spectra as sp
from lora_lightning.lora.frozen.spectrum import spectrum

SHAPES = [(30, 20, 4), (20, 30, 4), (6, 40, 9), (40, 5, 8), (1, 7, 3), (64, 64, 1)]


@pytest.mark.parametrize(("m", "k", "r"), SHAPES)
@pytest.mark.parametrize("scale", [2.0, -0.5])
def test_spectrum_is_that_of_the_dense_update(m, k, r, scale):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((r, k)), rng.standard_normal((m, r))
    dense = scale * B @ A
    want = np.linalg.svd(dense, compute_uv=False)[: min(m, k, r)]
    found = spectrum(torch.tensor(A), torch.tensor(B), scale)
    np.testing.assert_allclose(found.S, want, atol=1e-10 * want[0])
    np.testing.assert_allclose((found.U * found.S) @ found.V.mT, dense, atol=1e-10 * want[0])
    for frame in (found.U, found.V):
        torch.testing.assert_close(frame.mT @ frame, torch.eye(len(found.S)).double(), atol=1e-12, rtol=0)
    assert math.isclose(sp.frobenius(found.S), np.linalg.norm(dense), rel_tol=1e-12)
    assert math.isclose(sp.stable_rank(found.S), (np.linalg.norm(dense) / want[0]) ** 2, rel_tol=1e-10)
    np.testing.assert_allclose(sp.energy(found.S), np.cumsum(want**2) / np.sum(want**2), atol=1e-12)


def test_the_smallest_rank_holds_a_share_and_a_zero_update_has_no_rank():
    cases = [([3, 1], 0.9, 1), ([3, 1], 0.91, 2), ([1] * 4, 0.75, 3), ([1] * 4, 1.0, 4), ([5], 0.1, 1)]
    for values, share, rank in cases:
        assert sp.smallest_rank(torch.tensor(values, dtype=torch.float64), share) == rank
    found = spectrum(torch.randn(4, 9), torch.zeros(7, 4))
    assert (found.S.shape, found.U.shape) == ((0,), (7, 0))
    assert (sp.stable_rank(found.S), sp.smallest_rank(found.S, 0.9), sp.frobenius(found.S)) == (0.0, 0, 0.0)


def test_what_is_found_in_random_directions_is_chance():
    random = torch.Generator().manual_seed(0)
    W0, found = torch.randn(50, 40, generator=random).double(), []
    for _ in range(300):
        U, V = (torch.linalg.qr(torch.randn(60, q, generator=random, dtype=torch.float64))[0] for q in (3, 8))
        found.append(float(sp.similarity(U, V)[2, 7]))
    assert math.isclose(np.mean(found), sp.random_similarity(3, 8, 60), rel_tol=0.05)
    assert sp.random_similarity(3, 8, 60) == 8 / 60
    draws = [sp.sampled_norm(W0, 6, seed) ** 2 for seed in range(300)]
    assert math.isclose(math.sqrt(np.mean(draws)), sp.expected_norm(float(W0.norm()), 6, (50, 40)), rel_tol=0.03)


def test_amplification_of_table_7():
    """arXiv 2106.09685, Table 7: layer 48, W_q of GPT-3, ||W_q|| = 61.95."""
    assert math.isclose(6.91 / 0.32, 21.5, rel_tol=0.016)  # the paper's factor, from what it prints
    assert round(sp.expected_norm(61.95, 4, (12288, 12288)), 2) == 0.02
    assert math.isclose(sp.expected_norm(61.95, 64, (12288, 12288)), 0.33, rel_tol=0.03)


def test_top_directions_of_a_large_w0_by_iteration(monkeypatch):
    torch.manual_seed(4)
    W0 = torch.randn(90, 70)
    exact = sp.top_norm(W0, 4)
    monkeypatch.setattr(sp, "EXACT_SIDE", 10)
    before = torch.get_rng_state()
    assert 0.99 * exact < sp.top_norm(W0, 4) <= exact * (1 + 1e-9)
    assert torch.equal(torch.get_rng_state(), before)
