"""Host: the log of Hugging Face's `Trainer`, and so all that it reports to.

A `TrainerCallback` is handed the record of a log when most sinks have written it, and never the `Trainer` itself. So
the callback is given its `Trainer`, and logs a record of its own.

Tested with transformers 5.22.2.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ssr_deepspeed.hosts.monitoring import say
from ssr_deepspeed.monitor.sinks import scalars


class SSRCallback(TrainerCallback):
    """Logs the scalars of every load report, as `SSR/<name>`, at the step at which its window ends.

    They reach `log_history` and every sink of `report_to`, in a record of their own, whatever `logging_steps` is:

        trainer = Trainer(...)
        trainer.add_callback(ssr_deepspeed.SSRCallback(trainer))

    On an accelerator the step at which a window ends waits for the device, as every log of a loss does.

    Args:
        trainer: whose log it is. Its DeepSpeed configuration has the `"ssr"` block.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._logged: dict[str, Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out what an earlier training reported, and say where nothing will be."""
        self._logged = self._report()
        ssr = getattr(self._trainer.model_wrapped, "ssr", None)
        if (ssr is None or not ssr.config.monitor.interval) and state.is_world_process_zero:
            say('logs no load: the DeepSpeed configuration has no "ssr" block, or its monitor.interval is 0')

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the window that has ended with this step."""
        report = self._report()
        if report is None or report is self._logged:
            return
        self._logged, wanted = report, control.should_log
        # The base's own, for a subclass's adds its other records to whatever it is given, and begins them anew.
        Trainer.log(self._trainer, {f"SSR/{name}": value for name, value in scalars(report).items()})
        control.should_log = wanted  # which a log clears

    def _report(self) -> dict[str, Any] | None:
        ssr = getattr(self._trainer.model_wrapped, "ssr", None)
        return None if ssr is None else ssr.report
