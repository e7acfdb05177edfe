"""Expert load: counted on the device, reduced once an interval, turned into metrics, alerts and reports."""

from ssr_deepspeed.monitor.counts import LoadMonitor, LoadWindow, Pass, recomputes
from ssr_deepspeed.monitor.metrics import METRICS, layer_metrics, model_metrics
from ssr_deepspeed.monitor.sample import Sample, sample_pass

__all__ = [
    "METRICS",
    "LoadMonitor",
    "LoadWindow",
    "Pass",
    "Sample",
    "layer_metrics",
    "model_metrics",
    "recomputes",
    "sample_pass",
]
