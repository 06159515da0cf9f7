"""Packed codes: the bit stream is what the format says, to the bit and to the byte."""

import workbench  # noqa: F401  (registers lowbit)

# isort: split
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit.formats import PACKED_BITS, pack, packed_bytes, unpack


def reference_stream(codes_NK: np.ndarray, bits: int) -> np.ndarray:
    """Each code's bits lowest first, one row after another padded to a byte: written from the format's definition."""
    bits_NK = (codes_NK[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(bits_NK.reshape(len(codes_NK), -1).astype(np.uint8), axis=1, bitorder="little")


@settings(deadline=None, max_examples=60)
@given(bits=st.sampled_from(PACKED_BITS), rows=st.integers(1, 5), k_in=st.integers(1, 67), seed=st.integers(0, 2**31))
def test_packing_matches_the_bit_stream_and_comes_back(bits, rows, k_in, seed):
    codes_NK = np.random.default_rng(seed).integers(0, 1 << bits, (rows, k_in), dtype=np.uint8)
    packed_NP = pack(torch.from_numpy(codes_NK), bits)
    np.testing.assert_array_equal(packed_NP.numpy(), reference_stream(codes_NK, bits))
    assert packed_NP.shape == (rows, packed_bytes(k_in, bits)) == (rows, -(-k_in * bits // 8))
    np.testing.assert_array_equal(unpack(packed_NP, bits, k_in).numpy(), codes_NK)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_all_ones_fill_every_bit(bits):
    codes_NK = torch.full((2, 8), (1 << bits) - 1, dtype=torch.uint8)
    assert bool((pack(codes_NK, bits) == 255).all())


@pytest.mark.parametrize("bits", [b for b in PACKED_BITS if b < 8])
def test_a_code_too_large_for_its_width_is_refused(bits):
    codes_NK = torch.zeros(1, 5, dtype=torch.uint8)
    codes_NK[0, 3] = 1 << bits
    with pytest.raises(ValueError, match=f"does not fit in {bits} bits"):
        pack(codes_NK, bits)


def test_packed_rows_of_the_wrong_length_are_refused():
    packed_NP = pack(torch.zeros(2, 16, dtype=torch.uint8), 3)
    for wrong in (packed_NP[:, :-1], torch.nn.functional.pad(packed_NP, (0, 1))):
        with pytest.raises(ValueError, match="16 codes of 3 bits need 6"):
            unpack(wrong, 3, 16)


@pytest.mark.parametrize("bits", [1, 5, 7, 16])
def test_widths_without_a_format_are_refused(bits):
    with pytest.raises(ValueError, match="cannot be packed"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)
