"""The files of the page on clusters: Compose, Slurm and Kubernetes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML

from tests.docs.test_documents import option_of, resolve
from tuner.cli import app

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
    words = [word.replace("${ROUND:-", "").rstrip("}") for word in services["worker"]["command"]]
    verb, rest = resolve(words, typer.main.get_command(app))
    assert verb.make_context(verb.name, list(rest)).params["ray_address"] == "head:6379"


def test_pods_have_the_token_and_are_for_themselves() -> None:
    cluster, policy = KUBERAY
    assert (cluster["kind"], policy["kind"]) == ("RayCluster", "NetworkPolicy")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        environment = {each["name"]: each for each in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in environment["RAY_AUTH_TOKEN"]["valueFrom"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["spec"]["rayVersion"] == pinned[1]


def test_the_slurm_script_is_bash_and_has_a_token() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    text = SLURM.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "ray stop" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("tuner "))
    words = line.removeprefix("tuner ").removesuffix(" &").replace('"', "").split()
    verb, rest = resolve(words, typer.main.get_command(app))
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
