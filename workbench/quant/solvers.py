"""Solving one layer's integers: GPTQ (arXiv 2210.17323), nearest rounding, or nearest with searched scales, and their loss.

Dimension letters: M tokens, N out features (rows; several layers and widths are stacked), K in features, G groups.

GPTQ walks the columns in order. With H the (weighted) sum of x x^T and U the upper Cholesky factor of H^-1, column i
is rounded and its error e_i spread over the columns j > i that are still free:
    w_j <- w_j - e_i U_ij / U_ii
Rows do not interact, so the layers that share an input, and all widths, go through one loop with one factorization.
A group's scale is fitted when the loop reaches it, to the weights as already compensated: on correlated inputs that
leaves 3 to 12 % less loss than scales fitted beforehand to the original weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.options import BadInput
from workbench.plans import BitChoice
from workbench.quant import grids
from workbench.quant.grids import Widths
from workbench.types import QuantWeight, SolveReport

Solved = tuple[QuantWeight, SolveReport]
_COLUMNS = 32  # columns between two updates of everything to their right; divides every group size
_ROWS = 8192  # rows solved at a time, which bounds the memory
_ATTEMPTS = 6  # factorizations tried, each with ten times the damping


class HessianSum:
    """H = sum of weight * x x^T over everything seen. Without a factor 2 or 1/n: GPTQ does not depend on its scale."""

    def __init__(self, k_in: int, device: str | torch.device = "cpu"):
        self._sum_KK = torch.zeros(k_in, k_in, device=device)

    def update(self, x_MK: Tensor, weight: float = 1.0) -> None:
        """Add the rows of x, each counted `weight` times. H is symmetric: only blocks on and above the diagonal are computed."""
        x_MK = x_MK.detach().reshape(-1, len(self._sum_KK)).float()
        k_in, step = len(self._sum_KK), 256
        for start in range(0, k_in, step):
            self._sum_KK[start : start + step, start:].addmm_(x_MK[:, start : start + step].T, x_MK[:, start:], alpha=weight)

    def result(self) -> Tensor:
        """hessian_KK, float32."""
        upper_KK = self._sum_KK.triu()
        return upper_KK + self._sum_KK.triu(1).T


@dataclass(frozen=True, kw_only=True)
class Factor:
    """What the column loop needs of H. ratio_KK[i, j] = U_ij / U_ii for j > i; unit_KK and importance_K are H and its
    diagonal over the diagonal's mean `mean`, so that nothing here depends on the units of H."""

    ratio_KK: Tensor
    unit_KK: Tensor
    importance_K: Tensor
    mean: float
    damping: float
    dead_channels: int
    note: str


def factorize(hessian_KK: Tensor, damping: float) -> Factor:
    """Damped factor in float64. With R the reversal of order, R H R = L L^T gives U = R L^-1 R: one Cholesky.

    Dead channels (zero diagonal) get the mean of the live diagonal: a constant without H's units would turn GPTQ
    into rounding wherever H is small."""
    h_KK = hessian_KK.double()
    if not bool(torch.isfinite(h_KK).all()):
        raise BadInput("the Hessian holds NaN or infinity; the calibration trace is broken")
    diagonal_K = h_KK.diagonal().clone()
    live_K = diagonal_K > 0
    mean = float(diagonal_K[live_K].mean()) if bool(live_K.any()) else 1.0
    unit_KK, diagonal_K = h_KK / mean, torch.where(live_K, diagonal_K / mean, 1.0)
    unit_KK.diagonal().copy_(diagonal_K)
    used, note = damping, ""
    for _ in range(_ATTEMPTS):
        damped_KK = unit_KK + used * torch.eye(len(unit_KK), dtype=unit_KK.dtype, device=unit_KK.device)
        lower_KK, info = torch.linalg.cholesky_ex(damped_KK.flip(0, 1))
        if int(info) == 0:
            break
        used *= 10
        note = f"the Hessian was not positive definite: damping raised from {damping:g} to {used:g}"
    else:
        raise BadInput(f"the Hessian is not positive definite even with damping {used:g}")
    eye = torch.eye(len(unit_KK), dtype=unit_KK.dtype, device=unit_KK.device)
    u_KK = torch.linalg.solve_triangular(lower_KK, eye, upper=False).flip(0, 1)
    unit_KK.diagonal().masked_fill_(~live_K, 0.0)
    return Factor(ratio_KK=(u_KK / u_KK.diagonal()[:, None]).triu(1).float(), unit_KK=unit_KK.float(),
                  importance_K=diagonal_K.float(), mean=mean, damping=used,
                  dead_channels=int((~live_K).sum()), note=note)


