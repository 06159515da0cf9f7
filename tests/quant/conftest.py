"""Fixtures of the quantization tests."""

import pytest

from tests.quant.toy import make_toy, record


@pytest.fixture
def toy():
    return make_toy()


@pytest.fixture
def toy_trace(toy):
    return record(toy)
