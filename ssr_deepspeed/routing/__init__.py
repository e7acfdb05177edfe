"""From router logits to routes, by a balancing rule: each token's experts, their weights and slots."""

from ssr_deepspeed.routing.capacity import Slots, expert_capacity, fill_slots, surviving_weights
from ssr_deepspeed.routing.coin import is_transport_step
from ssr_deepspeed.routing.overflow import Placement, place_overflow
from ssr_deepspeed.routing.plan import RoutePlan, compatibility, route
from ssr_deepspeed.routing.ranks import asked_routes, routes_of_each
from ssr_deepspeed.routing.registry import RULES, make_rule
from ssr_deepspeed.routing.rules import Batch, Choice, Rule, max_violation

__all__ = [
    "RULES",
    "Batch",
    "Choice",
    "Placement",
    "RoutePlan",
    "Rule",
    "Slots",
    "asked_routes",
    "compatibility",
    "expert_capacity",
    "fill_slots",
    "is_transport_step",
    "make_rule",
    "max_violation",
    "place_overflow",
    "route",
    "routes_of_each",
    "surviving_weights",
]
