"""What has to agree on all nodes for a trial's losses to: versions, and the user's own modules."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tuner.config import RoundSpec
from tuner.installation import package_version
from tuner.methods.plug_ins import named
from tuner.methods.registry import Kind, is_built_in, path_of

COMPARED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
"""Packages that decide a trial's losses. tuner's own code is sent along."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a parent compares before it uses a node."""

    hostname: str
    versions: Mapping[str, str]
    """Of Python and of the packages that decide a trial's losses; hashes of the user's modules."""
    gpus: tuple[str, ...]
    """Devices that the worker will see."""
    cores: int


def versions() -> dict[str, str]:
    """Return the versions that have to agree on all nodes."""
    return {
        "python": platform.python_version(),
        **{name: package_version(name) for name in COMPARED_PACKAGES},
    }


def differences(facts: NodeFacts, spec: RoundSpec) -> str | None:
    """Return in a sentence what a node has otherwise than this machine; None if they agree."""
    here = {**versions(), **{name: module_digest(name) for name in own_modules(spec)}}
    unlike = [
        f"{name} {there} instead of {here[name]}"
        for name, there in facts.versions.items()
        if name in here and there != here[name]
    ]
    if not unlike:
        return None
    same = ", ".join(("Python", *COMPARED_PACKAGES))
    return f"it has {', '.join(unlike)}; install the same versions of {same} on all nodes"


def own_modules(spec: RoundSpec) -> Iterator[str]:
    """Yield the packages, apart from tuner's own, that a worker imports for what a round file names.

    Not those of samplers, engines and trackers, which only the parent imports.
    """
    methods: list[tuple[Kind, str]] = [*named(spec.hyperparameters), ("metric", spec.objective.metric)]
    paths = [path_of(kind, name) for kind, name in methods if not is_built_in(kind, name)]
    answers = spec.evaluation.answers
    if answers is not None and not Path(answers.metric).is_absolute():
        paths.append(answers.metric)
    for package in dict.fromkeys(re.split(r"[.:]", path)[0] for path in filter(None, paths)):
        if package != "tuner" and module_digest(package) != "not installed":
            yield package


def module_digest(name: str) -> str:
    """Return the hash of a module's file, or of its package's; `not installed` without one."""
    try:
        found = find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        found = None
    if found is None:
        return "not installed"
    total = hashlib.sha256()
    places = [Path(each) for each in found.submodule_search_locations or [found.origin or ""]]
    for place in places:
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            total.update(path.read_bytes() if path.is_file() else b"")
    return total.hexdigest()[:12]
