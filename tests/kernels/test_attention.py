"""The attention kernel against its reference, compiled for each instruction set this CPU runs."""

import math

import pytest
import torch
from lowbit import cpu, ops
from lowbit.attention import naive as attention_reference

from tests.kernels.test_cpu import DTYPES, OUT_UNIT, UNIT


@pytest.fixture(autouse=True)
def _on_each_instruction_set(isa):
    assert ops.backend().is_kernel


def attention_case(streams, heads, channels, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [[torch.randn(2, tokens, heads * channels, generator=generator).to(dtype) for tokens in streams] for _ in range(3)]
    norms = [[torch.rand(channels, generator=generator) + 0.5 for _ in streams] for _ in range(2)]
    angle_SC = (6 * torch.rand(sum(streams), channels // 2, generator=generator)).repeat_interleave(2, 1)
    return (*parts, *norms, angle_SC.cos(), angle_SC.sin(), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("streams, heads, channels", [((80,), 8, 32), ((16, 64), 8, 32), ((5,), 3, 6), ((3, 7, 1), 2, 130), ((33,), 1, 64)])
def test_attention_errs_no_more_than_twice_as_much_as_the_reference(dtype, streams, heads, channels):
    *parts, cos_SC, sin_SC, eps = case = attention_case(streams, heads, channels, dtype, sum(streams))
    exact = attention_reference.attention(*([x.double() for x in each] for each in parts), cos_SC.double(), sin_SC.double(), eps)
    for made, theirs, y in zip(ops.attention(*case), attention_reference.attention(*case), exact, strict=True):
        assert made.dtype == dtype and made.shape == y.shape
        # or what is typical of a sum of `channels` products in order, where the reference's sums are in blocks
        least = max(4 * OUT_UNIT[dtype], math.sqrt(channels) * UNIT) * y.abs().max()
        assert (made.double() - y).abs().max() <= 2 * max((theirs.double() - y).abs().max(), least)


def test_attention_of_more_tokens_than_a_cache_holds_is_the_references():
    case = attention_case((cpu.MOST_TOKENS, 1), 1, 4, torch.float32, 0)
    assert all(torch.equal(a, b) for a, b in zip(ops.attention(*case), attention_reference.attention(*case), strict=True))


def test_attention_follows_norms_whose_data_is_replaced_even_when_an_address_comes_back():
    query, key, value, *norms, cos_SC, sin_SC, eps = attention_case((5,), 2, 6, torch.float32, 0)
    queries, keys = ([norm.bfloat16() for norm in each] for each in norms)  # converted once, and kept

    def run(queries):
        return ops.attention(query, key, value, queries, keys, cos_SC, sin_SC, eps)
    for turn in range(2, 20):
        run(queries)
        [norm] = queries
        norm.data = torch.ones(6, dtype=torch.bfloat16)  # the old memory is free now, and the next of its size may be put there
        norm.data = torch.full((6,), 0.5 * turn, dtype=torch.bfloat16)
        assert torch.equal(run(queries)[0], run([norm.clone()])[0])


def test_attention_refuses_what_does_not_fit():
    query, key, value, *norms, cos_SC, sin_SC, eps = attention_case((5, 4), 2, 6, torch.float32, 0)
    with pytest.raises(ValueError, match=r"tables .* do not fit 9 tokens"):
        ops.attention(query, key, value, *norms, cos_SC[1:], sin_SC[1:], eps)
    with pytest.raises(ValueError, match="query, key and value are"):
        ops.attention([query[0][:, 1:], query[1]], key, value, *norms, cos_SC, sin_SC, eps)
    with pytest.raises(ValueError, match="do not make heads of 6"):
        ops.attention(*([part[..., 1:] for part in parts] for parts in (query, key, value)), *norms, cos_SC, sin_SC, eps)
