import http.client
import json
import signal
import subprocess
import sys
import threading

import pytest

from ssr_deepspeed.monitor.records import RunLog
from ssr_deepspeed.monitor.serve import MonitorServer
from tests.monitor.records import write_load


@pytest.fixture
def server(tmp_path):
    with MonitorServer([RunLog(write_load(tmp_path / "run", (0, 10)))], port=0) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield server
        server.shutdown()


def ask(server, path="/data.json", method="GET", host=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    names = {"Host": host or f"127.0.0.1:{server.port}", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request(method, path, headers=names)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_data_are_sent_again_only_when_there_is_something_new(server, tmp_path):
    answer, body = ask(server)
    assert json.loads(body)["runs"][0]["windows"] == [5, 10]
    tag = answer.headers["ETag"]
    answer, body = ask(server, If_None_Match=tag)
    assert (answer.status, body) == (304, b"")
    write_load(tmp_path / "run", (10, 15))
    answer, body = ask(server, If_None_Match=tag)
    assert (answer.status, json.loads(body)["runs"][0]["windows"]) == (200, [5, 10, 15])
    # Resumed from step 5.
    write_load(tmp_path / "run", (5, 10), seed=1)
    assert json.loads(ask(server)[1])["runs"][0]["windows"] == [5, 10]


def test_a_file_that_is_gone_for_a_while_is_no_end(server, tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    file.rename(tmp_path / "away")
    assert ask(server)[0].status == 503
    (tmp_path / "away").rename(file)
    assert ask(server)[0].status == 200


def test_only_two_paths_can_be_read_and_nothing_written(server):
    answer, body = ask(server, "/")
    assert answer.status == 200
    assert b"connect-src 'self'" in body
    for path in (
        "/metrics.jsonl",
        "/../run/metrics.jsonl",
        "/data.json/..",
        "/data.json?",
        "/favicon.ico",
        "/etc/passwd",
    ):
        assert ask(server, path)[0].status == 404
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert ask(server, "/data.json", method)[0].status == 501
    assert server.server_address[0] == "127.0.0.1"


def test_a_foreign_name_that_leads_here_is_refused(server):
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "[::1].evil"):
        assert ask(server, host=host)[0].status == 403
    for host in ("localhost", f"LOCALHOST:{server.port}", "[::1]:80", "127.0.0.1"):
        assert ask(server, host=host)[0].status == 200


def test_the_command_says_where_it_listens_and_ends_at_an_interrupt(tmp_path):
    folder = write_load(tmp_path / "run", (0, 5))
    command = [sys.executable, "-m", "ssr_deepspeed.monitor", "serve", str(folder), "--port", "0"]
    # A shell's job in the background ignores the interrupt, and so would what it starts.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, handler)
    try:
        url = process.stdout.readline().split()[0]
        host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request("GET", "/data.json")
        assert json.loads(connection.getresponse().read())["runs"][0]["windows"] == [5]
        taken = subprocess.run([*command[:-1], port], capture_output=True, text=True, check=False)
        assert taken.returncode == 2
        assert f"port {port}" in taken.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
