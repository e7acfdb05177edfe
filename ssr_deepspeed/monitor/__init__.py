"""Expert load: counted on the device, reduced once an interval, turned into metrics, alerts and reports.

The names below are imported when first used: the command `ssr-monitor` reads records and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssr_deepspeed.monitor.counts import LoadMonitor, LoadWindow
    from ssr_deepspeed.monitor.metrics import layer_metrics, model_metrics
    from ssr_deepspeed.monitor.names import METRICS
    from ssr_deepspeed.monitor.sample import Sample, sample_pass

__all__ = ["METRICS", "LoadMonitor", "LoadWindow", "Sample", "layer_metrics", "model_metrics", "sample_pass"]

_HOMES = ("names", "counts", "sample", "metrics")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
