"""Integer codes as a dense little-endian bit stream.

Dimension letters: N rows, K codes in a row, P packed bytes in a row.

Code k of a row occupies bits [k*b, (k+1)*b) of the row's stream, lowest bit first; a row is padded with zero
bits to a whole byte. So 3 bits are really 3 bits: 8 codes in 3 bytes, and codes may straddle bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PACKED_BITS = (2, 3, 4, 6, 8)


def packed_bytes(k_in: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-k_in * bits // 8)


def _cell(bits: int) -> tuple[int, int]:
    """The smallest run that fills whole bytes: (codes, bytes). It fits 24 bits for every width."""
    if bits not in PACKED_BITS:
        raise ValueError(f"{bits}-bit codes cannot be packed; use one of {PACKED_BITS}")
    shared = math.gcd(8, bits)
    return 8 // shared, bits // shared


def pack(codes_NK: Tensor, bits: int) -> Tensor:
    """uint8 codes in [0, 2^bits) to packed_NP uint8."""
    codes, n_bytes = _cell(bits)
    if codes_NK.dtype != torch.uint8 or codes_NK.dim() != 2:
        raise ValueError(f"codes must be a uint8 matrix, not {codes_NK.dtype} of shape {tuple(codes_NK.shape)}")
    if codes_NK.numel() and int(codes_NK.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes_NK.max())} does not fit in {bits} bits")
    rows, k_in = codes_NK.shape
    padded_NK = torch.nn.functional.pad(codes_NK, (0, -k_in % codes))
    words = torch.zeros(rows, padded_NK.shape[1] // codes, dtype=torch.int32, device=codes_NK.device)
    for i in range(codes):
        words |= padded_NK[:, i::codes].int() << (bits * i)
    stream = torch.stack([words >> (8 * j) & 255 for j in range(n_bytes)], dim=-1)
    return stream.to(torch.uint8).flatten(1)[:, : packed_bytes(k_in, bits)].contiguous()


def unpack(packed_NP: Tensor, bits: int, k_in: int) -> Tensor:
    """The inverse of `pack`: codes_NK uint8."""
    codes, n_bytes = _cell(bits)
    rows, packed = packed_NP.shape
    if packed_NP.dtype != torch.uint8 or packed != packed_bytes(k_in, bits):
        raise ValueError(f"{packed} packed bytes of {packed_NP.dtype} a row; {k_in} codes of {bits} bits need "
                         f"{packed_bytes(k_in, bits)} of torch.uint8")
    padded_NP = torch.nn.functional.pad(packed_NP, (0, -packed % n_bytes))
    words = torch.zeros(rows, padded_NP.shape[1] // n_bytes, dtype=torch.int32, device=packed_NP.device)
    for j in range(n_bytes):
        words |= padded_NP[:, j::n_bytes].int() << (8 * j)
    mask = (1 << bits) - 1
    stream = torch.stack([words >> (bits * i) & mask for i in range(codes)], dim=-1)
    return stream.to(torch.uint8).flatten(1)[:, :k_in].contiguous()
