"""The `"ssr"` block of a DeepSpeed configuration.

The block is read strictly: an unknown key, a wrong type or a value out of range is a
`ValueError` that names the key by its path, the value, the values allowed and the nearest key.
Every field is a plain JSON value. The string `"auto"` is refused everywhere, because accelerate
rejects a DeepSpeed configuration that still holds one.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from ssr_deepspeed.section import Section, fail, join, merge, nearest, require, require_choice

Cost = Literal["linear", "softmax"]
Gradient = Literal["detach", "partial", "centred", "implicit"]
Scope = Literal["rank", "expert_parallel", "data_parallel"]
NoiseSteps = Literal["softmax", "transport", "both"]
LOSS_RULES = ("auxiliary", "global_auxiliary", "z")
"""Rules that work by a loss which the host adds to its own."""
CoinUnit = Literal["step", "layer"]
SolverName = Literal["sinkhorn", "newton", "sns", "adaptive"]
Overflow = Literal["drop", "next"]
RuleName = Literal[
    "ssr",
    "capacity",
    "carried",
    "s_base",
    "none",
    "auxiliary",
    "global_auxiliary",
    "z",
    "noisy",
    "loss_free",
    "quantile",
]
Weights = Literal["plan", "shifted", "softmax"]
Polytope = Literal["mass", "capacity"]

# Keys that play a part under some rules only. What is not listed serves all.
RULES_OF_KEY: dict[str, tuple[RuleName, ...]] = {
    "probability": ("ssr", "capacity", "carried"),
    "per": ("ssr", "capacity", "carried"),
    "seed": ("ssr", "capacity", "carried"),
    "cost": ("ssr", "capacity", "carried", "s_base"),
    "entropy": ("ssr", "capacity", "carried", "s_base"),
    "solver": ("ssr", "capacity", "carried", "s_base"),
    "gradient": ("ssr", "capacity", "carried"),
    "scope": ("ssr", "capacity", "carried", "s_base"),
    "weights": ("ssr", "capacity", "carried"),
    "carried": ("carried",),
    "rate": ("loss_free", "noisy"),
    "eval_potentials": ("carried", "loss_free", "quantile"),
}

# Named starting points. A key given beside "preset" overrides the preset's value.
PRESETS: dict[str, dict[str, Any]] = {
    # SSR-S with noise, the variant its authors report as best (arXiv 2511.08972, as summarised by
    # secondary sources). Entropy, noise scale and cap are the published ranges' usual ends; the
    # stopping rule there is an absolute residual, here the relative one.
    "paper": {
        "rule": "ssr",
        "probability": 0.01,
        "cost": "softmax",
        "entropy": 0.05,
        "solver": {"name": "sinkhorn", "tolerance": 1e-4, "max_iterations": 100},
        "gradient": "partial",
        "noise": {"scale": 0.1, "steps": "softmax"},
    },
}


@dataclass(frozen=True, kw_only=True)
class ProbabilitySchedule(Section):
    """Share of transport steps as a function of the optimizer step: warm-up, then linear decay."""

    warmup: float = 1.0
    """Probability during the first `warmup_steps` steps, 0 to 1."""
    warmup_steps: int
    """Optimizer steps of the warm-up, at least 0."""
    decay_steps: int = 0
    """Optimizer steps of the linear way from `warmup` to `final`, at least 0."""
    final: float = 0.01
    """Probability afterwards, 0 to 1."""

    def __post_init__(self) -> None:
        require(0 <= self.warmup <= 1, "warmup", self.warmup, "a probability from 0 to 1")
        require(0 <= self.final <= 1, "final", self.final, "a probability from 0 to 1")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        require(self.decay_steps >= 0, "decay_steps", self.decay_steps, "at least 0")

    def at(self, step: int) -> float:
        """Probability of a transport step at optimizer step `step` (counted from 0)."""
        if step < self.warmup_steps:
            return self.warmup
        if step >= self.warmup_steps + self.decay_steps:
            return self.final
        done = (step - self.warmup_steps) / self.decay_steps
        return self.warmup + (self.final - self.warmup) * done


@dataclass(frozen=True, kw_only=True)
class Trigger(Section):
    """Transport at the step after one whose softmax routes were uneven."""

    imbalance: float
    """MaxVio of the softmax top-k over all ranks and micro-batches of a step, above 0, beyond which the next
    step routes by transport. On an accelerator the one after the next, so that no step waits for it."""

    def __post_init__(self) -> None:
        require(self.imbalance > 0, "imbalance", self.imbalance, "above 0")


@dataclass(frozen=True, kw_only=True)
class CarriedConfig(Section):
    """Potentials kept between optimizer steps."""

    polytope: Polytope = "capacity"
    """What the potentials balance: plan mass of 1 a token, or k routes of at most 1 each (nearly the counts)."""
    refresh: Literal["after", "before"] = "before"
    """Route a batch by the potentials of the step before, or by those that one sweep on the batch itself gives."""
    damping: float = 1.0
    """Share of a sweep taken at each step, above 0 and at most 1."""

    def __post_init__(self) -> None:
        require_choice(self.polytope, "polytope", Polytope)
        require_choice(self.refresh, "refresh", Literal["after", "before"])
        require(0 < self.damping <= 1, "damping", self.damping, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class SolverConfig(Section):
    """How a transport step finds its expert potentials."""

    name: SolverName = "sinkhorn"
    """How `ot.solve` finds the potentials: its `method`."""
    tolerance: float = 1e-3
    """Relative column error `max_j |c_j - s| / s` at which the potentials are left as they are."""
    max_iterations: int = 50
    """Cap on sweeps and Newton steps, at least 1. On an accelerator `s_base` runs them all, so that no step waits for
    the host; the other rules look now and then whether they are done."""

    def __post_init__(self) -> None:
        require_choice(self.name, "name", SolverName)
        require(0 < self.tolerance < 1, "tolerance", self.tolerance, "above 0 and below 1")
        require(self.max_iterations >= 1, "max_iterations", self.max_iterations, "at least 1")


@dataclass(frozen=True, kw_only=True)
class NoiseConfig(Section):
    """Gaussian noise on the router logits, in training only."""

    scale: float = 0.0
    """Standard deviation in units of the logits; 0 is no noise."""
    steps: NoiseSteps = "softmax"
    """The steps that get it."""

    def __post_init__(self) -> None:
        require_choice(self.steps, "steps", NoiseSteps)
        require(self.scale >= 0, "scale", self.scale, "at least 0")


@dataclass(frozen=True)
class AlertConfig(Section):
    """When a load report raises an alert. `null` or 0: never."""

    dead_windows: int = 3
    """Windows in a row for which an expert has had less than 1 % of the mean load."""
    drop_rate: float | None = 0.1
    """Share of dropped routes above which a layer is reported."""
    max_vio: float | None = 2.0
    """MaxVio of a step's batch, mean of the window."""
    straggler: float | None = 1.5
    """Routes received by the fullest expert-parallel rank over the mean rank's."""
    unconverged: float | None = 0.5
    """Share of the transport passes that ended above the solver's tolerance."""
    router_entropy: float | None = 0.05
    """Entropy of the router's softmax over log E, below which it is reported."""
    nonfinite: float | None = 0.0
    """Share of tokens whose logits hold a NaN or an infinity."""

    def __post_init__(self) -> None:
        require(self.dead_windows >= 0, "dead_windows", self.dead_windows, "at least 0")
        for name in ("drop_rate", "max_vio", "straggler", "unconverged", "router_entropy", "nonfinite"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "null, or at least 0")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Section):
    """Expert-load monitoring."""

    interval: int = 50
    """Optimizer steps between two reports; 0 switches the monitor off."""
    path: str | None = None
    """JSON lines file that rank 0 appends each report to; none by default."""
    alerts: AlertConfig = AlertConfig()
    """When to say that something is wrong."""

    def __post_init__(self) -> None:
        # The device keeps the counts of every step of an interval.
        require(0 <= self.interval <= 1000, "interval", self.interval, "0 to 1000")


