"""A low-rank branch beside the quantized weight (SVDQuant, arXiv 2411.05007): y = Q_a(x) Q(W - L)^T + x L^T.

Dimension letters: N out features (of all layers that share the input), K in features, R rank of the branch.

L = up_NR down_RK is kept in float16 and used as stored, on the unquantized (smoothed) input. Layers that read one input share
`down`. L and the residual are improved in turn:

    L <- SVD_R(W - Q(W - L))        the best rank-R match of what the quantized residual leaves

The first step minimises |W - L - Q|_F for the present Q; rounding anew need not, so the loss is measured after every round, the
best branch is kept, and the first round without gain ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lowbit.tensor_cache import LastInputCache
from torch import Tensor

MAX_ROUNDS = 16
_EXACT = 512  # largest matrix whose decomposition is cheaper than an approximation is wrong
_OVERSAMPLED, _ITERATIONS = 16, 6  # of the randomized decomposition of larger ones


class Down:
    """x -> x down^T, once for all layers that read one tensor. down_RK float16."""

    def __init__(self, down_RK: Tensor):
        self.down_RK = down_RK
        self._last = LastInputCache()
        self._placed: dict[tuple, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(..., R) in x's type."""
        place = (x.dtype, x.device)
        if place not in self._placed:
            self._placed[place] = self.down_RK.to(x)
        return self._last.get(x, x.dtype, lambda: torch.nn.functional.linear(x, self._placed[place]))


@dataclass(frozen=True, kw_only=True)
class Branch:
    """up_NR and down.down_RK, float16."""

    up_NR: Tensor
    down: Down

    def value(self) -> Tensor:
        """L, w_NK float32, exactly as stored."""
        return self.up_NR.float() @ self.down.down_RK.float()

    def rows(self, part: slice) -> Branch:
        """The branch of one of the layers that share it."""
        return Branch(up_NR=self.up_NR[part].clone(), down=self.down)


def rank_of(n_out: int, k_in: int, branch_bits: float) -> int:
    """The largest rank whose 16-bit factors cost at most `branch_bits` per weight, at least 1: 32 at 3072 x 3072 for 1/3 bit."""
    if branch_bits <= 0:
        return 0
    return max(1, min(n_out, k_in, int(branch_bits * n_out * k_in / (16 * (n_out + k_in)) + 1e-9)))


def truncated(w_NK: Tensor, rank: int) -> Branch:
    """The best rank-R match (Eckart-Young), factors balanced, rounded to float16."""
    w = w_NK.float()
    tall = len(w) > w.shape[1]
    basis = _leading(w.T if tall else w, rank)
    up, down = (w @ basis, basis.T) if tall else (basis, basis.T @ w)
    size_R = (up.norm(dim=0) * down.norm(dim=1)).clamp(min=1e-30).sqrt()  # square roots of the singular values
    up, down = up / up.norm(dim=0).clamp(min=1e-30) * size_R, down / down.norm(dim=1, keepdim=True).clamp(min=1e-30) * size_R[:, None]
    return Branch(up_NR=up.half(), down=Down(down.half().contiguous()))


def _leading(w: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of a wide matrix, from its Gram matrix: squared, the trailing directions drown in float32,
    but only the leading ones are wanted. Large ones by randomized subspace iteration, always with the same start."""
    if len(w) <= _EXACT:
        return torch.linalg.eigh(w @ w.T)[1][:, -rank:].flip(1)
    with torch.random.fork_rng(devices=[w.device] if w.is_cuda else []):
        torch.manual_seed(0)
        return torch.svd_lowrank(w, q=rank + _OVERSAMPLED, niter=_ITERATIONS)[0][:, :rank]


def alternate(w_NK: Tensor, rank: int, rounded: Callable[[Tensor], Tensor]) -> tuple[Branch, tuple[float, ...]]:
    """(branch, loss |W - L - Q(W - L)|_F^2 of every round that gained). `rounded` is Q: the dequantized residual."""
    best, losses = None, []
    found = truncated(w_NK, rank)
    for _ in range(MAX_ROUNDS):
        residual_NK = w_NK - found.value()
        q_NK = rounded(residual_NK)
        loss = float((residual_NK - q_NK).double().square().sum())
        if losses and loss >= losses[-1]:
            break
        best = found
        losses.append(loss)
        found = truncated(w_NK - q_NK, rank)
    return best, tuple(losses)
