"""The registered names: schemas, fake implementations and autograd keys hold for every operation."""

import workbench  # noqa: F401  (registers lowbit)

# isort: split
import pytest
import torch
from lowbit import ops
from lowbit.formats import pack

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 64, generator=GENERATOR)
Q, Q_SCALE = ops.act_quant(X, None, 1, 4, 0)
PACKED_NP, SCALE_NG = pack(torch.randint(0, 16, (5, 64), dtype=torch.uint8, generator=GENERATOR), 4), torch.ones(5, 2).half()
WEIGHT = (PACKED_NP, SCALE_NG, None, 4, 32)
LOW = (torch.randn(2, 3, 2, generator=GENERATOR), torch.randn(5, 2, generator=GENERATOR).half())
TABLE = torch.rand(5, 8, generator=GENERATOR)
CALLS = {
    "block_hadamard": (X, 16, torch.ones(64)),
    "act_quant": (X, torch.ones(64), 16, 3, 32, 0.9, True),
    "linear_wnan": (Q, Q_SCALE, *WEIGHT, torch.randn(5).half(), *LOW, True, torch.bfloat16),
    "quant_linears": ([X[..., :48], X[..., 48:]], torch.ones(64), 16, [4, 3], 0, [PACKED_NP] * 2, [SCALE_NG] * 2, [None] * 2, [4, 4], 32,
                      [None, torch.randn(5)], [False, True], None, None, 1.0, True),
    "linear_wna16": (X, *WEIGHT, None, *LOW, False),
    "modulate": (X, torch.randn(2, 64), torch.randn(2, 64), 1e-6),
    "attention": ([X, X[:, 1:]], [X, X[:, 1:]], [X, X[:, 1:]], [torch.ones(8)] * 2, [torch.ones(8)] * 2, TABLE, TABLE, 1e-6),
}


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_every_operation_keeps_its_schema_and_its_fake(name):
    torch.library.opcheck(getattr(torch.ops.lowbit, name).default, CALLS[name],
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("name", ["block_hadamard", "act_quant", "quant_linears", "linear_wna16", "modulate"])
def test_a_float_type_that_no_kernel_has_takes_the_default(name):
    def wider(a):
        if isinstance(a, list):
            return [wider(part) for part in a]
        return a.double() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a
    arguments = [wider(a) for a in CALLS[name]]
    made, expected = getattr(ops, name)(*arguments), ops._DEFAULT[name](*arguments)
    for one, other in zip(*((r if isinstance(r, (tuple, list)) else (r,)) for r in (made, expected))):
        assert torch.equal(one, other)


def test_an_output_type_that_no_kernel_has_takes_the_default():
    arguments = (*CALLS["linear_wnan"][:-1], torch.float64)
    assert torch.equal(ops.linear_wnan(*arguments), ops._DEFAULT["linear_wnan"](*arguments))


def test_a_sum_that_could_leave_32_bits_is_refused():
    wide = 1 << 17
    packed_NP = torch.zeros(1, wide, dtype=torch.uint8)
    with pytest.raises(ValueError, match="can exceed 32 bits; use groups"):
        ops.linear_wnan(torch.zeros(1, wide, dtype=torch.int8), torch.ones(1, 1), packed_NP, torch.ones(1, 1).half(), None, 8, 0, None,
                        None, None, False, torch.float32)