@dataclass(frozen=True, kw_only=True)
class SSRConfig(Section):
    """Selective Sinkhorn Routing, as the `"ssr"` block of a DeepSpeed configuration."""

    enabled: bool = True
    """False leaves every router as it is; the monitor still counts."""
    preset: Literal["paper"] | None = None
    """In JSON, `"paper"`: the literal published method; keys given beside it override it. `from_dict`
    puts the preset's values in, and the field is None afterwards."""
    rule: RuleName = "carried"
    """The balancing rule: one of ours (`ssr`, `capacity`, `carried`) or a rival's, see `ssr_deepspeed.routing`."""
    probability: float | ProbabilitySchedule | Trigger = 0.01
    """p, the share of steps routed by transport (under `carried`: whose potentials are solved to the end): a
    number from 0 to 1, a schedule, or a measured imbalance that asks for them."""
    cost: Cost = "linear"
    """Compatibility of token and expert: the logits (SSR-L) or their softmax (SSR-S)."""
    entropy: float | None = None
    """xi, weight of the plan's entropy, above 0, in units of the compatibility. None: on the k-capacity
    polytope 0.1 under `carried`, where a smaller one costs no iterations, and 0.3 under `capacity`; else 1."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    """See `SolverConfig`."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """See `NoiseConfig`."""
    gradient: Gradient | None = None
    """Through the plan's weights: none; with the potentials held constant; that less its mean over the tokens, so
    that none is left along a shift of one expert's logits for all of them, which the potentials undo; through the
    potentials themselves. None: implicit under `ssr`, partial under `capacity`, centred under `carried`. For k = 1
    the weight is the softmax probability, and its gradient is followed whatever this says."""
    weights: Weights | None = None
    """What weighs a token's chosen experts: the plan that chose them, the softmax of the compatibility shifted by
    the potentials (a plan of entropy 1), or the softmax of the logits. None: the plan under `ssr`, the softmax under
    `capacity`, the shifted one under `carried` with cost linear. For k = 1 it is always the softmax of the logits."""
    carried: CarriedConfig = field(default_factory=CarriedConfig)
    """See `CarriedConfig`."""
    rate: float = 1e-3
    """Step of the bias under `loss_free`, learning rate of the noise under `noisy`; above 0."""
    eval_potentials: bool = True
    """Whether rules that keep potentials or a bias route by them, frozen, in evaluation too."""
    scope: Scope = "rank"
    """Tokens balanced together: this rank's micro-batch, the expert-parallel or data-parallel group's."""
    overflow: Overflow = "drop"
    """Routes that a full expert has no slot for: dropped, or moved to their token's next-best expert with a
    free slot. Plays no part where the host drops no tokens (`drop_tokens=False`)."""
    per: CoinUnit = "step"
    """What one coin decides for: every layer of an optimizer step, or each layer by itself."""
    seed: int = 0
    """Seed of the coin; the coin depends on it, the step and (with `per = "layer"`) the layer alone."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """See `MonitorConfig`."""

    def __post_init__(self) -> None:
        require_choice(self.cost, "cost", Cost)
        if self.gradient is not None:
            require_choice(self.gradient, "gradient", Gradient)
        require_choice(self.scope, "scope", Scope)
        require_choice(self.overflow, "overflow", Overflow)
        require_choice(self.per, "per", CoinUnit)
        if self.preset is not None:
            fail("preset", self.preset, 'null here; presets are applied by SSRConfig.from_dict({"preset": ...})')
        require_choice(self.rule, "rule", RuleName)
        if isinstance(self.probability, Trigger):
            if self.rule == "carried":
                fail("probability", self.probability.to_dict(), 'a number or a schedule under "carried"')
        elif not isinstance(self.probability, ProbabilitySchedule):
            require(0 <= self.probability <= 1, "probability", self.probability, "0 to 1, a schedule or a trigger")
        if self.weights is not None:
            require_choice(self.weights, "weights", Weights)
            if self.weights == "shifted" and self.cost == "softmax":
                fail("weights", self.weights, '"plan" or "softmax" with cost "softmax": shares have no shift')
        require(self.entropy is None or self.entropy > 0, "entropy", self.entropy, "above 0")
        if self.gradient == "implicit" and (self.rule in ("capacity", "carried") or self.weights == "shifted"):
            fail("gradient", self.gradient, '"detach", "partial" or "centred": only the plan of rule "ssr" has it')
        require(self.rate > 0, "rate", self.rate, "above 0")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")

    @classmethod
    def from_dict(cls, block: Any, path: str = "ssr") -> Self:
        """Build the configuration from parsed JSON, filling in the preset's values first."""
        name = block.get("preset") if isinstance(block, dict) else None
        if name is not None:
            if name not in PRESETS:
                names = sorted(PRESETS)
                raise ValueError(f"{join(path, 'preset')} = {name!r}; allowed: {names} or null{nearest(name, names)}")
            block = merge(PRESETS[name], {key: value for key, value in block.items() if key != "preset"})
        return super().from_dict(block, path)

    def probability_at(self, step: int) -> float:
        """p at optimizer step `step` (counted from 0); 0 where a trigger decides, or the rule tosses no coin."""
        if not self.tosses:
            return 0.0
        if isinstance(self.probability, ProbabilitySchedule):
            return self.probability.at(step)
        return 0.0 if isinstance(self.probability, Trigger) else self.probability

    @property
    def tosses(self) -> bool:
        """Whether the rule has transport steps and others."""
        return self.rule in RULES_OF_KEY["probability"]

    def noise_on(self, transport: bool) -> bool:
        """Whether a training pass of such a step gets noise; under a rule without transport steps, every pass."""
        kinds = ("both", "transport" if transport else "softmax")
        return self.noise.scale > 0 and (self.noise.steps in kinds or not self.tosses)

    @property
    def xi(self) -> float:
        """The entropy in use: the one given, or the rule's own."""
        if self.entropy is not None:
            return self.entropy
        if self.rule == "carried" and self.carried.polytope == "capacity":
            return 0.1
        return 0.3 if self.rule == "capacity" else 1.0

    @property
    def plan_gradient(self) -> Gradient:
        """The gradient in use: the one given, or the rule's own."""
        own: dict[str, Gradient] = {"capacity": "partial", "carried": "centred"}
        fallback: Gradient = "centred" if self.weights == "shifted" else "implicit"
        return self.gradient or own.get(self.rule, fallback)

    @property
    def weighs_by(self) -> Weights:
        """What weighs the chosen experts: the option given, or the rule's own."""
        own: dict[str, Weights] = {"ssr": "plan", "carried": "shifted" if self.cost == "linear" else "softmax"}
        return self.weights or own.get(self.rule, "softmax")

    def unused_keys(self, block: dict[str, Any]) -> list[str]:
        """Keys given in the block that play no part under its rule, for one warning."""
        unused = {key for key in block if self.rule not in RULES_OF_KEY.get(key, (self.rule,))}
        if "gradient" in block and self.weighs_by == "softmax":
            unused.add("gradient")
        counts = self.rule == "capacity" or (self.rule == "carried" and self.carried.polytope == "capacity")
        if counts and "name" in (block.get("solver") or {}):
            unused.add("solver.name")
        if not self.tosses and "steps" in (block.get("noise") or {}):
            unused.add("noise.steps")
        return sorted(unused)


def find_block(deepspeed_config: dict[str, Any]) -> dict[str, Any] | None:
    """The `"ssr"` block of a parsed DeepSpeed configuration, or None.

    DeepSpeed keeps unknown top-level keys without a word, so a misspelt block would silently
    train without SSR.

    Raises:
        ValueError: the block is null, or a key was probably meant to be `"ssr"`.
    """
    for key in deepspeed_config:
        word = re.sub("[^a-z]+", "_", key.lower()).strip("_")
        near = (len(word) <= 4 and difflib.get_close_matches(word, ["ssr"])) or sorted(word) == ["r", "s", "s"]
        named = "sinkhorn" in word or any(part.startswith("ssr") for part in word.split("_"))
        if key != "ssr" and (near or named):
            raise ValueError(f'unknown top-level key "{key}" in the DeepSpeed configuration; did you mean "ssr"?')
    if "ssr" in deepspeed_config and deepspeed_config["ssr"] is None:
        raise ValueError("ssr = null; allowed: a JSON object, {} for the defaults; remove the key to train without SSR")
    return deepspeed_config.get("ssr")
