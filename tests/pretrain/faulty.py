"""ssr-pretrain with one fault injected into one rank: python tests/pretrain/faulty.py FAULT RANK STEP [arguments].

The fault happens in optimizer step STEP, counted from 1, or in the save or evaluation after it.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import deepspeed.comm
from deepspeed.runtime.engine import DeepSpeedEngine

from ssr_deepspeed.pretrain import checkpoint, signals, supervise, train
from ssr_deepspeed.pretrain.__main__ import main


def before(owner, name, fault, due):
    """Have `owner.name` do `fault` first, once, where `due` of its first argument holds."""
    original, done = getattr(owner, name), []

    def replacement(*arguments, **options):
        if not done and due(*arguments):
            done.append(True)
            fault()
        return original(*arguments, **options)

    setattr(owner, name, replacement)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise MemoryError("a fault")


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def stall():
    time.sleep(10**6)


def until_asked():
    """Until the signal has arrived, which another thread takes in."""
    deadline = time.monotonic() + 120
    while not taken[0].asked():
        assert time.monotonic() < deadline, "no signal came"
        time.sleep(0.01)


def signalled(number):
    def send():
        os.kill(os.getpid(), number)
        until_asked()

    return send


def wait_for_signal():
    print("ready", flush=True)
    until_asked()


def write_little():
    """No file may grow beyond 64 KiB: what a disk that is full does to writes, without filling one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))


def lift_after(owner, name):
    original = getattr(owner, name)

    def replacement(*arguments, **options):
        result = original(*arguments, **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return result

    setattr(owner, name, replacement)


def remember(signals_of_process):
    taken.append(signals_of_process)
    return signals_of_process


taken: list[signals.Signals] = []
engines: list[DeepSpeedEngine] = []


def inject(fault, step):
    """Put the fault in its place."""
    in_step = (DeepSpeedEngine, "backward")

    def at_step(engine, *_):
        return engine.global_steps == step - 1

    def after_step(keeper, *_):
        return keeper.engine.global_steps == step

    if fault == "killed in the step":
        before(*in_step, die, at_step)
    elif fault == "killed in the all-to-all":
        before(deepspeed.comm, "all_to_all_single", die, lambda *_: engines[0].module.training and at_step(engines[0]))
    elif fault == "killed before the rename":
        before(checkpoint.Checkpoints, "_publish", die, after_step)
    elif fault == "killed between rename and latest":
        before(checkpoint, "replace_text", die, lambda path, tag: tag == f"step_{step}")
    elif fault == "killed while writing":
        before(checkpoint._Writer, "_save", die, lambda writer, *_: engines[0].global_steps == step and writer.files)
    elif fault == "raises":
        before(*in_step, fail, at_step)
    elif fault == "stalls":
        before(*in_step, stall, at_step)
    elif fault == "frozen":
        before(*in_step, freeze, at_step)
    elif fault == "disk full":
        before(checkpoint.Checkpoints, "save", write_little, after_step)
        lift_after(checkpoint.Checkpoints, "save")
    elif fault == "SIGTERM in evaluation":
        before(train, "evaluate", signalled(signal.SIGTERM), lambda engine, *_: engine.global_steps == step)
    elif fault == "SIGTERM in a save":
        before(checkpoint.Checkpoints, "save", signalled(signal.SIGTERM), after_step)
    elif fault in ("SIGUSR1", "SIGTERM", "SIGINT"):
        before(*in_step, signalled(signal.Signals[fault]), at_step)
    elif fault == "waits for a signal":
        before(*in_step, wait_for_signal, at_step)
    else:
        raise ValueError(fault)


if __name__ == "__main__":
    fault, rank, step, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        make, build = supervise.Signals, train._build_engine
        supervise.Signals = lambda launched: remember(make(launched))
        train._build_engine = lambda *settings: engines.append(build(*settings)) or engines[0]
        inject(fault, int(step))
    sys.argv = [str(Path(__file__)), *arguments]
    main(arguments)