@dataclass(frozen=True, kw_only=True)
class _Codes:
    """Integers and grids of some rows, and their loss in units of `Factor.unit_KK`."""

    q_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None
    loss_N: Tensor

    def where(self, take_N: Tensor, other: _Codes) -> _Codes:
        """Row by row: self where `take_N`, else other."""
        def pick(mine, theirs):
            return None if mine is None else torch.where(take_N.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)
        return _Codes(**{name: pick(mine, getattr(other, name)) for name, mine in vars(self).items()})

    @staticmethod
    def cat(parts: Sequence[_Codes]) -> _Codes:
        """The rows of all parts."""
        columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
        return _Codes(**{name: None if values[0] is None else torch.cat(values) for name, values in columns.items()})


def _finish(w_NK: Tensor, q_NK: Tensor, fitted: list[grids.Grid], parts: list[slice], factor: Factor) -> _Codes:
    delta_NK = torch.cat([grid.value(q_NK[:, part]) for grid, part in zip(fitted, parts)], 1).sub_(w_NK)
    scale_NG, zero_NG = grids.join(fitted)
    return _Codes(q_NK=q_NK, scale_NG=scale_NG, zero_NG=zero_NG, loss_N=(delta_NK @ factor.unit_KK).mul_(delta_NK).sum(1))


def _nearest(w_NK: Tensor, factor: Factor, widths: Widths, group_size: int | None, clip: bool = False) -> _Codes:
    parts = grids.groups(w_NK.shape[1], group_size)
    fitted = [grids.search(w_NK[:, part], widths, factor.importance_K[part]) if clip else grids.fit(w_NK[:, part], widths)
              for part in parts]
    q_NK = torch.cat([grid.round(w_NK[:, part]) for grid, part in zip(fitted, parts)], 1)
    return _finish(w_NK, q_NK, fitted, parts, factor)


def _gptq(w_NK: Tensor, factor: Factor, widths: Widths, group_size: int | None, clip: bool) -> _Codes:
    parts = grids.groups(w_NK.shape[1], group_size)
    starts = {part.start: part for part in parts}
    # Columns of the weight are rows here: each is contiguous. A copy always: of a single row, .contiguous() would be a view.
    free_KN = w_NK.T.clone(memory_format=torch.contiguous_format)
    q_KN, error_KN = torch.empty_like(free_KN), torch.empty_like(free_KN[:_COLUMNS])
    fitted, k_in = [], len(free_KN)
    for left in range(0, k_in, _COLUMNS):
        right = min(left + _COLUMNS, k_in)
        for i in range(left, right):
            if i in starts:
                group_NJ = free_KN[starts[i]].T.contiguous()
                grid = (grids.search(group_NJ, widths, factor.importance_K[starts[i]]) if clip
                        else grids.fit(group_NJ, widths))
                fitted.append(grid)
                row_grid = grid.transposed()
            column_1N = free_KN[i : i + 1]
            q_KN[i : i + 1] = row_grid.round(column_1N)
            error_N = torch.sub(column_1N, row_grid.value(q_KN[i : i + 1]), out=error_KN[i - left : i - left + 1])[0]
            free_KN[i + 1 : right].addr_(factor.ratio_KK[i, i + 1 : right], error_N, alpha=-1)
        free_KN[right:].addmm_(factor.ratio_KK[left:right, right:].T, error_KN[: right - left], alpha=-1)
    return _finish(w_NK, q_KN.T.contiguous(), fitted, parts, factor)


