"""Entropic optimal transport in potentials form: between tokens and experts, and in general (sns).

Torch alone: nothing here knows a process group. Where a problem spans several ranks, the sum
over the ranks comes in as a function.
"""

from ssr_deepspeed.ot.capacity import CapacitySolution, capacity_columns, solve_capacity
from ssr_deepspeed.ot.gradient import centred_scores, implicit_potentials, unrolled_potentials
from ssr_deepspeed.ot.problem import Solution, Sum
from ssr_deepspeed.ot.sinkhorn import plan_columns
from ssr_deepspeed.ot.sns import SparseNewtonSolution, sinkhorn_newton_sparse
from ssr_deepspeed.ot.solver import plan, solve

__all__ = [
    "CapacitySolution",
    "Solution",
    "SparseNewtonSolution",
    "Sum",
    "capacity_columns",
    "centred_scores",
    "implicit_potentials",
    "plan",
    "plan_columns",
    "sinkhorn_newton_sparse",
    "solve",
    "solve_capacity",
    "unrolled_potentials",
]
