import os
import signal
import threading
import time

import pytest
import torch.distributed as dist

from ssr_deepspeed.pretrain import watch
from ssr_deepspeed.pretrain.signals import LOST, leave, say
from tests.gloo import _context


def _rank(rank, folder, what, silence, hurry, asked, timeout):
    """Rank 0 ends as told, once rank 1 has heard of it; rank 1 stands still, or looks for it after an error."""
    os.environ.update(RANK=str(rank), SSR_EXIT_FILE=str(folder / f"code_{rank}"))
    os.dup2(os.open(folder / f"said_{rank}", os.O_CREAT | os.O_WRONLY), 2)
    watch._SILENCE, watch._HURRY = silence, hurry
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mine = watch.Watch(timeout, lambda: asked)
    mine.interval = 0.2
    if rank == 0:
        mine.timeout = 1000
    mine.moved("in step 7")
    dist.barrier()
    if what == "gets ahead":
        if rank == 1:
            mine.moved("in step 8")
            threading.Event().wait()
        while not (folder / "code_1").exists():
            time.sleep(0.05)
        os._exit(0)
    if what == "saves":
        mine.moved("saving step 7", alone=True)
        mine._store = None
        mine._ended.wait(8 * silence)
        leave(7)
    if what == "loses the store":
        mine._store = None
        if rank == 1:
            threading.Event().wait()
        leave(0)
    if rank == 0:
        if what == "fails":
            mine.failed(1)
            leave(1)
        os._exit(0)
    if what == "stands still":
        threading.Event().wait()
    missing = None
    while missing is None:
        missing = mine.missing()
    say(missing[0])
    leave(missing[1])


def ends(folder, *how, timeout=1000):
    """Exit code of rank 1, what it told the launcher, and what it said."""
    ranks = [_context.Process(target=_rank, args=(rank, folder, *how, timeout)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode is not None
    return ranks[1].exitcode, (folder / "code_1").read_text(), (folder / "said_1").read_text()


@pytest.mark.parametrize(
    ("silence", "hurry", "asked"),
    [
        pytest.param(0.5, 1000.0, 0, id="by itself"),
        # As torchrun does to the ranks beside one that has died, half a minute before it kills them.
        pytest.param(1000.0, 0.5, signal.SIGTERM, id="asked to end"),
    ],
)
def test_a_silent_rank_is_not_waited_for_until_the_timeout(tmp_path, silence, hurry, asked):
    code, told, said = ends(tmp_path, "stands still", silence, hurry, asked)
    assert (code, told) == (LOST, f"{LOST}\n")
    assert "in step 7: rank 0 (host " in said
    assert "gone, frozen or cut off" in said


def test_a_store_that_stays_out_of_reach_is_not_waited_for_either(tmp_path):
    """Its host is lost: all other machines would wait for the timeout."""
    code, told, said = ends(tmp_path, "loses the store", 0.5, 1000.0, 0)
    assert (code, told) == (LOST, f"{LOST}\n")
    assert "in step 7, and the launcher's store is out of reach" in said


def test_a_launcher_that_is_gone_ends_no_save(tmp_path):
    """Its ranks are told to save, and its store, if it was the one that keeps it, has gone with it."""
    code, told, said = ends(tmp_path, "saves", 0.5, 0.1, signal.SIGTERM)
    assert (code, told, said) == (7, "7\n", "")


def test_where_all_are_alive_the_timeout_names_who_is_behind(tmp_path):
    code, told, said = ends(tmp_path, "gets ahead", 1000.0, 1000.0, 0, timeout=6)
    assert (code, told) == (LOST, f"{LOST}\n")
    assert "s in step 8: all ranks are alive, but behind the others are rank 0 (host " in said
    assert "in step 7" in said


def test_the_code_of_a_rank_that_fails_by_itself_is_the_whole_jobs(tmp_path):
    """Also on other machines, whose launchers share no file with it: a scheduler would start it again and again."""
    code, told, said = ends(tmp_path, "fails", 1000.0, 1000.0, 0)
    assert (code, told) == (1, "1\n")
    assert "rank 0 (host " in said
    assert "ended by an error of its own" in said
