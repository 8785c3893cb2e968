"""The files of the page on clusters: Compose, Slurm and Kubernetes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

from tests.docs.test_documents import option_of, resolve
from tests.studies import QUICKSTART
from tuner import Study

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "cluster.md").read_text()
SLURM = ROOT / "docs" / "how-to" / "cluster" / "slurm.sh"
KUBERAY = list(YAML(typ="safe").load_all(ROOT / "docs" / "how-to" / "cluster" / "kuberay.yaml"))
COMPOSE: dict[str, Any] = YAML(typ="safe").load(ROOT / "docker" / "cluster.yaml")
GPU: dict[str, Any] = YAML(typ="safe").load(ROOT / "docker" / "cluster-gpu.yaml")


def test_every_service_has_the_token_and_no_port() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"head", "node", "worker"}
    for service in services.values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
        assert "ports" not in service
        assert "network_mode" not in service
    text = (ROOT / "docker" / "cluster.yaml").read_text()
    page = PAGE + (ROOT / "docs" / "how-to" / "docker.md").read_text() + text.partition("x-ray")[0]
    assert {name for name in re.findall(r"\$\{(\w+)", text) if name not in page} <= {"GPUS_PER_NODE"}


def test_the_round_is_run_on_the_head_that_the_nodes_join() -> None:
    services = COMPOSE["services"]
    assert "--head" in services["head"]["command"]
    assert "--address=head:6379" in services["node"]["command"]
    assert "--address=head:6379" in GPU["services"]["node"]["command"]
    # Compose stops what depends on others first: the round saves while its nodes are there.
    assert set(services["worker"]["depends_on"]) == {"database", "head", "node"}
    words = [word.replace("${ROUND:-", "").rstrip("}") for word in services["worker"]["command"]]
    verb, rest = resolve(words)
    assert verb.make_context(verb.name, list(rest)).params["ray_address"] == "head:6379"


def test_a_job_runs_a_round_and_its_pods_have_the_token_and_are_for_themselves() -> None:
    job, policy = KUBERAY
    assert (job["kind"], policy["kind"]) == ("RayJob", "NetworkPolicy")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    assert [group["template"]["metadata"]["labels"] for group in groups] == [chosen, chosen]
    assert {"podSelector": {"matchLabels": chosen}} in policy["spec"]["ingress"][0]["from"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert head["volumes"][0]["persistentVolumeClaim"]["claimName"] == "study"
    assert head["containers"][0]["volumeMounts"] == [{"name": "study", "mountPath": "/study"}]
    words = job["spec"]["entrypoint"].split()
    verb, rest = resolve(words[1:])
    given = verb.make_context(verb.name, list(rest)).params
    assert (given["engine"], given["workers"]) == ("ray", "8")
    assert cluster["workerGroupSpecs"][0]["maxReplicas"] == 8
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]


def test_the_slurm_script_is_bash_and_has_a_token() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    text = SLURM.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "ray stop" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("tuner "))
    words = line.removeprefix("tuner ").removesuffix(" &").replace('"', "").split()
    verb, rest = resolve(words)
    for word in rest:
        if word.startswith("-"):
            option_of(word, verb)


def test_options_of_ray_start_exist() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'tuner-study[ray]'")
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}
    compose = [word for each in (COMPOSE, GPU) for s in each["services"].values() for word in s["command"]]
    lines = [line for text in (PAGE, SLURM.read_text()) for line in text.splitlines() if "ray start" in line]
    typed = [word.partition("=")[0] for word in (*compose, *" ".join(lines).split()) if word.startswith("--")]
    assert {"--head", "--address", "--block", "--node-ip-address"} <= set(typed)
    not_rays = {"--nodelist", "--engine", "--ray-address"}
    assert set(typed) - known - not_rays == set()


SCONTROL = """#!/bin/bash
[ "$1 $2" = "show hostnames" ] && printf '%s\\n' node-a node-b
"""
SRUN = """#!/bin/bash
# Runs the command on this machine; each `ray start` is a node with a fake GPU and folders of its own.
tasks=$SLURM_NTASKS
while [[ $1 == -* ]]; do
    case $1 in --nodelist=*) node=${1#*=} ;; --ntasks=*) tasks=${1#*=} ;; esac
    shift
done
if [[ "$1 $2" == "ray start" ]]; then
    echo "$node $tasks" >> "$FAKE_SLURM/starts"
    shift 2
    set -- ray start "$@" --num-gpus=1 --num-cpus=1 --object-store-memory=100000000
    set -- "$@" --temp-dir="$FAKE_SLURM/$node" --dashboard-agent-listen-port=0
fi
exec "$@"
"""


@pytest.mark.acceptance
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(400)
def test_the_slurm_script_runs_a_round_on_two_nodes(tmp_path: Path) -> None:
    """With a scheduler that starts everything on this machine, and the token that the script makes."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'tuner-study[ray]'")
    study, commands = tmp_path / "study", tmp_path / "bin"
    commands.mkdir()
    tuner = f'#!/bin/bash\nexec {sys.executable} -m tuner.cli "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("tuner", tuner)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    for name in ("base", "data"):
        shutil.copytree(QUICKSTART / name, study / name)
    text = (QUICKSTART / "round1.yaml").read_text().replace("trials: 8", "trials: 2")
    (study / "round1.yaml").write_text(text)
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as short:  # of a socket's name
        ran = subprocess.run(
            ["bash", SLURM, study, "round1.yaml"],
            env={
                **os.environ,
                "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": os.fspath(ROOT),
                "OMP_NUM_THREADS": "1",
                "FAKE_SLURM": short,
                "SLURM_JOB_ID": str(os.getpid()),
                "SLURM_NTASKS": "2",
                "SLURM_JOB_NODELIST": "node-[a-b]",
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        # srun starts as many tasks as the job has if it is not told how many.
        assert sorted((Path(short) / "starts").read_text().splitlines()) == ["node-a 1", "node-b 1"]
        assert "2 nodes" in ran.stderr
        assert "without a token" not in ran.stderr
        states = Study(study).status()["rounds"][0]["trials"]
        assert states["complete"] == 2
        deadline = time.monotonic() + 60
        while (left := still_running(short)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left


def still_running(folder: str) -> list[list[str]]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(folder in word for word in process.cmdline()):
                found.append(process.cmdline())
    return found
