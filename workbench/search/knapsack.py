"""The multiple-choice knapsack by HiGHS, exactly or as a linear programme, and the weights that a memory budget allows.

Minimise sum_i error[i, c_i] subject to sum_i cost[i, c_i] <= limit, one choice c per item i.
Letters: L layers, C choices, I items.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, eye_array, kron

from workbench.options import BadInput
from workbench.plans import CostTable
from workbench.search.lagrangian import hull, total

MILP_SECONDS = 5.0
MILP_TRIES = 8  # of solutions that turn out to be beyond the limit
MILP_SCALE = 1e-2  # least total error, in units of the objective, that HiGHS's absolute gap of 1e-6 may be left at


def allocate_weights(weight_error_LC, costs: CostTable, max_bytes: float, weight_bits_C=None, *,
                     second_constraint=None) -> tuple[int, ...] | None:
    """Weight bits of every layer with the least total error within `max_bytes` of the whole transformer.

    A multiple-choice knapsack, solved exactly by HiGHS; columns of the table are `weight_bits_C` (by default the cost table's).
    `second_constraint` is a second cost (L, C) and the limit of its sum: None where nothing within `max_bytes` keeps it."""
    bits_C = tuple(costs.weight_bits_C if weight_bits_C is None else weight_bits_C)
    error_LC = np.asarray(weight_error_LC, dtype=np.float64)
    bytes_LC = costs.weight_bytes_LC.numpy()[:, [costs.weight_bits_C.index(bits) for bits in bits_C]]
    left = max_bytes - costs.fixed_bytes
    least = int(bytes_LC.min(axis=1).sum())
    if left < least:
        raise BadInput(f"max_weight_bytes is {max_bytes}; the smallest feasible is {costs.fixed_bytes + least}")
    columns_L = knapsack(error_LC, bytes_LC, left)
    if second_constraint is not None and total(second_constraint[0], columns_L) > second_constraint[1]:
        columns_L = _exact(error_LC, [(bytes_LC, left), second_constraint])
    return None if columns_L is None else tuple(bits_C[column] for column in columns_L)


def knapsack(error_IC: np.ndarray, cost_IC: np.ndarray, limit: float) -> np.ndarray:
    """Columns of least total error with total cost <= limit; the Lagrangian's when HiGHS finds nothing better in time."""
    columns_I = hull(error_IC, cost_IC).within(limit)
    if error_IC.max() <= 0:
        return columns_I
    found_I = _exact(error_IC, [(cost_IC, limit)])
    better = found_I is not None and total(error_IC, found_I) < total(error_IC, columns_I)
    return found_I if better else columns_I


def _exact(error_IC: np.ndarray, budgets: list[tuple[np.ndarray, float]]) -> np.ndarray | None:
    """Columns of least total error under every (cost, limit); None where HiGHS finds none in time."""
    constraints = [LinearConstraint(_one_each(*error_IC.shape), 1, 1)]
    for cost_IC, limit in budgets:
        spending, room = _spending(cost_IC, limit)
        constraints.append(LinearConstraint(spending, -np.inf, room))
    unit, best_I = error_IC.max() or 1.0, None
    for _ in range(MILP_TRIES):
        solution = milp(error_IC.ravel() / unit, integrality=np.ones(error_IC.size), bounds=Bounds(0, 1), constraints=constraints,
                        options={"time_limit": MILP_SECONDS, "mip_rel_gap": 1e-9})
        if solution.x is None:
            break
        found_I = solution.x.reshape(error_IC.shape).argmax(axis=1)
        if all(total(cost_IC, found_I) <= limit for cost_IC, limit in budgets):
            least = total(error_IC, found_I)
            best_I = found_I if best_I is None or least < total(error_IC, best_I) else best_I
            if not 0 < least < MILP_SCALE * unit:
                break
            unit = least  # better ones may lie within the gap
            continue
        beyond = np.zeros(error_IC.shape)  # by less than HiGHS's tolerance: not these columns all together
        beyond[np.arange(len(beyond)), found_I] = 1
        constraints.append(LinearConstraint(csr_array(beyond.reshape(1, -1)), 0, len(beyond) - 1))
    return best_I


def relaxed(error_IC: np.ndarray, cost_IC: np.ndarray, limit: float) -> np.ndarray:
    """The linear programme of `knapsack`; at most one item is split in its optimum, and that one is rounded down."""
    cheapest_I = np.lexsort((error_IC, cost_IC), axis=-1)[:, 0]
    if error_IC.max() <= 0:
        return cheapest_I
    spending, room = _spending(cost_IC, limit)
    solution = linprog(error_IC.ravel() / error_IC.max(), A_ub=spending, b_ub=[room], A_eq=_one_each(*error_IC.shape),
                       b_eq=np.ones(len(error_IC)), bounds=(0, 1), method="highs")
    share_IC = solution.x.reshape(error_IC.shape)
    split_IC = (share_IC > 1e-6) & (share_IC < 1 - 1e-6)
    columns_I = share_IC.argmax(axis=1)
    for item in np.flatnonzero(split_IC.any(axis=1)):
        part = np.flatnonzero(split_IC[item])
        columns_I[item] = part[cost_IC[item, part].argmin()]
    fits = total(cost_IC, columns_I) <= limit  # HiGHS keeps a limit to a tolerance only
    return columns_I if fits else hull(error_IC, cost_IC).within(limit)


def _one_each(items: int, choices: int) -> csr_array:
    return csr_array(kron(eye_array(items), np.ones((1, choices))))


def _spending(cost_IC: np.ndarray, limit: float) -> tuple[csr_array, float]:
    """What choices spend above the cheapest column, in units of what is left for it: well scaled, and the slack is not rounded away."""
    extra_IC = cost_IC - cost_IC.min(axis=1, keepdims=True)
    left = limit - float(cost_IC.min(axis=1).sum())
    unit = max(left, float(extra_IC.max()) * 1e-6, np.finfo(float).tiny)
    return csr_array(extra_IC.reshape(1, -1) / unit), left / unit
