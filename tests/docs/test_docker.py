"""What docker/ names exists: copied files, commands, options; and nothing is open that should not be."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.docs.test_documents import ROOT, option_of, resolve

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = YAML(typ="safe").load(DOCKER / "compose.yaml")
PAGE = (ROOT / "docs" / "how-to" / "docker.md").read_text(encoding="utf-8")
OURS = ("worker", "dashboard")


def copied() -> list[str]:
    """What the Dockerfile takes from the repository."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return [name for line in lines for name in line.split()[:-1]]


def commands() -> list[list[str]]:
    """What is run in containers: by compose.yaml, by the image alone, and on the page."""
    found = [
        [word.replace("${ROUND:-", "").rstrip("}") for word in service(name)["command"]] for name in OURS
    ]
    found.append(re.findall(r'"(\w+)"', DOCKERFILE.partition("\nCMD ")[2]))
    found += [shlex.split(line) for line in re.findall(r"run --rm worker (.+)$", PAGE, re.MULTILINE)]
    assert len(found) >= 6
    return found


def service(name: str) -> dict[str, Any]:
    found: dict[str, Any] = COMPOSE["services"][name]
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_can_be_typed(words: list[str]) -> None:
    verb, rest = resolve(words)
    for word in rest:
        if word.startswith("-"):
            option_of(word, verb)
    assert verb.make_context(verb.name, list(rest)).info_name == verb.name


def test_what_is_copied_exists_and_is_not_left_out() -> None:
    names = copied()
    assert {"tuner", "pyproject.toml", "constraints.txt"} <= set(names)
    assert all((ROOT / name).exists() for name in names)
    kept = re.findall(r"^!(.+)$", (DOCKER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert sorted(kept) == sorted(names)


def test_the_image_runs_as_nobody_special_with_pinned_versions() -> None:
    assert re.search(r"^USER (?!root|0)\w+$", DOCKERFILE.rpartition("\nFROM ")[2], re.MULTILINE)
    assert re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert DOCKERFILE.count("pip install") == 2
    assert "\"$(grep '^torch==' tested.txt)\"" in DOCKERFILE
    assert '--constraint tested.txt ".[${EXTRAS}]"' in DOCKERFILE
    extras = re.search(r"^ARG EXTRAS=(.+)$", DOCKERFILE, re.MULTILINE)
    assert extras is not None
    assert f"EXTRAS:-{extras[1]}" in service("worker")["build"]["args"]["EXTRAS"]
    declared = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras[1].split(","))


def test_a_worker_that_crashes_starts_again_and_one_that_is_done_does_not() -> None:
    assert service("worker")["restart"].startswith("on-failure")


def test_both_of_ours_wait_for_the_database_and_are_built_from_here() -> None:
    assert set(COMPOSE["services"]) == {"database", *OURS}
    assert "pg_isready" in service("database")["healthcheck"]["test"]
    for name in OURS:
        build = service(name)["build"]
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        assert all(re.search(rf"^ARG {arg}\b", DOCKERFILE, re.MULTILINE) for arg in build["args"])
        assert service(name)["depends_on"]["database"]["condition"] == "service_healthy"
        mounts = service(name)["volumes"]
        assert mounts[0]["target"] == "/study"
        assert {mount.partition(":")[0] for mount in mounts[1:]} <= set(COMPOSE["volumes"])
    assert set(YAML(typ="safe").load(DOCKER / "gpu.yaml")["services"]) == {"worker"}


def test_only_the_dashboard_is_published_and_to_this_machine_alone() -> None:
    published = {name: each.get("ports", []) for name, each in COMPOSE["services"].items()}
    assert published == {"database": [], "worker": [], "dashboard": ["127.0.0.1:${PORT:-8080}:8080"]}
    assert service("dashboard")["command"][-1] == "8080"


def test_no_secret_is_written_and_every_variable_is_explained() -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    secrets = re.findall(r"(?:PASSWORD|TOKEN): (.+)$", text, re.MULTILINE)
    assert len(secrets) == 3
    assert all(secret.startswith("${") for secret in secrets)
    variables = set(re.findall(r"\$\{(\w+)", text))
    assert {name for name in variables if name not in PAGE} == set()
    assert "/docker/.env" in (ROOT / ".gitignore").read_text().splitlines()
