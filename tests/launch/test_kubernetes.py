"""launch/kubernetes.yaml and launch/pytorchjob.yaml: what the pods of such jobs would start."""

import re
import shlex
import subprocess

import yaml

from tests.launch.runs import ROOT, environment


def documents(name):
    return list(yaml.safe_load_all((ROOT / "launch" / name).read_text()))


def commands(container, address, **variables):
    """The container's commands, by a dry run, with the variables that its pod would have."""
    arguments = [re.sub(r"\$\(POD_IP\)", address, word) for word in container["args"]]
    assert not [word for word in arguments if "$(" in word]
    result = subprocess.run(
        [*container["command"], *arguments, "--dry-run"],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line) for line in result.stdout.splitlines()]


def option(words, name):
    return words[words.index(name) + 1]


def check_commands(preflight, training, node, host, port):
    assert option(training, "--rdzv-endpoint") == f"{host}:{port}"
    assert option(preflight, "--rdzv-endpoint") == f"{host}:{port + 1}"
    assert option(training, "--rdzv-id") == "ssr-pretrain-0"
    assert f"is_host={int(node == 0)}" in option(training, "--rdzv-conf")
    assert "join_timeout=1800" in option(preflight, "--rdzv-conf")
    for words in (preflight, training):
        assert (option(words, "--nnodes"), option(words, "--nproc-per-node")) == ("2", "gpu")
        assert option(words, "--local-addr") == f"10.0.0.{node}"
        assert option(words, "--log-dir") == f"/output/logs/node_{node}"
    assert training[training.index("-m") + 1 :] == [
        "ssr_deepspeed.pretrain",
        "--config=/workspace/configs/pretrain/tiny_cpu.json",
        "--output=/output/run",
        "--resume",
    ]


def check_pod(pod, container):
    patience = re.search(r"shutdown_timeout=(\d+)", (ROOT / "launch" / "ranks.sh").read_text())[1]
    assert pod["terminationGracePeriodSeconds"] > int(patience)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts["/output"]["persistentVolumeClaim"]["claimName"] == "ssr-pretrain"


def test_the_pods_of_the_indexed_job_meet_at_the_first():
    service, job, claim = documents("kubernetes.yaml")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name = job["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy asks for it
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--nodes={spec['completions']}" in container["args"]
    assert spec["parallelism"] == spec["completions"]
    (index,) = [variable for variable in container["env"] if variable["name"] == "NODE_RANK"]
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
    check_pod(pod, container)
    assert claim["metadata"]["name"] == "ssr-pretrain"
    for node in range(spec["completions"]):
        both = commands(container, f"10.0.0.{node}", NODE_RANK=str(node), JOB_COMPLETION_INDEX=str(node))
        check_commands(*both, node, f"{name}-0.{pod['subdomain']}", 29400)


def test_what_another_start_cannot_mend_ends_the_job_and_a_saved_run_goes_on():
    _, job, _ = documents("kubernetes.yaml")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    actions = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}
    assert actions == {2: "FailJob", 74: "FailJob", 75: "Ignore"}
    containers = {container["name"] for container in job["spec"]["template"]["spec"]["containers"]}
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == containers


def test_as_many_lost_ranks_are_borne_on_many_nodes_as_on_two():
    """Each fails one pod of every index: a limit over all pods would be used up by one loss on nine nodes."""
    _, job, _ = documents("kubernetes.yaml")
    spec = job["spec"]
    assert "backoffLimit" not in spec
    assert spec["backoffLimitPerIndex"] == 8
    assert spec["maxFailedIndexes"] == 0  # pods without that of one index would wait for it
    (job,) = documents("pytorchjob.yaml")
    pods = sum(part["replicas"] for part in job["spec"]["pytorchReplicaSpecs"].values())
    assert job["spec"]["runPolicy"]["backoffLimit"] == 8 * pods


def test_the_pods_of_a_pytorchjob_meet_at_its_master():
    (job,) = documents("pytorchjob.yaml")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sum(part["replicas"] for part in replicas.values()) == 2
    for node, part in enumerate((replicas["Master"], replicas["Worker"])):
        pod = part["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # the operator looks for it
        check_pod(pod, container)
        host = {"PET_MASTER_ADDR": "ssr-pretrain-master-0", "PET_MASTER_PORT": "23456"}
        sizes = {"PET_NNODES": "2", "PET_NODE_RANK": str(node), "PET_NPROC_PER_NODE": job["spec"]["nprocPerNode"]}
        pods = {"RANK": str(node), "WORLD_SIZE": "2", "MASTER_ADDR": host["PET_MASTER_ADDR"], "MASTER_PORT": "23456"}
        both = commands(container, f"10.0.0.{node}", **host, **sizes, **pods)
        check_commands(*both, node, "ssr-pretrain-master-0", 23456)
