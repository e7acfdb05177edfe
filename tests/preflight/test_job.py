import os
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
from deepspeed.accelerator import get_accelerator

from ssr_deepspeed.preflight.findings import Status
from ssr_deepspeed.preflight.job import join, met_within
from ssr_deepspeed.preflight.network import check_all_reduce
from tests.gloo import _context, run_ranks


class _Endless:
    def is_completed(self):
        return False


def _as_on_an_accelerator():
    job = join(timedelta(seconds=60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "use_host_timers", lambda: False)
        with pytest.raises(RuntimeError, match=r"did not end in 0.3 s"):
            replace(job, limit=timedelta(seconds=0.3)).wait(_Endless())
        return check_all_reduce(job, timed=True)


def test_where_a_device_works_by_itself_a_collective_is_asked_whether_it_has_ended(tmp_path):
    for finding in run_ranks(2, _as_on_an_accelerator, folder=tmp_path):
        assert finding.status == Status.OK, finding
        assert "exact over 2 ranks" in finding.sentences[0]


def _never_meets(said):
    os.environ["RANK"] = "3"
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    with met_within(timedelta(seconds=0.1)):
        threading.Event().wait()


def test_ranks_that_never_meet_end_with_a_sentence_each(tmp_path):
    process = _context.Process(target=_never_meets, args=(tmp_path / "said",))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    said = (tmp_path / "said").read_text()
    assert said.startswith("ssr-preflight: rank 3 (")
    assert "have not met in 0.1 s; see that the hosts reach each other" in said
