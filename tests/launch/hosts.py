"""Two machines on one: network namespaces with names, host tables and a cable of their own, joined by real TCP."""

import os
import shutil
import signal
import subprocess

import pytest

from tests.launch.runs import ROOT, environment

IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
NETWORK = "10.213.77"
NEEDS_NETWORKS = pytest.mark.skipif(os.geteuid() != 0 or not IP, reason="network namespaces need root and iproute2")


def run_ip(*arguments):
    return subprocess.run([IP, *arguments], capture_output=True, text=True, check=False)


class TwoHosts:
    """`box0` and `box1`. As on a fresh Debian, each is 127.0.1.1 to itself, and the other's name is its address.

    Args:
        tag: a word for what the kernel names.
        folder: for their host tables.
    """

    def __init__(self, tag, folder):
        self.tables = [folder / f"hosts_{k}" for k in (0, 1)]
        self.names = [f"{tag}{k}" for k in (0, 1)]
        self.started = []
        for name in self.names:
            made = run_ip("netns", "add", name)
            if made.returncode:
                self.close()
                pytest.skip(f"network namespaces are not to be had: {made.stderr.strip()}")
            run_ip("-n", name, "link", "set", "lo", "up")
        ends = [("eth0", "netns", name) for name in self.names]
        assert not run_ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]).returncode
        for k, name in enumerate(self.names):
            run_ip("-n", name, "address", "add", f"{NETWORK}.{k + 1}/24", "dev", "eth0")
            other = f"{NETWORK}.{2 - k} box{1 - k}"
            self.tables[k].write_text(f"127.0.0.1 localhost\n127.0.1.1 box{k}\n{other}\n")
        self.connect()

    def connect(self):
        for name in self.names:
            assert not run_ip("-n", name, "link", "set", "eth0", "up").returncode

    def cut_off(self, k):
        assert not run_ip("-n", self.names[k], "link", "set", "eth0", "down").returncode

    def start(self, k, *command, log, **variables):
        """Start a command on one of the hosts, its output in a file."""
        enter = ["nsenter", f"--net=/run/netns/{self.names[k]}", "unshare", "--uts", "--mount", "bash", "-c"]
        become = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        words = [*enter, become, f"box{k}", str(self.tables[k]), *map(str, command)]
        with log.open("w") as file:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment(GLOO_SOCKET_IFNAME="eth0", **variables),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def processes(self, k):
        return [int(number) for number in run_ip("netns", "pids", self.names[k]).stdout.split()]

    def close(self):
        for k, name in enumerate(self.names):
            for process in self.processes(k):
                os.kill(process, signal.SIGKILL)
            run_ip("netns", "delete", name)
        for process in self.started:
            process.wait(timeout=30)
