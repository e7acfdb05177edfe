"""Expert load: counted on the device, reduced once an interval, turned into metrics and reports."""

from ssr_deepspeed.monitor.counts import LoadMonitor, LoadWindow
from ssr_deepspeed.monitor.metrics import layer_metrics

__all__ = ["LoadMonitor", "LoadWindow", "layer_metrics"]
