"""Without matplotlib a line says how to get it, and how to do without."""

import sys

import pytest

from lora_lightning.reports.figures import refuse_missing


def test_missing_matplotlib_is_said_with_both_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'lora_lightning\[plots\]'.*--plots false"):
        refuse_missing()
