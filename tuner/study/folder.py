"""A study's folder: its round files and the one database they share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tuner.config import RoundFile, RoundSpec, load_round, without_secrets
from tuner.config.yaml_limits import MAX_BYTES
from tuner.data.pretrained import as_trained
from tuner.errors import InputError, RoundFileError, StorageError
from tuner.methods.registry import trusting_names
from tuner.records import CheckpointKind, RoundRecord, Trial
from tuner.store import CachedStore, MemoryStore, Store, exists, is_held, open_to_read
from tuner.study.plan import CheckpointFolder, RoundPlan

DRY_RUN = "dry-run"
"""Name of a dry run's folder, which is a study of its own."""
FORMER_DRY_RUN = "rehearsal"
"""Its name in earlier versions; a dry run that began there stays there."""
DRY_RUN_BANNER = "Dry run: losses are made up by a formula, nothing was trained"
"""Shown wherever a dry run is run or inspected."""


def dry_run_folder(directory: Path) -> Path:
    """Return the folder of the dry run of a study: the former one if only that is there."""
    former, folder = directory / FORMER_DRY_RUN, directory / DRY_RUN
    return former if is_study_folder(former) and not folder.exists() else folder


def dry_run_banner(directory: Path) -> str:
    """Return what to show of a dry run in this folder."""
    if directory.name != FORMER_DRY_RUN:
        return DRY_RUN_BANNER
    return f"{DRY_RUN_BANNER}. Hint: dry runs are now in {DRY_RUN}/; this one stays in {FORMER_DRY_RUN}/"


def is_dry_run(file: RoundFile) -> bool:
    """Return whether the file is in the folder of a dry run."""
    return file.spec.run.engine == "simulated" and file.directory.name in (DRY_RUN, FORMER_DRY_RUN)


@dataclass(frozen=True)
class StudyFolder:
    """The rounds of one study, on disk and in its database."""

    directory: Path
    files: tuple[RoundFile, ...]
    """By name, with numbers in numeric order."""
    broken: tuple[RoundFileError, ...] = field(default=())
    """Round files with mistakes."""
    unrunnable: tuple[RoundFileError, ...] = field(default=())
    """Of `files`, those with a name that no installed package registers: they can be read but not run."""

    @property
    def name(self) -> str:
        """Return the study's name."""
        return self.files[0].spec.study

    @property
    def is_dry_run(self) -> bool:
        """Return whether nothing in this study was trained."""
        return is_dry_run(self.files[0])

    @property
    def storage(self) -> str:
        """Return the database's URL."""
        return self.files[0].spec.absolute(self.directory).storage

    @property
    def has_begun(self) -> bool:
        """Return whether a round of this study has started."""
        with opened(self) as store:
            return bool(store.rounds())

    def open(self) -> Store:
        """Open the study's facts; an empty store if there is no database, so that reading creates nothing.

        A database that cannot be written can be read.
        """
        return open_to_read(self.storage, study=self.name) if self._has_database() else MemoryStore()

    def is_running(self) -> bool:
        """Return whether a process is running a round of this study."""
        return self._has_database() and is_held(self.directory, self.storage, self.name)

    def _has_database(self) -> bool:
        try:
            return exists(self.storage)
        except StorageError as error:
            raise self.files[0].placed(error) from error

    def file(self, round_name: str) -> RoundFile | None:
        """Return a round's file."""
        return next((file for file in self.files if file.spec.round == round_name), None)

    def plan(self, round_name: str) -> RoundPlan:
        """Return the plan of a round by its file. Raises InputError if there is no such file."""
        file = self.file(round_name)
        if file is None:
            known = ", ".join(f.spec.round for f in self.files)
            raise InputError(
                f"{round_name}: no file in this folder has `round: {round_name}`; rounds: {known}"
            )
        return RoundPlan(file)

    def checkpoints(self, round_name: str) -> CheckpointFolder:
        """Return the folder of a round's checkpoints."""
        file = self.file(round_name) or self.files[0]
        return CheckpointFolder(Path(file.spec.absolute(self.directory).checkpoints.directory) / round_name)

    def latest(self, store: Store) -> RoundRecord:
        """Return the round that started last, without sweeps. Raises InputError if none has."""
        rounds = [record for record in store.rounds() if not record.is_sweep]
        if not rounds:
            first = next(self.searches(store), self.files[0]).path.name
            raise InputError(f"no round of {self.name} has started; start with: tuner study run {first}")
        return rounds[-1]

    def is_sweep(self, round_name: str, store: Store) -> bool:
        """Return whether a round belongs to a sweep, by its record or its file."""
        record, file = store.round(round_name), self.file(round_name)
        return record.is_sweep if record is not None else file is not None and file.spec.is_sweep

    def searches(self, store: Store) -> Iterator[RoundFile]:
        """Return the files of rounds that do not belong to a sweep."""
        return (file for file in self.files if not self.is_sweep(file.spec.round, store))

    def adapter(self, trial: Trial) -> str | None:
        """Return the absolute path of the trial's adapter."""
        link = self.checkpoints(trial.round).adapter(trial)
        return None if link is None else str(link)

    def verified_adapter(self, trial: Trial) -> Path | None:
        """Return the same to load it. Raises CheckpointError unless its files are those recorded."""
        return self.checkpoints(trial.round).verified_adapter(trial)

    def as_trained(self, trial: Trial, spec: RoundSpec) -> RoundSpec:
        """Return a round's file with its base at the commit of the Hub that the trial was trained on.

        An intact checkpoint of the trial says which.
        """
        place = self.checkpoints(trial.round)
        best = trial.checkpoint(CheckpointKind.BEST)
        known = (c for c in (best, *place.resumable(trial)) if c is not None and place.is_intact(c))
        found = next(known, None)
        return spec if found is None else as_trained(spec, place.root / found.path)


