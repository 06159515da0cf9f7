"""Fixtures of the quantization tests."""

import pytest

from tests.quant.toy import make_flux, make_toy, record


@pytest.fixture
def toy():
    return make_toy()


@pytest.fixture
def toy_trace(toy):
    return record(toy)


@pytest.fixture(scope="module")
def flux():
    return make_flux()
