"""Check whether this machine and the installed packages can run studies."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tuner.engines import driver_version, gpu_meter, open_nvml, visible_devices
from tuner.errors import InputError, TunerError
from tuner.installation import install_command, installation, own_distribution, version
from tuner.report.format import count, size
from tuner.store import refuse_damaged, revision
from tuner.study.disk import WORKING_BYTES, RoundDisk, free_bytes
from tuner.study.folder import StudyFolder, looks_like_round, open_folder
from tuner.study.plan import RoundPlan


class Health(StrEnum):
    """Effect of a check's result on a run."""

    OK = "ok"
    ABSENT = "absent"
    """An extra that is not installed; a run does without unless its file asks for it."""
    WARNING = "warning"
    """A run is slower or more limited."""
    PROBLEM = "problem"
    """A run would fail."""


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check."""

    name: str
    found: str
    status: Health = Health.OK
    advice: str = ""
    """What to do; empty if nothing is to be done."""


def is_healthy(checks: Sequence[Check]) -> bool:
    """Whether a run can start: no check found a problem."""
    return all(check.status is not Health.PROBLEM for check in checks)


def health_document(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the JSON document of `tuner doctor --json`."""
    return {"ok": is_healthy(checks), "checks": [asdict(check) for check in checks]}


_FOR_DEVELOPERS = ("dev", "bench", "docs")


def check_packages() -> Iterator[Check]:
    """Check tuner, Python, every required package, and the extras."""
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
    """Check a required package; `installed` is its version."""
    name, ranges = requirement.name, str(requirement.specifier)
    wanted = installation().with_packages(f"{name}{ranges}")
    if installed is None:
        return Check(name, f"not installed; requires {ranges}", Health.PROBLEM, wanted)
    if not requirement.specifier.contains(installed, prereleases=True):
        return Check(name, f"{installed}; requires {ranges}", Health.PROBLEM, wanted)
    return Check(name, installed)


def _python(ranges: str) -> Check:
    found = platform.python_version()
    if SpecifierSet(ranges).contains(found, prereleases=True):
        return Check("python", found)
    return Check(
        "python",
        f"{found}; requires {ranges}",
        Health.PROBLEM,
        "create a virtual environment with a supported Python",
    )


def _extra(extra: str, its: list[Requirement]) -> Check:
    missing = [r.name for r in its if not r.specifier.contains(_installed(r.name) or "", prereleases=True)]
    name = f"extra {extra}"
    if not missing:
        return Check(name, "installed: " + ", ".join(f"{r.name} {_installed(r.name)}" for r in its))
    return Check(
        name, f"not installed ({', '.join(missing)}); install with: {install_command(extra)}", Health.ABSENT
    )


def _installed(name: str) -> str | None:
    try:
        return version_of(name)
    except PackageNotFoundError:
        return None


