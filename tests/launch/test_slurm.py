"""launch/slurm.sbatch: with programs that note what they are asked for, and under a real Slurm of two nodes."""

import os
import re
import shutil
import signal
import subprocess

import pytest

from tests.launch.hosts import NEEDS_NETWORKS, NETWORK, TwoHosts
from tests.launch.runs import ROOT, alone, arguments, environment, heed_signals, latest, losses, wait_for

SCRIPT = ROOT / "launch" / "slurm.sbatch"
JOB = {
    "SLURM_JOB_ID": "5003",
    "SLURM_JOB_NODELIST": "box[0-1]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_CPUS_PER_TASK": "16",
    "SLURM_SUBMIT_DIR": str(ROOT),
}
ASKED = ["--config", "tiny_cpu", "--output", "runs/a b"]

SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$NOTES"
case $2 in
  hostnames) printf '%s\\n' ${HOSTS:-box0 box1} ;;
  job) echo "JobId=$3 Requeue=${REQUEUE:-1} Restarts=0" ;;
esac
"""
SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$NOTES.srun"
trap 'echo passed >>"$NOTES"; exit ${STATUS:-75}' USR1
[[ -n ${STATUS:-} && -z ${HOLD:-} ]] && exit "$STATUS"
touch "$NOTES.ready"
while :; do sleep 0.05; done
"""


