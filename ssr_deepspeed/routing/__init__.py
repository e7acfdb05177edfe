"""From router logits to routes: which experts each token takes, with which weight, in which slot."""

from ssr_deepspeed.routing.capacity import Slots, expert_capacity, fill_slots, surviving_weights
from ssr_deepspeed.routing.coin import is_transport_step
from ssr_deepspeed.routing.overflow import Placement, place_overflow
from ssr_deepspeed.routing.plan import RoutePlan, compatibility, route
from ssr_deepspeed.routing.ranks import routes_of_each
from ssr_deepspeed.routing.ssr import transport_potentials

__all__ = [
    "Placement",
    "RoutePlan",
    "Slots",
    "compatibility",
    "expert_capacity",
    "fill_slots",
    "is_transport_step",
    "place_overflow",
    "route",
    "routes_of_each",
    "surviving_weights",
    "transport_potentials",
]
