"""Alerts: what of a load report needs a person, said once when it begins and once when it is over.

Every alert names layer and expert, since when, and what to try. An alert that is raised stays so until its figure is
back on the good side of the threshold by a tenth; a run that resumes takes over what was raised before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ssr_deepspeed.config import AlertConfig
from ssr_deepspeed.monitor.names import DEAD_BELOW, LESS_IS_WORSE

Record = dict[str, Any]

ADVICE = {
    "dead_expert": 'a balancing rule with potentials (ssr.rule "carried") or a larger ssr.entropy brings it back; '
    "if it was never alive, look at the router's initial weights",
    "drop_rate": 'raise the capacity factor, set ssr.overflow to "next", or balance better (ssr.rule)',
    "max_vio": 'use ssr.rule "carried"; under "ssr" raise ssr.probability or lengthen its warm-up',
    "straggler": 'the experts of one rank take most: balance over more tokens (ssr.scope "expert_parallel")',
    "unconverged": 'raise ssr.solver.max_iterations or ssr.entropy, or use ssr.solver.name "adaptive"',
    "router_entropy": "the router is sure of every token: lower the learning rate, or add ssr.noise",
    "nonfinite": "look for a diverging loss (learning rate, data) and go on from an earlier checkpoint",
}
"""What to try, by kind of alert."""


class _Cause(NamedTuple):
    kind: str
    layer: str
    expert: int | None
    value: float
    threshold: float
    over: bool
    """Whether it is over: on the good side by a tenth."""
    raised: bool
    """Whether it is on the bad side."""


class Alerts:
    """Judges load reports one after the other.

    Args:
        config: the thresholds.
    """

    def __init__(self, config: AlertConfig) -> None:
        self.config = config
        self._open: dict[tuple[str, str, int | None], Record] = {}
        self._dead: dict[tuple[str, int], tuple[int, int]] = {}

    @property
    def streaks(self) -> dict[tuple[str, int], tuple[int, int]]:
        """By layer and expert: for how many windows it has been dead, and since which step."""
        return dict(self._dead)

    def resume(self, streaks: dict[tuple[str, int], tuple[int, int]]) -> None:
        """Begin anew, with the streaks of a checkpoint."""
        self._open, self._dead = {}, dict(streaks)

    def take(self, records: Iterable[Record]) -> None:
        """Take over the alerts that a run has written before it was resumed, of kinds that are still asked for."""
        for record in records:
            key = (record["alert"], record["layer"], record["expert"])
            asked = self.config.dead_windows if key[0] == "dead_expert" else getattr(self.config, key[0], None)
            if asked is None or (key[0] == "dead_expert" and not asked):
                continue
            if record["state"] == "raised":
                self._open[key] = record
            else:
                self._open.pop(key, None)

    @property
    def raised(self) -> list[Record]:
        """Alerts that are not over."""
        return list(self._open.values())

    def judge(self, report: Record) -> list[Record]:
        """What a load report raises or clears, as records of kind "alert"."""
        found = []
        for cause in [*self._dead_experts(report), *self._thresholds(report)]:
            key = (cause.kind, cause.layer, cause.expert)
            if cause.raised and key not in self._open:
                self._open[key] = _record("raised", cause, report, self._since(cause, report))
                found.append(self._open[key])
            elif cause.over and key in self._open:
                found.append(_record("cleared", cause, report, self._open.pop(key)["since"]))
        return found

    def _since(self, cause: _Cause, report: Record) -> int:
        if cause.kind == "dead_expert" and cause.expert is not None:
            return self._dead[cause.layer, cause.expert][1]
        return report["step"] - report["steps"]

    def _dead_experts(self, report: Record) -> Iterator[_Cause]:
        """Experts dead for that many windows in a row."""
        windows = self.config.dead_windows
        for layer, figures in report["layers"].items() if windows else ():
            loads = figures["load"]
            for expert, share in enumerate(loads):
                load = None if share is None else share * len(loads)
                if load is None:
                    continue
                if load < DEAD_BELOW:
                    count, since = self._dead.get((layer, expert), (0, report["step"] - report["steps"]))
                    self._dead[layer, expert] = (count + 1, since)
                else:
                    self._dead.pop((layer, expert), None)
                dead_for = self._dead.get((layer, expert), (0, 0))[0]
                if dead_for >= windows or ("dead_expert", layer, expert) in self._open:
                    over, raised = load >= 1.1 * DEAD_BELOW, dead_for >= windows
                    yield _Cause("dead_expert", layer, expert, round(load, 6), DEAD_BELOW, over, raised)

    def _thresholds(self, report: Record) -> Iterator[_Cause]:
        for kind in ("drop_rate", "max_vio", "straggler", "unconverged", "router_entropy", "nonfinite"):
            threshold = getattr(self.config, kind)
            for layer, figures in report["layers"].items() if threshold is not None else ():
                value = figures[kind]
                if value is None:
                    continue
                if kind in LESS_IS_WORSE:
                    over, raised = value >= 1.1 * threshold, value < threshold
                else:
                    over, raised = value <= 0.9 * threshold, value > threshold
                yield _Cause(kind, layer, None, value, threshold, over, raised)


def sentence(record: Record) -> str:
    """An alert in words."""
    where = record["layer"] if record["expert"] is None else f"{record['layer']}, expert {record['expert']}"
    if record["value"] is None:
        begins = f"alert: {record['alert']} of {where} in step {record['since']}, which stopped the run"
        return f"{begins}; try: {record['advice']}"
    sign = "<" if record["alert"] in (*LESS_IS_WORSE, "dead_expert") else ">"
    figure = "load over the mean" if record["alert"] == "dead_expert" else record["alert"]
    if record["state"] == "cleared":
        return f"alert over: {record['alert']} of {where} (since step {record['since']}, now {record['value']:.3g})"
    return (
        f"alert: {record['alert']} of {where} since step {record['since']}: {figure} {record['value']:.3g} {sign} "
        f"{record['threshold']:.3g}; try: {record['advice']}"
    )


def _record(state: str, cause: _Cause, report: Record, since: int) -> Record:
    return {
        "kind": "alert",
        "step": report["step"],
        "state": state,
        "alert": cause.kind,
        "layer": cause.layer,
        "expert": cause.expert,
        "since": since,
        "value": cause.value,
        "threshold": cause.threshold,
        "advice": ADVICE[cause.kind],
    }


def nonfinite_record(layer: str, step: int) -> Record:
    """The alert of logits that stop a run, in the passes of that step (steps taken before it)."""
    return {
        "kind": "alert",
        "step": step,
        "state": "raised",
        "alert": "nonfinite",
        "layer": layer,
        "expert": None,
        "since": step,
        "value": None,
        "threshold": None,
        "advice": ADVICE["nonfinite"],
    }
