"""Entropic optimal transport between tokens and experts, in potentials form.

Torch alone: nothing here knows a process group. Where a problem spans several ranks, the sum
over the ranks comes in as a function.
"""

from ssr_deepspeed.ot.gradient import implicit_potentials
from ssr_deepspeed.ot.problem import Solution, Sum
from ssr_deepspeed.ot.sinkhorn import plan, solve

__all__ = ["Solution", "Sum", "implicit_potentials", "plan", "solve"]
