"""Settings for every test of the method."""

import pytest
import torch


@pytest.fixture(autouse=True)
def no_fused_kernel(request):
    """torch's fused kernel for frozen attention in eval rounds otherwise than its plain path, which adapters take."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled("fused" in request.keywords)
    yield
    torch.backends.mha.set_fastpath_enabled(before)
