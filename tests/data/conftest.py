"""A tokenizer for all tests of data."""

import pytest

from tests.tiny import make_bert


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))
