import json

import pytest

from ssr_deepspeed.config import (
    PRESETS,
    RULES_OF_KEY,
    CarriedConfig,
    ProbabilitySchedule,
    RuleName,
    SSRConfig,
    Trigger,
    find_block,
)


def test_an_empty_block_gives_the_defaults():
    assert SSRConfig.from_dict({}) == SSRConfig()


def test_every_field_goes_through_json_and_back():
    config = SSRConfig.from_dict(
        {
            "rule": "ssr",
            "probability": {"warmup_steps": 5, "decay_steps": 10, "final": 0.1},
            "cost": "softmax",
            "entropy": 0.5,
            "solver": {"tolerance": 1e-2, "max_iterations": 7},
            "noise": {"scale": 1, "steps": "both"},
            "gradient": "implicit",
            "scope": "data_parallel",
            "per": "layer",
            "seed": 3,
            "monitor": {"interval": 0, "path": "x.jsonl"},
        }
    )
    assert SSRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"probabilty": 0.1}, ["ssr.probabilty", "0.1", "probability"]),
        ({"probability": 1.5}, ["ssr.probability", "1.5", "0 to 1"]),
        ({"probability": "0.1"}, ["ssr.probability", "'0.1'", "a number or a JSON object"]),
        ({"probability": {"warmup_steps": 5, "finale": 0.1}}, ["ssr.probability.finale", "final"]),
        ({"probability": {}}, ["ssr.probability", "warmup_steps"]),
        ({"probability": {"warmup_steps": -1}}, ["ssr.probability.warmup_steps", "-1", "at least 0"]),
        ({"cost": "linaer"}, ["ssr.cost", "'linaer'", "linear", "softmax"]),
        ({"entropy": 0}, ["ssr.entropy", "0", "above 0"]),
        ({"entropy": float("nan")}, ["ssr.entropy", "nan", "finite"]),
        ({"entropy": True}, ["ssr.entropy", "True", "a number"]),
        ({"solver": "sinkhorn"}, ["ssr.solver", "'sinkhorn'", "a JSON object"]),
        ({"solver": {"tolerance": 2}}, ["ssr.solver.tolerance", "2", "below 1"]),
        ({"solver": {"max_iterations": 1.5}}, ["ssr.solver.max_iterations", "1.5", "a whole number"]),
        ({"noise": {"scale": -1}}, ["ssr.noise.scale", "-1"]),
        ({"gradient": "auto"}, ["ssr.gradient", "auto"]),
        ({"monitor": {"path": "auto"}}, ["ssr.monitor.path", "auto"]),
        ({"scope": "world"}, ["ssr.scope", "'world'", "expert_parallel"]),
        ({"preset": "papre"}, ["ssr.preset", "'papre'", "paper"]),
        ({"seed": -1}, ["ssr.seed", "-1"]),
        ({"cost": None}, ["ssr.cost", "None", "linear"]),
        ({"entropy": 10**400}, ["ssr.entropy", "finite"]),
        ({"monitor": {"interval": 10**6}}, ["ssr.monitor.interval", "0 to 1000"]),
        ([], ["ssr", "JSON object"]),
        ({"rule": "caried"}, ["ssr.rule", "'caried'", "did you mean 'carried'?", "loss_free"]),
        ({"rule": None}, ["ssr.rule", "None", "carried"]),
        ({"probability": {"imbalanse": 0.5}}, ["ssr.probability", "imbalanse"]),
        ({"weights": "shifted", "cost": "softmax"}, ["ssr.weights", "shifted", "plan"]),
        ({"probability": {"imbalance": 0}}, ["ssr.probability.imbalance", "0", "above 0"]),
        ({"probability": {"imbalance": 0.5, "warmup": 1.0}}, ["unknown key ssr.probability.imbalance", "warmup"]),
        ({"rule": "carried", "probability": {"imbalance": 0.5}}, ["ssr.probability", "a number or a schedule"]),
        ({"rule": "capacity", "gradient": "implicit"}, ["ssr.gradient", "'implicit'", "partial", 'rule "ssr"']),
        ({"weights": "plans"}, ["ssr.weights", "'plans'", "did you mean 'plan'?"]),
        ({"carried": {"polytope": "masses"}}, ["ssr.carried.polytope", "'masses'", "did you mean 'mass'?"]),
        ({"carried": {"refresh": "during"}}, ["ssr.carried.refresh", "'during'", "before"]),
        ({"carried": {"damping": 0}}, ["ssr.carried.damping", "0", "at most 1"]),
        ({"carried": {"damping": 1.5}}, ["ssr.carried.damping", "1.5", "at most 1"]),
        ({"carried": {"dampening": 1.0}}, ["ssr.carried.dampening", "did you mean 'damping'?"]),
        ({"carried": True}, ["ssr.carried", "True", "a JSON object"]),
        ({"rate": 0}, ["ssr.rate", "0", "above 0"]),
        ({"eval_potentials": 1}, ["ssr.eval_potentials", "1", "true or false"]),
    ],
)
def test_a_wrong_block_is_refused_by_name_value_and_what_is_allowed(block, words):
    with pytest.raises(ValueError) as error:
        SSRConfig.from_dict(block)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["sinkhorn", "newton", "sns", "adaptive"])
