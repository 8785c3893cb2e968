"""How tuner came to be installed, and so the command that installs more of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.requirements import Requirement

PACKAGE = "tuner"
"""What Python imports, and what is typed."""
PUBLISHED = "tuner-study"
"""What package indexes call it: there, `tuner` is another project."""

_COMMANDS = {
    "pip": ("pip install", "pip install --upgrade", "pip install"),
    "uv": ("uv pip install", "uv pip install --upgrade", "uv pip install"),
    "uv tool": ("uv tool install", "uv tool upgrade", f"uv tool install {PUBLISHED} --with"),
    "pipx": ("pipx install --force", "pipx upgrade", f"pipx inject {PUBLISHED}"),
}
"""By the tool: what installs, what brings the newest version, and what adds other packages."""
_CONSTRAINED = ("pip", "uv")
"""Tools whose command takes the file of versions that an extra needs, where it has one."""
_OWN_ENVIRONMENTS = {"uv-receipt.toml": "uv tool", "pipx_metadata.json": "pipx"}
"""Files at the root of environments that a tool keeps for one program."""


@dataclass(frozen=True, slots=True)
class Installation:
    """One installation of tuner."""

    name: str = PUBLISHED
    """Of the distribution."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What `direct_url.json` says (PEP 610); empty where it came from an index."""
    tool: str = "pip"
    """What installed it, a key of `_COMMANDS`."""
    requires: tuple[str, ...] = ()
    """What it depends on, those of its extras included."""

    def command(self, extra: str = "") -> str:
        """What has to be typed to install it again, with an extra. Where its source is gone: the extra's
        packages alone."""
        install = _COMMANDS[self.tool][0]
        extras = f"[{extra}]" if extra else ""
        folder = self._folder
        if folder is None:
            url = _requirement_url(self.origin)
            wanted = f"{self.name}{extras} @ {url}" if url else f"{self.name}{extras}"
            return f"{install} {shlex.quote(wanted)}"
        if not folder.is_dir() and (packages := self._packages(extra)):
            return self.with_packages(*packages)
        option = "--editable " if self.origin["dir_info"].get("editable") else ""
        versions = folder / f"constraints-{extra}.txt"
        if self.tool in _CONSTRAINED and versions.is_file():
            option = f"--constraint {shlex.quote(str(versions))} {option}"
        return f"{install} {option}{shlex.quote(f'{folder}{extras}')}"

    def with_packages(self, *requirements: str) -> str:
        """What has to be typed to install other packages beside it."""
        add = _COMMANDS[self.tool][2]
        between = " --with " if add.endswith("--with") else " "
        return f"{add} {between.join(map(shlex.quote, requirements))}"

    @property
    def upgrade(self) -> str:
        """What to do to have a newer version."""
        if (folder := self._folder) is not None:
            return f"bring {folder} up to date, then: {self.command()}"
        return f"{_COMMANDS[self.tool][1]} {self.name}"

    @property
    def _folder(self) -> Path | None:
        """The source that it was installed from; None where that is no folder here."""
        if "dir_info" not in self.origin:
            return None
        folder = Path(url2pathname(urlsplit(str(self.origin["url"])).path))
        return folder / str(self.origin.get("subdirectory", ""))

    def _packages(self, extra: str) -> list[str]:
        found = [Requirement(text) for text in self.requires]
        return [
            f"{each.name}{each.specifier}"
            for each in found
            if each.marker
            and each.marker.evaluate({"extra": extra})
            and not each.marker.evaluate({"extra": ""})
        ]


def _requirement_url(origin: Mapping[str, Any]) -> str:
    """The address as pip takes it in `name @ address`; empty for an index's."""
    if "url" not in origin:
        return ""
    vcs = origin.get("vcs_info")
    below = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
    if not vcs:
        return f"{origin['url']}{below}"
    revision = vcs.get("requested_revision")
    return f"{vcs['vcs']}+{origin['url']}{f'@{revision}' if revision else ''}{below}"


@cache
def own_distribution() -> Distribution | None:
    """What is known of the installed package, under whatever name; None where it is only imported."""
    try:
        return distribution(PUBLISHED)
    except PackageNotFoundError:
        names = packages_distributions().get(PACKAGE, [])
        return distribution(names[0]) if names else None


@cache
def installation() -> Installation:
    """The installation that runs now; where nothing is known of it, as if from an index by pip."""
    found = own_distribution()
    if found is None:
        return Installation()
    return Installation(
        found.metadata["Name"],
        _origin(found.read_text("direct_url.json")),
        _tool((found.read_text("INSTALLER") or "").strip()),
        tuple(found.requires or ()),
    )


def version() -> str:
    """tuner's version; `unknown` where it is only imported."""
    found = own_distribution()
    return "unknown" if found is None else found.version


def install_command(extra: str) -> str:
    """The command that adds an extra to the installation that runs now."""
    return installation().command(extra)


def package_version(package: str) -> str:
    """Return the version of an installed package, or `not installed`."""
    try:
        return version_of(package)
    except PackageNotFoundError:
        return "not installed"


def lacks(package: str, *, extra: str, is_installed: bool, has_gpu: bool) -> str | None:
    """Return what an optional package that computes on GPUs lacks here, and what to do; None if nothing."""
    if not is_installed:
        return f"the package {package} is not installed; {install_command(extra)}"
    return None if has_gpu else "it needs a CUDA GPU, and torch finds none; see tuner doctor"


def _origin(text: str | None) -> Mapping[str, Any]:
    try:
        said = json.loads(text or "{}")
    except ValueError:
        return {}
    return said if isinstance(said, dict) and isinstance(said.get("url"), str) else {}


def _tool(installer: str) -> str:
    for file, tool in _OWN_ENVIRONMENTS.items():
        if (Path(sys.prefix) / file).is_file():
            return tool
    return installer if installer in _COMMANDS else "pip"