@pytest.fixture
def batch(tmp_path):
    """Starts the batch script as Slurm would, between programs of our own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def start(*asked, **variables):
        path = f"{programs}:{os.environ['PATH']}"
        job = environment(**{**JOB, "PATH": path, "NOTES": str(tmp_path / "notes"), **variables})
        return subprocess.Popen(
            ["bash", SCRIPT, *ASKED, *asked],
            env=job,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_signals,
        )

    return start


def requeued(tmp_path):
    return "scontrol requeue 5003" in (tmp_path / "notes").read_text().splitlines()


def test_it_asks_slurm_for_a_task_a_node_a_warning_and_a_log_that_goes_on():
    """Slurm heeds these lines as far as the first command: a log begun anew would lose what the last start said."""
    head = SCRIPT.read_text().partition("\nset -")[0]
    asked = re.findall(r"^#SBATCH (\S+)$", head, re.MULTILINE)
    assert {"--ntasks-per-node=1", "--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(asked)


def test_it_starts_the_wrapper_once_on_each_node(batch, tmp_path):
    process = batch(STATUS="0", SLURM_RESTART_COUNT="2")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    words = (tmp_path / "notes.srun").read_text().split("\0")[:-1]
    bash = words.index("bash")
    assert words[:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16"]
    # A task that has saved waits for one that still does, and neither ends the other.
    assert words[4:bash] == ["--kill-on-bad-exit=0", "--wait=2400"]
    # What a task of srun does, made to print its commands.
    for node in ("0", "1"):
        task = subprocess.run(
            [*words[bash:], "--dry-run"], env=environment(SLURM_NODEID=node), capture_output=True, text=True, check=True
        )
        preflight, training = task.stdout.splitlines()
        assert "--rdzv-endpoint box0:20007 --rdzv-id 5003.2-preflight" in preflight
        assert "--rdzv-endpoint box0:20006 --rdzv-id 5003.2-0" in training
        assert "--nnodes 2 --nproc-per-node gpu" in training
        assert f"--log-dir logs/5003/node_{node} --tee 3" in training
        assert training.endswith(r"ssr_deepspeed.pretrain --config tiny_cpu --output runs/a\ b --resume ")
    assert not requeued(tmp_path)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"HOSTS": "box0"}, "Slurm gave 2 nodes, and scontrol names 1 of them"),
        ({"SLURM_NTASKS": "16"}, "SLURM_NTASKS = 16; allowed: 2, one task for each node"),
        ({"SLURM_SUBMIT_DIR": "/nowhere"}, "call sbatch from the checkout, or set SSR_ROOT"),
        ({"SLURM_JOB_ID": ""}, "start it with sbatch"),
    ],
)
def test_it_never_starts_on_fewer_nodes_or_otherwise_than_meant(variables, words, batch, tmp_path):
    process = batch(**variables)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert words in errors
    assert not (tmp_path / "notes.srun").exists()


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "weights"], ["--resume=weights"]])
def test_a_given_resume_is_the_only_one(resume, batch, tmp_path):
    batch(*resume, STATUS="0").communicate(timeout=60)
    words = (tmp_path / "notes.srun").read_text().split("\0")[:-1]
    assert words[words.index("--config") :] == [*ASKED, *resume]


@pytest.mark.parametrize("signalled", [False, True])
@pytest.mark.parametrize(
    ("status", "again"), [("75", True), ("69", True), ("1", False), ("2", False), ("74", False), ("137", False)]
)
def test_only_what_another_start_goes_on_from_is_queued_again(status, again, signalled, batch, tmp_path):
    """With and without the warning before the time limit, which is passed on."""
    process = batch(STATUS=status, HOLD="1" if signalled else "")
    if signalled:
        wait_for((tmp_path / "notes.ready").exists, 30, process.poll)
        process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == (0 if again else int(status)), errors
    assert ("passed" in (tmp_path / "notes").read_text().splitlines()) == signalled
    assert requeued(tmp_path) == again
    assert ("; queueing job 5003 again" in output) == again
    assert (f"exit status {status}; job 5003 is not queued again" in output) != again
    assert "saved" not in output


@pytest.mark.parametrize(
    ("variables", "status", "again"),
    [
        ({"SLURM_RESTART_COUNT": "7"}, "69", True),
        ({"SLURM_RESTART_COUNT": "8"}, "69", False),
        ({"SLURM_RESTART_COUNT": "2", "SSR_REQUEUES": "2"}, "69", False),
        ({"SLURM_RESTART_COUNT": "100"}, "75", True),
    ],
)
def test_lost_ranks_do_not_queue_a_job_again_for_ever(variables, status, again, batch, tmp_path):
    process = batch(STATUS=status, **variables)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (0 if again else 69)
    assert requeued(tmp_path) == again
    count = variables["SLURM_RESTART_COUNT"]
    assert again or f"a rank was lost or stalled (69), and job 5003 has been queued again {count} times" in output


def test_where_the_job_may_not_be_queued_again_its_status_says_so(batch, tmp_path):
    process = batch(STATUS="75", REQUEUE="0")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert not requeued(tmp_path)
    assert "submit it again" in output


CONF = """
ClusterName=two
SlurmctldHost=box0({network}.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=box0 NodeHostname=box0 NodeAddr={network}.1 CPUs=64 RealMemory=1000 Gres=gpu:8
NodeName=box1 NodeHostname=box1 NodeAddr={network}.2 CPUs=64 RealMemory=1000 Gres=gpu:8
PartitionName=all Nodes=box[0-1] Default=YES MaxTime=INFINITE State=UP
"""
DAEMONS = {
    name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("munged", "slurmctld", "slurmd")
}


class Cluster:
    """A Slurm of two nodes, each in a network namespace, with GPUs that are empty files."""

    def __init__(self, folder, hosts):
        self.folder, self.hosts = folder, hosts
        for name in ("state", "box0", "box1"):
            (folder / name).mkdir()
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, network=NETWORK))
        (folder / "gres.conf").write_text(f"NodeName=box[0-1] Name=gpu File={folder}/gpu[0-7]\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self.start(
            0, DAEMONS["munged"], "--foreground", "--force", f"--socket={folder}/munge.sock", *files, log="munged"
        )
        wait_for((folder / "munge.sock").exists, 30, lambda: self.said("munged"))
        self.start(0, DAEMONS["slurmctld"], "-D", log="slurmctld")
        for k in (0, 1):
            self.start(k, DAEMONS["slurmd"], "-D", "-N", f"box{k}", log=f"slurmd{k}")
        wait_for(lambda: "idle " in self.ask("sinfo"), 60, lambda: self.ask("sinfo") + self.said("slurmd0"))

    def start(self, k, *command, log):
        variables = {"SLURM_CONF": str(self.folder / "slurm.conf"), "RANKS": "1", "SSR_LOGS": str(self.folder / "logs")}
        return self.hosts.start(k, *command, log=self.folder / f"{log}.log", **variables)

    def said(self, log):
        file = self.folder / f"{log}.log"
        return file.read_text()[-3000:] if file.exists() else ""

    def ask(self, *command):
        """What a Slurm command answers on the first host."""
        self.start(0, *command, log="answer").wait(timeout=60)
        return self.said("answer")


@pytest.fixture
def cluster(tmp_path):
    missing = [name for name, path in DAEMONS.items() if not path]
    if missing:
        pytest.skip(f"a Slurm of two nodes needs {', '.join(missing)}")
    folder = tmp_path / "slurm"
    folder.mkdir()
    hosts = TwoHosts(f"slm{os.getpid()}_", folder)
    try:
        yield Cluster(folder, hosts)
    finally:
        hosts.close()


@pytest.mark.slow
@NEEDS_NETWORKS
def test_a_real_slurm_trains_on_two_nodes_and_goes_on_after_a_requeue(cluster, cache, tmp_path):
    """The signal is the one that Slurm sends before the time limit; every step is that of an uninterrupted run."""
    run, log = tmp_path / "run", tmp_path / "job.log"
    options = ["--cpus-per-task=1", "--time=10", f"--output={log}"]
    answer = cluster.ask("sbatch", *options, SCRIPT, "--no-preflight", *arguments(cache, run, 200))
    job = re.search(r"Submitted batch job (\d+)", answer)[1]

    def said():
        return (log.read_text()[-3000:] if log.exists() else "") + cluster.ask("squeue") + cluster.said("slurmctld")

    wait_for(lambda: latest(run) >= 20, 200, said)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: "queueing job" in log.read_text(), 120, said)
    # Slurm begins a job again two minutes after it was queued again. Ten seconds do, but not none: a node that was told
    # to end the job refuses a start of the same second, for good.
    wait_for(lambda: "JobState=PENDING" in cluster.ask("scontrol", "show", "job", job), 120, said)
    cluster.ask("scontrol", "update", f"jobid={job}", "StartTime=now+10")
    wait_for(lambda: re.search(r"resuming .* after step [1-9]", log.read_text()), 200, said)
    wait_for(lambda: "JobState=COMPLETED" in cluster.ask("scontrol", "show", "job", job), 200, said)
    assert list(losses(run)) == list(range(1, 201))
    alone(*arguments(cache, tmp_path / "alone", 200))
    assert losses(run) == losses(tmp_path / "alone")
    assert {path.name for path in (tmp_path / "slurm" / "logs" / job).iterdir()} == {"node_0", "node_1"}


@pytest.mark.slow
@NEEDS_NETWORKS
def test_a_task_that_ends_later_than_another_keeps_its_own_status(cluster, tmp_path):
    """srun could kill it, and its 137, greater than 75, would say nothing of a run that was saved."""
    wrapper, log = tmp_path / "root" / "launch" / "pretrain.sh", tmp_path / "job.log"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text("#!/usr/bin/env bash\n[[ $SLURM_NODEID == 1 ]] || sleep 5\nexit 75\n")
    wrapper.chmod(0o755)
    options = ["--cpus-per-task=1", "--no-requeue", f"--output={log}", f"--export=ALL,SSR_ROOT={tmp_path}/root"]
    answer = cluster.ask("sbatch", *options, SCRIPT, *ASKED)
    job = re.search(r"Submitted batch job (\d+)", answer)[1]

    def state():
        return cluster.ask("scontrol", "show", "job", job)

    wait_for(lambda: "JobState=FAILED" in state(), 120, state)
    assert "ExitCode=75:0" in state(), log.read_text()
    assert "stopped by a signal, and nothing is lost; submit it again" in log.read_text()
