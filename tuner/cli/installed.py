"""Which packages tuner needs, which of them are installed, and whether their versions are in its ranges."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tuner.installation import install_command, installation, own_distribution, version
from tuner.report.health import Check, Health

_FOR_DEVELOPERS = ("dev", "bench")


def check_packages() -> Iterator[Check]:
    """tuner, Python, every package that tuner needs, and its extras."""
    yield Check("tuner", version())
    itself = own_distribution()
    if itself is None:
        return
    yield _python(itself.metadata["Requires-Python"] or "")
    needed = [Requirement(text) for text in itself.requires or []]
    for requirement in needed:
        if _applies(requirement, extra=""):
            yield check_package(requirement, installed=_installed(requirement.name))
    for extra in itself.metadata.get_all("Provides-Extra") or []:
        if extra not in _FOR_DEVELOPERS:
            its = [r for r in needed if _applies(r, extra=extra) and not _applies(r, extra="")]
            yield _extra(extra, its)


def check_package(requirement: Requirement, *, installed: str | None) -> Check:
    """A package that has to be there; `installed` is its version."""
    name, ranges = requirement.name, str(requirement.specifier)
    wanted = installation().with_packages(f"{name}{ranges}")
    if installed is None:
        return Check(name, f"not installed; needed is {ranges}", Health.PROBLEM, wanted)
    if not requirement.specifier.contains(installed, prereleases=True):
        return Check(name, f"{installed}; needed is {ranges}", Health.PROBLEM, wanted)
    return Check(name, installed)


def _python(ranges: str) -> Check:
    found = platform.python_version()
    if SpecifierSet(ranges).contains(found, prereleases=True):
        return Check("python", found)
    return Check(
        "python",
        f"{found}; needed is {ranges}",
        Health.PROBLEM,
        "make a virtual environment with such a Python",
    )


def _extra(extra: str, its: list[Requirement]) -> Check:
    missing = [r.name for r in its if not r.specifier.contains(_installed(r.name) or "", prereleases=True)]
    name = f"extra {extra}"
    if not missing:
        return Check(name, "installed: " + ", ".join(f"{r.name} {_installed(r.name)}" for r in its))
    return Check(name, f"not installed ({', '.join(missing)}); {install_command(extra)} brings it")


def _installed(name: str) -> str | None:
    try:
        return version_of(name)
    except PackageNotFoundError:
        return None


def _applies(requirement: Requirement, *, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