def opened(folder: StudyFolder) -> closing[Store]:
    """The study's facts, each round read at most once, closed at the end of a `with` block."""
    return closing(CachedStore(folder.open()))


def open_folder(directory: Path) -> StudyFolder:
    """Find the rounds of a folder.

    Raises InputError if there are none, or if its files name different studies or databases.
    """
    directory = directory.resolve()
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; expects the folder of a study")
    files: list[RoundFile] = []
    broken: list[RoundFileError] = []
    unrunnable: list[RoundFileError] = []
    for path in sorted(directory.glob("*.y*ml"), key=_natural):
        if not looks_like_round(path):
            continue
        try:
            files.append(load_round(path))
        except RoundFileError as error:
            try:
                with trusting_names():
                    files.append(load_round(path))
                unrunnable.append(error)
            except RoundFileError:
                broken.append(error)
    if not files:
        if broken:
            raise broken[0]
        raise InputError(
            f"{directory}: no round file here (a .yaml with `study:` and `round:`); "
            "create one with: tuner study new DIR --model M --data D"
        )
    _refuse_mixed(directory, files)
    return StudyFolder(directory, tuple(files), tuple(broken), tuple(unrunnable))


def is_study_folder(directory: Path) -> bool:
    """Return whether a folder has a file that looks like a round."""
    return any(map(looks_like_round, directory.glob("*.y*ml")))


def looks_like_round(path: Path) -> bool:
    """Return whether a YAML file has the top-level keys of a round."""
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return False
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return bool(re.search(r"^round\s*:", text, re.MULTILINE) and re.search(r"^study\s*:", text, re.MULTILINE))


def _refuse_mixed(directory: Path, files: Sequence[RoundFile]) -> None:
    for what, values in (
        ("study", {f.spec.study for f in files}),
        ("storage", {f.spec.absolute(directory).storage for f in files}),
    ):
        if len(values) > 1:
            listed = ", ".join(
                f"{f.path.name}:{f.line(what) or 1} has {_shown(getattr(f.spec, what))}" for f in files
            )
            raise InputError(
                f"{directory}: the rounds of a study share one {what}; here {listed}. Write the same in all, "
                "or move the others to a folder of their own"
            )
    names = [f.spec.round for f in files]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        culprits = [f"{f.path.name}:{f.line('round')}" for f in files if f.spec.round == sorted(twice)[0]]
        raise InputError(
            f"{directory}: {', '.join(culprits)}: the same `round: {sorted(twice)[0]}`, and each round has "
            "one file; name the others differently, or move them out of this folder"
        )


def _shown(value: str) -> str:
    """Return a study's name, or a database's URL without its password."""
    return without_secrets(value) if "://" in value else value


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a sort key by which `round10` comes after `round9`."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name) if part
    ]
