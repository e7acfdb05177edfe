import subprocess
import sys

import pytest

from ssr_deepspeed.config import SSRConfig
from ssr_deepspeed.routing import is_transport_step


def tosses(config, layers=1, steps=20_000):
    return [[is_transport_step(config, step, layer) for step in range(steps)] for layer in range(layers)]


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_the_share_of_transport_steps_is_p(p):
    (line,) = tosses(SSRConfig(probability=p))
    deviation = (p * (1 - p) / len(line)) ** 0.5
    assert sum(line) / len(line) == pytest.approx(p, abs=4 * deviation)


def test_zero_is_never_and_one_is_always():
    assert not any(tosses(SSRConfig(probability=0.0))[0])
    assert all(tosses(SSRConfig(probability=1.0))[0])


def test_one_coin_a_step_decides_for_all_layers_and_one_a_layer_for_its_own():
    together = tosses(SSRConfig(probability=0.5), layers=3, steps=200)
    assert together[0] == together[1] == together[2]
    apart = tosses(SSRConfig(probability=0.5, per="layer"), layers=3, steps=200)
    assert apart[0] != apart[1] != apart[2] != apart[0]


def test_seeds_differ():
    assert tosses(SSRConfig(probability=0.5, seed=1)) != tosses(SSRConfig(probability=0.5, seed=2))


def test_the_schedule_is_obeyed():
    config = SSRConfig.from_dict({"probability": {"warmup_steps": 100, "final": 0.0}})
    assert tosses(config, steps=200)[0] == [True] * 100 + [False] * 100


def test_another_process_tosses_the_same():
    code = (
        "from ssr_deepspeed.config import SSRConfig\n"
        "from ssr_deepspeed.routing import is_transport_step as toss\n"
        "print([toss(SSRConfig(probability=0.5), s, 0) for s in range(50)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(tosses(SSRConfig(probability=0.5), steps=50)[0])
