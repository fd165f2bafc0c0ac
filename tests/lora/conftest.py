"""Settings for every test of the method, and the closing lines on what the laws were held over."""

import pytest
import torch

from tests.lora.coverage import COVERED


@pytest.fixture(autouse=True)
def no_fused_kernel(request):
    """torch's fused kernel for frozen attention in eval rounds otherwise than its plain path, which adapters take."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled("fused" in request.keywords)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands over what it covered."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["covered"] = {what: sorted(names) for what, names in COVERED.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for what, names in getattr(node, "workeroutput", {}).get("covered", {}).items():
        COVERED[what].update(names)


def pytest_terminal_summary(terminalreporter):
    if not COVERED["kinds"]:
        return
    terminalreporter.section("the laws of the method held over")
    for what, names in COVERED.items():
        terminalreporter.write_line(f"{len(names):3} {what}: {', '.join(sorted(names))}")