def test_every_solver_can_be_chosen(name):
    assert SSRConfig.from_dict({"solver": {"name": name}}).solver.name == name


def test_a_preset_fills_in_and_given_keys_override_it():
    config = SSRConfig.from_dict({"preset": "paper", "entropy": 0.5, "solver": {"max_iterations": 20}})
    assert (config.cost, config.entropy) == ("softmax", 0.5)
    assert config.solver.tolerance == PRESETS["paper"]["solver"]["tolerance"]
    assert config.solver.max_iterations == 20


def test_a_preset_that_would_be_ignored_is_refused():
    with pytest.raises(ValueError, match=r"preset = 'paper'.*from_dict"):
        SSRConfig(preset="paper")


def test_a_null_block_and_a_second_misspelt_one_are_refused():
    with pytest.raises(ValueError, match="ssr = null"):
        find_block({"ssr": None})
    with pytest.raises(ValueError, match='"SSR"'):
        find_block({"ssr": {}, "SSR": {}})


def test_a_schedule_warms_up_decays_linearly_and_stays():
    schedule = ProbabilitySchedule(warmup=1.0, warmup_steps=2, decay_steps=4, final=0.2)
    assert [schedule.at(step) for step in range(8)] == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])


@pytest.mark.parametrize(
    "key",
    ["SSR", "srs", "ssr_config", "ssr-deepspeed", "rss", "srr", "selective_sinkhorn", "Sinkhorn", "ssr ", "my_ssr"],
)
def test_a_misspelt_block_is_found(key):
    with pytest.raises(ValueError, match=f'"{key}".*"ssr"'):
        find_block({"train_batch_size": 8, key: {}})


def test_deepspeeds_own_keys_are_no_misspelt_block():
    keys = [
        "train_batch_size",
        "zero_optimization",
        "bf16",
        "optimizer",
        "steps_per_print",
        "sparse_attention",
        "fp16",
        "amp",
        "zero",
    ]
    assert find_block({key: {} for key in keys}) is None


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0.5, float),
        ({"imbalance": 0.5}, Trigger),
        ({"warmup_steps": 5}, ProbabilitySchedule),
        ({"warmup_steps": 5, "final": 0.1}, ProbabilitySchedule),
    ],
)
def test_a_probability_is_a_number_a_schedule_or_a_trigger_and_goes_through_json_and_back(value, kind):
    config = SSRConfig.from_dict({"rule": "ssr", "probability": value})
    assert type(config.probability) is kind
    assert SSRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("rule", RuleName.__args__)
def test_every_rule_can_be_chosen_and_goes_through_json_and_back(rule):
    block = {"rule": rule, "weights": "plan", "carried": {"polytope": "mass", "damping": 1}, "rate": 0.5}
    config = SSRConfig.from_dict({**block, "eval_potentials": False})
    assert config.rule == rule
    assert config.carried == CarriedConfig(polytope="mass", damping=1.0)
    assert SSRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_only_rules_with_transport_steps_toss_a_coin():
    tossing = [rule for rule in RuleName.__args__ if SSRConfig(rule=rule, probability=0.5).probability_at(0) == 0.5]
    assert tossing == ["ssr", "capacity", "carried"]
    assert SSRConfig(rule="ssr", probability=Trigger(imbalance=0.5)).probability_at(0) == 0


