"""AutoEP's universal checkpoint with SSR in place: weights, optimizer and the rule's state travel along."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch.distributed as dist
from deepspeed.checkpoint.ds_to_universal import main as convert
from packaging.version import Version

from tests.gloo import run_ranks
from tests.hosts.families import skip_where_autoep_crashes, tiny_model
from tests.hosts.test_huggingface import build, routers_of, train

BLOCK = {"rule": "carried"}
STEPS = 3


def _engine(size, stage, seed=0, **settings):
    return build(
        tiny_model("mixtral", seed=seed),
        BLOCK,
        zero_optimization={"stage": stage},
        expert_parallel={"enabled": True, "autoep_size": size},
        **settings,
    )


def _states(engine):
    return [router.ssr.rule.state["potentials"].tolist() for router in routers_of(engine)]


def _written(folder, stage):
    """States at the checkpoint, and losses straight on."""
    engine = _engine(2, stage)
    train(engine, STEPS, dist.get_rank())
    engine.save_checkpoint(folder, "source")
    dist.barrier()
    if dist.get_rank() == 0:
        convert(
            SimpleNamespace(
                input_folder=f"{folder}/source",
                output_folder=f"{folder}/universal",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )
        Path(folder, "latest_universal").write_text("universal")
    dist.barrier()
    return _states(engine), train(engine, 2, dist.get_rank(), start=STEPS)


def _read(folder, size, stage):
    """The step, states and sentences after loading, and losses from there."""
    engine = _engine(size, stage, seed=5, checkpoint={"load_universal": True})
    with contextlib.redirect_stderr(io.StringIO()) as said:
        engine.load_checkpoint(folder)
    sentences = [line for line in said.getvalue().splitlines() if line.startswith("SSR")]
    return engine.global_steps, _states(engine), sentences, train(engine, 2, dist.get_rank(), start=STEPS)


def _there_and_back(folder, stage):
    return _written(folder, stage), _read(folder, 2, stage)


@pytest.mark.skipif(
    Version(deepspeed.__version__) <= Version("0.19.3"),
    reason="its ds_to_universal refuses a checkpoint that has no files of pipeline layers",
)
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_rules_state_travels_in_a_universal_checkpoint_to_the_same_split_and_another(stage, tmp_path):
    skip_where_autoep_crashes("mixtral")
    same = run_ranks(2, _there_and_back, str(tmp_path), stage, folder=tmp_path)
    # DeepSpeed loads no second split in one process.
    other = run_ranks(2, _read, str(tmp_path), 1, stage, folder=tmp_path)
    for ((states, losses), reader), other_reader in zip(same, other, strict=True):
        assert all(any(potentials) for potentials in states)
        for step, loaded, sentences, resumed in (reader, other_reader):
            assert (step, loaded, sentences) == (STEPS, states, [])
            # Under ZeRO-3 DeepSpeed's second step differs by 1e-3 also without SSR: not all of it is the same again.
            steps = 2 if stage == 1 else 1
            assert resumed[:steps] == pytest.approx(losses[:steps], abs=1e-4)