def _applies(requirement: Requirement, *, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


_LITTLE_MEMORY_BYTES = 4 * 2**30
_LITTLE_DISK_BYTES = 5 * 2**30
"""Warn below this much free space: enough for a small model and the adapters of a small round."""


def examine(directory: Path) -> Iterator[Check]:
    """Yield every check, quick ones first; problems are reported, not raised."""
    yield from check_packages()
    yield _processor()
    yield _memory()
    yield from _gpus()
    folder, found = _study(directory)
    yield found
    yield _disk(directory, folder)
    if folder is not None:
        yield from _storage(folder)
    yield from _hub()


def _processor() -> Check:
    cores, threads = psutil.cpu_count(logical=False), os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS")
    limited = f", OMP_NUM_THREADS {limit}" if limit else ""
    return Check("cpu", f"{count(cores or threads, 'core')}, {count(threads, 'thread')}{limited}")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{size(memory.available)} of {size(memory.total)} available"
    if memory.available < _LITTLE_MEMORY_BYTES:
        advice = "a model of 1B parameters takes about 2 GB in bfloat16 before training starts"
        return Check("memory", found, Health.WARNING, advice)
    return Check("memory", found)


def _gpus() -> Iterator[Check]:
    """Check the GPUs that torch can use; memory and driver come from NVML if it is installed."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # from a partial installation
        reason = f"{type(error).__name__}: {error}"
        yield Check("gpu", f"torch cannot be imported: {reason}", Health.PROBLEM, "install torch again")
        return
    nvml, devices = open_nvml(), visible_devices()
    if not torch.cuda.is_available():
        yield _no_gpu(torch, devices)
        return
    driver = f", driver {driver_version(nvml)}" if nvml is not None else ""
    meter = gpu_meter(nvml, devices)
    readings = {reading.index: reading for reading in meter()} if meter else {}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        reading = readings.get(index)
        free = "" if reading is None else f"{size(reading.total_bytes - reading.used_bytes)} of "
        yield Check(
            f"gpu {index}",
            f"{about.name}, {free}{size(about.total_memory)}{' free' if free else ''}, compute capability "
            f"{about.major}.{about.minor}, CUDA {torch.version.cuda}{driver}",
        )


def _no_gpu(torch: Any, devices: tuple[str, ...]) -> Check:
    if devices:
        return Check(
            "gpu",
            f"the driver reports {count(len(devices), 'GPU')}, but torch {torch.__version__} cannot use them",
            Health.WARNING,
            "install the torch build for your CUDA version (https://pytorch.org/get-started)",
        )
    return Check("gpu", "none: trials train on the CPU, which is practical for small models only")


def _study(directory: Path) -> tuple[StudyFolder | None, Check]:
    """Return the folder's study, if any, and a check of its round files."""
    if not any(looks_like_round(path) for path in directory.glob("*.y*ml")):
        return None, Check("study", "none in this folder")
    try:
        folder = open_folder(directory)
    except InputError as error:
        return None, Check(
            "study",
            str(error),
            Health.PROBLEM,
            "run tuner study check ROUND.yaml: it reports the line of each mistake",
        )
    names = ", ".join(file.path.name for file in folder.files)
    if folder.broken:
        mistakes = "; ".join(str(error) for error in folder.broken)
        return folder, Check(
            "study",
            f"{folder.name}: {names}; with mistakes: {mistakes}",
            Health.WARNING,
            "fix these files, or move them away: their rounds are skipped",
        )
    return folder, Check("study", f"{folder.name}: {names}")


def _disk(directory: Path, folder: StudyFolder | None) -> Check:
    """Check free disk space in the checkpoint directory of the study's latest file, or in this folder."""
    place = directory.resolve()
    if folder is not None:
        plan = RoundPlan(folder.files[-1])
        place = plan.checkpoints
        try:
            RoundDisk(plan).refuse_unwritable()
        except TunerError as error:
            return Check("disk", str(error), Health.PROBLEM, "choose another checkpoints.directory")
    free = free_bytes(place)
    found = f"{size(free)} free at {place}"
    if free < WORKING_BYTES:
        return Check(
            "disk", found, Health.PROBLEM, "free some space; tuner study clean lists what can be deleted"
        )
    if free < _LITTLE_DISK_BYTES:
        return Check(
            "disk", found, Health.WARNING, "tuner study check estimates the size of a round's checkpoints"
        )
    return Check("disk", found)


def _storage(folder: StudyFolder) -> Iterator[Check]:
    try:
        refuse_damaged(folder.storage)
        known = revision(folder.storage)
    except TunerError as error:
        yield Check("storage", str(error), Health.PROBLEM, "see `storage` in the round file")
        return
    if known.found is None:
        yield Check("storage", f"{known.place}: empty; the first run creates it")
    elif known.is_newer:
        yield Check(
            "storage",
            f"{known.place}: revision {known.found}, but this version of tuner supports up to {known.newest}",
            Health.PROBLEM,
            f"created by a newer version of tuner: {installation().upgrade}",
        )
    else:
        later = "" if known.found == known.newest else f"; the next command upgrades it to {known.newest}"
        running = ", in use by a running process" if folder.is_running() else ""
        yield Check("storage", f"{known.place}: revision {known.found}{later}{running}")


def _hub() -> Iterator[Check]:
    """Check the Hub's cache and whether a token is set; the token itself is never shown."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    offline = "; offline (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    where = f"{cache} ({size(free_bytes(cache))} free){offline}"
    yield Check("hub cache", where if cache.is_dir() else f"{where}; empty")
    has_token = get_token() is not None
    yield Check("hub token", "found" if has_token else "none: gated models need `hf auth login`")