@pytest.mark.parametrize(
    ("block", "xi"),
    [
        ({}, 0.1),
        ({"rule": "ssr"}, 1.0),
        ({"rule": "s_base"}, 1.0),
        ({"rule": "capacity"}, 0.3),
        ({"rule": "carried"}, 0.1),
        ({"rule": "carried", "carried": {"polytope": "mass"}}, 1.0),
        ({"rule": "carried", "entropy": 0.7}, 0.7),
        ({"rule": "capacity", "entropy": None}, 0.3),
        ({"preset": "paper"}, 0.05),
    ],
)
def test_the_entropy_in_use_is_the_one_given_or_the_polytopes_own(block, xi):
    assert SSRConfig.from_dict(block).xi == xi


@pytest.mark.parametrize(
    ("block", "weights"),
    [
        ({}, "shifted"),
        ({"rule": "ssr"}, "plan"),
        ({"rule": "ssr", "weights": "softmax"}, "softmax"),
        ({"rule": "capacity"}, "softmax"),
        ({"rule": "carried", "weights": "plan"}, "plan"),
        ({"rule": "carried", "weights": None}, "shifted"),
        ({"rule": "carried", "cost": "softmax"}, "softmax"),
    ],
)
def test_the_weights_in_use_are_those_given_or_the_rules_own(block, weights):
    assert SSRConfig.from_dict(block).weighs_by == weights


@pytest.mark.parametrize(
    ("block", "gradient"),
    [
        ({}, "centred"),
        ({"rule": "ssr"}, "implicit"),
        ({"rule": "ssr", "weights": "shifted"}, "centred"),
        ({"rule": "capacity"}, "partial"),
        ({"gradient": "detach"}, "detach"),
    ],
)
def test_the_gradient_in_use_is_the_one_given_or_the_rules_own(block, gradient):
    assert SSRConfig.from_dict(block).plan_gradient == gradient


@pytest.mark.parametrize("block", [{"rule": "capacity"}, {"rule": "carried"}, {"rule": "ssr", "weights": "shifted"}])
def test_only_the_plan_of_ssr_has_an_implicit_gradient(block):
    with pytest.raises(ValueError, match=r"ssr\.gradient = 'implicit'; allowed: .*centred"):
        SSRConfig.from_dict({**block, "gradient": "implicit"})


@pytest.mark.parametrize(
    ("rule", "unused"),
    [
        ("ssr", ["carried", "eval_potentials", "rate"]),
        ("capacity", ["carried", "eval_potentials", "gradient", "rate"]),
        ("carried", ["rate"]),
        ("quantile", sorted(set(RULES_OF_KEY) - {"eval_potentials"})),
        ("loss_free", sorted(set(RULES_OF_KEY) - {"eval_potentials", "rate"})),
        ("noisy", sorted(set(RULES_OF_KEY) - {"rate"})),
        ("global_auxiliary", sorted(RULES_OF_KEY)),
        ("none", sorted(RULES_OF_KEY)),
    ],
)
def test_keys_that_play_no_part_under_a_rule_are_named(rule, unused):
    block = {**dict.fromkeys(RULES_OF_KEY), "rule": rule, "noise": {}, "overflow": "next", "monitor": {}}
    assert SSRConfig(rule=rule).unused_keys(block) == unused


def test_keys_within_a_section_are_named_too_where_they_play_no_part():
    solver, noise = {"solver": {"name": "newton"}}, {"noise": {"scale": 0.1, "steps": "transport"}}

    def unused(**block):
        return SSRConfig.from_dict(block).unused_keys(block)

    assert unused(rule="carried", **solver, **noise) == ["solver.name"]
    assert unused(rule="carried", carried={"polytope": "mass"}, **solver, **noise) == []
    assert unused(rule="ssr", **solver, **noise, gradient="partial") == []
    assert unused(rule="ssr", weights="softmax", gradient="partial") == ["gradient"]
    assert unused(rule="capacity", weights="plan", gradient="partial") == []
    assert unused(rule="quantile", **noise) == ["noise.steps"]


def test_noise_falls_on_every_pass_where_there_are_no_transport_steps():
    noisy = {"noise": {"scale": 0.1, "steps": "transport"}}
    assert SSRConfig.from_dict({"rule": "quantile", **noisy}).noise_on(False)
    assert not SSRConfig.from_dict({"rule": "ssr", **noisy}).noise_on(False)
    assert SSRConfig.from_dict({"rule": "ssr", **noisy}).noise_on(True)
    assert not SSRConfig.from_dict({"rule": "quantile"}).noise_on(False)


def test_every_key_that_serves_some_rules_only_is_a_field():
    assert set(RULES_OF_KEY) < set(SSRConfig().to_dict())
