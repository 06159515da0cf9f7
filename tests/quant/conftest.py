"""Fixtures of the quantization tests."""

from types import SimpleNamespace

import pytest
import torch

from tests.quant.toy import Toy, ToyBundle, record


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return ToyBundle(name="toy", source="toy", pipeline=SimpleNamespace(transformer=Toy()), model_hash="toy-model-hash",
                     device=torch.device("cpu"))


@pytest.fixture
def toy_trace(toy):
    return record(toy)