def _solve_rows(w_NK: Tensor, widths: Widths, factor: Factor, group_size: int | None, solver: str,
                clip: bool) -> tuple[_Codes, Tensor]:
    """(codes, loss_rtn_N). A row that GPTQ's greedy walk or a searched scale made worse than nearest rounding keeps nearest
    rounding."""
    solved, rtn_loss = [], []
    for rows in range(0, len(w_NK), _ROWS):
        chunk_NK = w_NK[rows : rows + _ROWS]
        part = replace(widths, bits_N1=widths.bits_N1[rows : rows + _ROWS])
        best = rounded = _nearest(chunk_NK, factor, part, group_size)
        if solver != "nearest":
            walked = (_gptq(chunk_NK, factor, part, group_size, clip) if solver == "gptq"
                      else _nearest(chunk_NK, factor, part, group_size, clip=True))
            best = walked.where(walked.loss_N <= rounded.loss_N, rounded)
        solved.append(best)
        rtn_loss.append(rounded.loss_N)
    return _Codes.cat(solved), torch.cat(rtn_loss)


@torch.no_grad()
def solve_stack(weights: Mapping[str, Tensor], hessian_KK: Tensor | None, choices: Sequence[BitChoice], *,
                solver: str = "gptq", damping: float = 0.01, clip: bool = True, signed: bool = False) -> dict[str, list[Solved]]:
    """Solve layers that read one input, at every choice: for each layer's w_NK, one (weight, report) per choice.

    Without a Hessian the loss is the plain squared error. `clip` lets gptq search each group's scale for the least
    error weighted by the Hessian's diagonal; solver "clip" is nearest rounding with such scales; plain rounding always uses
    the largest magnitude. `signed`: scales of symmetric grids may be negative."""
    if solver not in ("gptq", "nearest", "clip"):
        raise BadInput(f"unknown solver {solver!r}; use gptq, nearest or clip")
    if any(choice.is_float for choice in choices):
        raise BadInput("16 bits keep the float weight; there is nothing to solve")
    w_NK = torch.cat([_checked(name, w) for name, w in weights.items()])
    if hessian_KK is None:
        hessian_KK = torch.eye(w_NK.shape[1], device=w_NK.device)
    factor = factorize(hessian_KK, damping)
    results: dict[str, list] = {name: [None] * len(choices) for name in weights}
    kinds = {(choice.group_size, choice.symmetric) for choice in choices}
    for group_size, symmetric in sorted(kinds, key=str):
        members = [c for c, choice in enumerate(choices) if (choice.group_size, choice.symmetric) == (group_size, symmetric)]
        bits_N1 = torch.tensor([float(choices[c].weight_bits) for c in members], device=w_NK.device)
        widths = Widths(bits_N1=bits_N1.repeat_interleave(len(w_NK))[:, None], symmetric=symmetric, signed=signed)
        codes, rtn_N = _solve_rows(w_NK.repeat(len(members), 1), widths, factor, group_size, solver, clip)
        row = 0
        for c in members:
            for name, w in weights.items():
                rows = slice(row, row := row + len(w))
                results[name][c] = _result(name, codes, rtn_N, rows, choices[c], factor)
    return results


def solve(w_NK: Tensor, hessian_KK: Tensor | None, choices: Sequence[BitChoice], solver: str = "gptq",
          damping: float = 0.01, layer_name: str = "layer", clip: bool = True) -> list[Solved]:
    """One layer at every choice, with one factorization and one column loop."""
    return solve_stack({layer_name: w_NK}, hessian_KK, choices, solver=solver, damping=damping, clip=clip)[layer_name]


def _checked(name: str, w_NK: Tensor) -> Tensor:
    if not bool(torch.isfinite(w_NK).all()):
        raise BadInput(f"the weight of {name} holds NaN or infinity")
    return w_NK.detach().float()


def _result(name: str, codes: _Codes, rtn_N: Tensor, rows: slice, choice: BitChoice, factor: Factor) -> Solved:
    zero_NG = None if codes.zero_NG is None else codes.zero_NG[rows]
    weight = grids.store(codes.q_NK[rows], codes.scale_NG[rows], zero_NG, choice)
    solved, rtn = (float(loss_N[rows].double().sum()) * factor.mean for loss_N in (codes.loss_N, rtn_N))
    note = factor.note
    if not math.isfinite(solved) or solved > rtn:
        note = f"{note}; the solved loss is above that of nearest rounding".lstrip("; ")
    return weight, SolveReport(layer=name, loss_rtn=rtn, loss_solved=solved, damping=factor.damping,
                               dead_channels=factor.dead_channels, note=note)
