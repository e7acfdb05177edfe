import fcntl
import os
import socket
import threading

import pytest

from ssr_deepspeed.pretrain import folder
from ssr_deepspeed.pretrain.folder import claim


def held(path, note):
    """The lock on a run's folder, by another open file."""
    file = (path / ".lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(note)
    file.flush()
    return file


def test_a_run_of_this_host_that_still_writes_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.time, "sleep", None)
    with claim(tmp_path, {}, "refuse"):
        host = socket.gethostname()
        with pytest.raises(
            ValueError, match=rf"still writing to .* \(host {host}, process {os.getpid()}\): wait for it"
        ):
            claim(tmp_path, {}, "resume")
    claim(tmp_path, {}, "resume").close()


def test_the_lock_of_a_host_that_is_lost_is_waited_for(tmp_path, monkeypatch, capsys):
    other = held(tmp_path, "host elsewhere, process 7")
    threading.Timer(0.2, other.close).start()
    claim(tmp_path, {}, "resume").close()
    assert "is held by another process (host elsewhere, process 7): waiting for it" in capsys.readouterr().err
    monkeypatch.setattr(folder, "LEASE", 0.0)
    named = pytest.raises(ValueError, match=r"\(host elsewhere, process 8\): .* if its host is down, remove .*\.lock")
    with held(tmp_path, "host elsewhere, process 8"), named:
        claim(tmp_path, {}, "resume")


def test_a_run_that_never_began_leaves_nothing_that_refuses_another(tmp_path):
    """It may have got as far as to make the file of its records, and is started anew with the same words."""
    claim(tmp_path, {}, "refuse").close()
    (tmp_path / "metrics.jsonl").touch()
    claim(tmp_path, {}, "refuse").close()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="holds a run already"):
        claim(tmp_path, {}, "refuse")


def test_so_is_that_of_a_lost_host_whose_name_this_one_has_taken_over(tmp_path, capsys):
    """As a pod does that replaces another."""
    other = held(tmp_path, f"host {socket.gethostname()}, process 7\nboot of-another-machine")
    threading.Timer(0.2, other.close).start()
    claim(tmp_path, {}, "resume").close()
    assert "waiting for it" in capsys.readouterr().err
