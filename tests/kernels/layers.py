"""Random inputs and packed layers for the kernel tests.

Dimension letters: M tokens, N out features, K in features, G groups along K, R rank.
"""

import torch
from lowbit.formats import pack


def signed(m, k_in, seed, dtype=torch.float32):
    """x_MK: signed, channels of different size; an all-zero row, one with a single outlier, one of equal magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(m, k_in, generator=generator) * torch.rand(k_in, generator=generator).mul(3).exp()
    if m:
        x_MK[0] = 0
    if m > 1:
        x_MK[1, k_in // 2] = -1000.0
    if m > 2:
        x_MK[2] = torch.where(x_MK[2] < 0, -3.0, 3.0)  # every code saturates
    return x_MK.to(dtype)


def codes_of(m, k_in, act_bits, seed):
    """q_MK int8 over the whole range, with an all-zero row and rows of the largest code of either sign."""
    top = 2 ** (act_bits - 1) - 1
    q_MK = torch.randint(-top, top + 1, (m, k_in), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    for row, value in zip(q_MK, (top, 0, -top)):
        row.fill_(value)
    return q_MK


def layer(bits, group_size, symmetric, n_out, k_in, seed, exact=False):
    """(packed_NP, scale_NG, zero_NG, bits, group_size): arguments of the products; `exact`: every scale is 1 or 2, or with the other sign.

    The first row holds the smallest code only, the second the largest: the sums' extremes."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k_in // (group_size or k_in))
    codes_NK = torch.randint(0, 1 << bits, (n_out, k_in), generator=generator, dtype=torch.uint8)
    for row, value in zip(codes_NK, (0, (1 << bits) - 1)):
        row.fill_(value)
    scale_NG = torch.rand(n_out, groups, generator=generator) + 0.01
    if exact:
        scale_NG = 1.0 + (scale_NG > 0.5)
    if symmetric:  # signed grids have scales of either sign
        scale_NG = scale_NG * (1 - 2 * torch.randint(0, 2, scale_NG.shape, generator=generator))
    zero_NG = None if symmetric else torch.randint(0, 1 << bits, (n_out, groups), generator=generator, dtype=torch.uint8)
    return pack(codes_NK, bits), scale_NG.half(), zero_NG, bits, group_size


def ends(m, n_out, rank, dtype, seed):
    """(bias_N, low_MR, up_NR) of small integers, exact in every type."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)
    return integers(n_out), integers(m, rank), integers(n_out, rank)


def largest_sum(x_MK, w_NK, *more_MN):
    """sum_k |x||w| and the magnitudes of what is added, float64 (M, N): what a rounding error is a fraction of."""
    return x_MK.double().abs() @ w_NK.double().abs().T + sum(term.double().abs() for term in more_MN)
