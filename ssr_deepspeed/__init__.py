"""Selective Sinkhorn Routing for Mixture-of-Experts models trained with DeepSpeed.

The names below are imported when first used: importing the package loads neither torch nor DeepSpeed.
"""

import importlib
from typing import Any

_HOME = {
    "SSRCallback": "ssr_deepspeed.hosts.trainer",
    "SSRConfig": "ssr_deepspeed.config",
    # Through the hosts, which look at DeepSpeed's version first.
    "SSRGate": "ssr_deepspeed.hosts.routers",
    "initialize": "ssr_deepspeed.hosts.engine",
    "install": "ssr_deepspeed.hosts.engine",
    "route": "ssr_deepspeed.routing",
    "solve": "ssr_deepspeed.ot",
    "uninstall": "ssr_deepspeed.hosts.engine",
}

__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
