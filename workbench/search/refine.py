"""Refinement on measured error: swaps of bits that keep the budget, proposed by a table that learns from every measured plan.

A table predicts how errors add up; rollouts tell how they did. All measured plans together fit one factor per role, per span of
steps and per width (and per role for weights) that multiplies the table:

    error(plan) = e^s ( sum_r e^(w + omega_r) W_r(plan) + sum_{r,b,c} e^(alpha_r + beta_b + gamma_c) Q_rbc(plan) )

with W and Q the table's errors in each group, in logarithms, by least squares with a prior of no correction (Levenberg-Marquardt,
Laplace covariance). The Lagrangian plan of the corrected table is the next move, and so is that of a draw from the posterior, which
goes where the table is still unsure (Thompson 1933). A move exchanges bits between cells within the budget; it is accepted when its
measured error is smaller.

Letters: T steps, L layers, C choices, R roles, B spans of steps, P parameters, I plans.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import least_squares

from workbench.search.evaluation_cache import Row
from workbench.search.lagrangian import hull
from workbench.search.recorder import Measured
from workbench.search.search_problem import Rows, SearchProblem
from workbench.types import DistortionTable

SPANS = 5
NOISE = 0.08  # standard deviation of the logarithm of a measured error: nearly equal plans round differently
SPREAD = {"scale": 5.0, "weights": 1.0, "weight_role": 0.5, "role": 0.4, "span": 0.4, "width": 0.7}  # priors of the logarithms
BOLDNESS = 0.5  # of the posterior's standard deviation: a full draw wastes most of its moves


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The fitted logarithms and their covariance, in the order of `SPREAD`."""

    theta_P: np.ndarray
    covariance_PP: np.ndarray


class Corrected:
    """The guide of a task seen as groups, whose factors measurements fit."""

    def __init__(self, problem: SearchProblem):
        self.problem = problem
        roles = sorted({layer.role for layer in problem.layers})
        self.role_L = np.array([roles.index(layer.role) for layer in problem.layers])
        self.spans = min(SPANS, problem.steps)
        self.span_T = np.arange(problem.steps) * self.spans // problem.steps
        self.roles, self.choices = len(roles), len(problem.table.act_bits_C)
        sizes = {"scale": 1, "weights": 1, "weight_role": self.roles, "role": self.roles, "span": self.spans, "width": self.choices}
        ends = np.cumsum(list(sizes.values()))
        self._part = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends)}
        self._spread_P = np.concatenate([np.full(size, SPREAD[name]) for name, size in sizes.items()])

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        return self.problem.planning_table.error_TLC.double().numpy(), self.problem.planning_table.weight_error_LC.double().numpy()

    def features(self, plan: Measured) -> tuple[np.ndarray, np.ndarray]:
        """The table's error of a plan by group: weights (R), activations (R, B, C)."""
        error_TLC, weight_LC = self._tables
        bits_C = self.problem.planning_table.weight_bits_C
        weight_L = weight_LC[np.arange(len(weight_LC)), [bits_C.index(bits) for bits in plan.weight_bits_L]]
        column_TL = np.searchsorted(self.problem.table.act_bits_C, np.asarray(plan.act_bits_TL))
        error_TL = np.take_along_axis(error_TLC, column_TL[..., None], -1)[..., 0]
        act_RBC = np.zeros((self.roles, self.spans, self.choices))
        np.add.at(act_RBC, (np.broadcast_to(self.role_L, error_TL.shape), np.broadcast_to(self.span_T[:, None], error_TL.shape),
                            column_TL), error_TL)
        return np.bincount(self.role_L, weight_L, self.roles), act_RBC

    def fit(self, plans: Iterable[Measured]) -> Factors:
        """The most likely factors. Plans whose error is far from the best count less: the correction is local."""
        usable = [(*self.features(plan), plan.error) for plan in plans if np.isfinite(plan.error) and plan.error > 0]
        usable = [(weight_R, act_RBC, error) for weight_R, act_RBC, error in usable if weight_R.sum() + act_RBC.sum() > 0]
        if not usable:
            return Factors(theta_P=np.zeros(len(self._spread_P)), covariance_PP=np.diag(self._spread_P ** 2))
        weight_IR, act_IRBC, error_I = (np.stack(values) for values in zip(*usable))
        total_I = weight_IR.sum(1) + act_IRBC.sum((1, 2, 3))
        noise_I = NOISE * (1 + np.abs(np.log(error_I / np.median(error_I))))
        center_P = np.zeros(len(self._spread_P))
        center_P[0] = np.median(np.log(error_I / total_I))

        def residual(theta_P):
            predicted_I = self._model(theta_P, weight_IR, act_IRBC)
            return np.concatenate([np.log(predicted_I / error_I) / noise_I, (theta_P - center_P) / self._spread_P])

        solution = least_squares(residual, center_P, method="lm", max_nfev=40 * len(center_P))
        return Factors(theta_P=solution.x, covariance_PP=np.linalg.inv(solution.jac.T @ solution.jac))

    def predict(self, factors: Factors, plan: Measured) -> float:
        """Error of a plan by the corrected table."""
        weight_R, act_RBC = self.features(plan)
        return float(self._model(factors.theta_P, weight_R[None], act_RBC[None])[0])

    def table(self, theta_P: np.ndarray) -> DistortionTable:
        """The guide with its errors multiplied by the factors, `scale` apart."""
        weight_R, act_RBC = self._factors(theta_P)
        return self.problem.scaled(act_RBC[self.role_L[None, :], self.span_T[:, None]], weight_R[self.role_L])

    def plan(self, theta_P: np.ndarray, weights: Row) -> tuple[Row, Rows]:
        """The Lagrangian plan of the corrected table within every limit; `weights` where memory is not limited. BadInput where no such
        plan keeps all limits on activations."""
        table = self.table(theta_P)
        limit = self.problem.budget.max_weight_bytes
        if limit is not None:
            bits_C, costs = table.weight_bits_C, self.problem.costs
            bytes_LC = costs.weight_bytes_LC.numpy()[:, [costs.weight_bits_C.index(bits) for bits in bits_C]]
            columns_L = hull(table.weight_error_LC.numpy(), bytes_LC).within(limit - costs.fixed_bytes)
            weights = self.problem.pinned(tuple(bits_C[column] for column in columns_L))
            if not self.problem.fast_enough(weights):
                weights = self.problem.weights_within(limit, table.weight_error_LC)
        return weights, self.problem.lagrangian_plans(weights, table).rows()

    def draw(self, factors: Factors, random: np.random.Generator) -> np.ndarray:
        """Factors from around the most likely ones."""
        return random.multivariate_normal(factors.theta_P, BOLDNESS ** 2 * factors.covariance_PP, method="cholesky")

    def _factors(self, theta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part = self._part
        act_RBC = (theta_P[part["role"]][:, None, None] + theta_P[part["span"]][None, :, None] + theta_P[part["width"]][None, None, :])
        return np.exp(theta_P[part["weights"]] + theta_P[part["weight_role"]]), np.exp(act_RBC)

    def _model(self, theta_P, weight_IR, act_IRBC) -> np.ndarray:
        weight_R, act_RBC = self._factors(theta_P)
        return np.exp(theta_P[0]) * (weight_IR @ weight_R + act_IRBC.reshape(len(act_IRBC), -1) @ act_RBC.ravel())
