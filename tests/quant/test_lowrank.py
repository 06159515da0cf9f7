"""The low-rank branch: the best match of its rank, and an alternation that never raises its objective."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.plans import BitChoice
from workbench.quant.grids import dequantize, quantize_nearest
from workbench.quant.lowrank import MAX_ROUNDS, alternate, rank_of, truncated


def weight(n_out, k_in, seed=0):
    """A few strong directions over noise."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(n_out, 3, generator=generator) @ torch.randn(3, k_in, generator=generator)
    return 0.3 * strong + 0.1 * torch.randn(n_out, k_in, generator=generator)


def quantizer(bits=4, group_size=32):
    choice = BitChoice(weight_bits=bits, group_size=group_size)
    return lambda w_NK: dequantize(quantize_nearest(w_NK, choice))


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (33, 33), (5, 96)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_branch_is_as_good_as_the_singular_value_decomposition(shape, rank):
    w_NK = weight(*shape)
    found = truncated(w_NK, rank)
    assert found.up_NR.shape == (shape[0], rank) and found.down.down_RK.shape == (rank, shape[1])
    spread = np.linalg.svd(w_NK.double().numpy(), compute_uv=False)
    left = float((w_NK.double() - found.value().double()).norm())
    # the best possible error, and what rounding both factors to float16 (2^-11 each) can add to it
    assert np.sqrt((spread[rank:] ** 2).sum()) - 1e-9 <= left <= np.sqrt((spread[rank:] ** 2).sum()) + 2**-9 * np.linalg.norm(spread)


def test_a_large_weight_is_matched_as_well_and_always_alike(monkeypatch):
    w_NK = weight(60, 90)
    exact = float((w_NK - truncated(w_NK, 3).value()).norm())
    monkeypatch.setattr("workbench.quant.lowrank._EXACT", 8)
    state = torch.get_rng_state()
    found = truncated(w_NK, 3)
    assert float((w_NK - found.value()).norm()) <= 1.001 * exact
    assert torch.equal(found.value(), truncated(w_NK, 3).value()) and torch.equal(torch.get_rng_state(), state)


def by_svd(w_NK, rank, rounded):
    """The alternation from its definition, with numpy's SVD: objective after every round, until no gain."""
    w, losses, low = w_NK.double().numpy(), [], None
    target = w
    while len(losses) < MAX_ROUNDS:
        u, s, v = np.linalg.svd(target, full_matrices=False)
        up, down = u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * v[:rank]
        low = (up.astype(np.float16).astype(np.float32) @ down.astype(np.float16).astype(np.float32)).astype(np.float64)
        residual = torch.from_numpy((w - low).astype(np.float32))
        q = rounded(residual)
        loss = float((residual - q).double().square().sum())
        if losses and loss >= losses[-1]:
            break
        losses.append(loss)
        target = w - q.double().numpy()
    return losses


@pytest.mark.parametrize("shape", [(24, 64), (64, 32)])
def test_the_alternation_is_the_one_an_independent_decomposition_gives(shape):
    w_NK, rounded = weight(*shape), quantizer()
    branch, losses = alternate(w_NK, 3, rounded)
    expected = by_svd(w_NK, 3, rounded)
    # float32 products round differently, which moves single codes; the first rounds agree closely, the end in quality
    np.testing.assert_allclose(losses[0], expected[0], rtol=0.02)
    np.testing.assert_allclose(losses[-1], expected[-1], rtol=0.1)
    residual_NK = w_NK - branch.value()
    assert losses[-1] == pytest.approx(float((residual_NK - rounded(residual_NK)).double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("shape", [(24, 64), (64, 32)])
def test_every_round_takes_the_best_match_of_what_the_last_residual_left(shape):
    w_NK, seen = weight(*shape), []

    def rounded(residual_NK):
        q_NK = quantizer(3)(residual_NK)
        seen.append((residual_NK, q_NK))
        return q_NK

    alternate(w_NK, 3, rounded)
    assert len(seen) > 2
    for (_, q_NK), (residual_NK, _) in itertools.pairwise(seen):
        u, s, v = torch.linalg.svd((w_NK - q_NK).double(), full_matrices=False)
        best_NK = u[:, :3] * s[:3] @ v[:3]
        # both factors are rounded to float16, 2^-11 of themselves each, in each of three terms
        terms_NK = (u[:, :3] * s[:3]).abs() @ v[:3].abs()
        assert bool(((w_NK - residual_NK).double() - best_NK).abs().le(2**-9 * terms_NK.max()).all())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), n_out=st.integers(2, 40), k_in=st.integers(2, 70), rank=st.integers(1, 4),
       bits=st.sampled_from([2, 3, 4, 8]))
def test_it_never_raises_its_objective(seed, n_out, k_in, rank, bits):
    w_NK, rounded = weight(n_out, k_in, seed), quantizer(bits)
    branch, losses = alternate(w_NK, min(rank, n_out, k_in), rounded)
    assert all(after < before for before, after in itertools.pairwise(losses)) and 1 <= len(losses) <= MAX_ROUNDS
    residual_NK = w_NK - branch.value()
    assert float((residual_NK - rounded(residual_NK)).double().square().sum()) == pytest.approx(losses[-1], rel=1e-6, abs=1e-12)


def test_a_branch_leaves_less_to_round_than_no_branch():
    w_NK, rounded = weight(48, 96), quantizer(group_size=None)
    _, losses = alternate(w_NK, 3, rounded)
    assert losses[-1] < 0.5 * float((w_NK - rounded(w_NK)).double().square().sum())


def test_layers_that_share_a_branch_get_their_rows_and_one_input_side():
    branch = truncated(weight(30, 32), 2)
    first, second = branch.rows(slice(0, 10)), branch.rows(slice(10, 30))
    assert first.down is second.down is branch.down
    assert torch.equal(torch.cat([first.value(), second.value()]), branch.value())
    x = torch.randn(4, 32)
    assert first.down.forward(x) is second.down.forward(x)
    torch.testing.assert_close(first.down.forward(x) @ first.up_NR.float().T, x @ first.value().T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n_out", "k_in", "bits", "rank"), [(3072, 3072, 1 / 3, 32), (256, 256, 1 / 3, 2), (768, 256, 1 / 3, 4),
                                                             (256, 256, 0.0, 0), (8, 8, 0.1, 1), (4, 64, 4.0, 1)])
def test_the_rank_is_what_the_bits_pay_for(n_out, k_in, bits, rank):
    assert rank_of(n_out, k_in, bits) == rank
    if rank > 1 and rank < min(n_out, k_in):
        assert 16 * rank * (n_out + k_in) <= bits * n_out * k_in + 1e-6 < 16 * (rank + 1) * (n_out + k_in)


@pytest.mark.parametrize("w_NK", [torch.zeros(6, 8), torch.ones(6, 8)])
def test_a_weight_without_full_rank_is_no_trouble(w_NK):
    branch, losses = alternate(w_NK, 3, quantizer())
    assert bool(torch.isfinite(branch.value()).all()) and losses[-1] == pytest.approx(0.0, abs=1e-5)
