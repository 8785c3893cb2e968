"""A trial's command: its arguments, its configuration file and its environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tuner.config import CommandSpec
from tuner.errors import InputError
from tuner.methods.table import seed_of
from tuner.methods.tools import Settings, Tool, TrialSettings, options_of, tool
from tuner.playbook.schedule import trunk_end
from tuner.records import Assignment, Hyperparameters, to_json

HOOK = Path(__file__).parent / "hook"
"""The folder of `sitecustomize.py`, and of nothing else."""
MISSING_COMMAND = "WRITE-THE-COMMAND"
"""Program of a round of imported runs whose command is not known."""
_VALUES = ("args", "args_no_hyphens", "args_json_file", "config")
"""Placeholders that carry the hyperparameters."""
_PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
_OF_ANOTHER_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What is started for one attempt."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """The files of one attempt, in the trial's folder."""

    folder: Path

    @property
    def output(self) -> Path:
        """Return `TUNER_OUTPUT_DIR`."""
        return self.folder / "output"

    @property
    def metrics(self) -> Path:
        """Return `TUNER_METRICS`."""
        return self.folder / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """Return the file with what the command prints."""
        return self.folder / "command.log"

    @property
    def token(self) -> Path:
        """Return the file with the token of the attempt's processes."""
        return self.folder / "token"

    @property
    def hyperparameters(self) -> Path:
        """Return `TUNER_HYPERPARAMETERS`."""
        return self.folder / "hyperparameters.json"


def read_config(spec: CommandSpec) -> dict[str, Any]:
    """Return the content of the command's configuration file; empty without one. Raises InputError."""
    if spec.config is None:
        return {}
    path = Path(spec.config)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"command.config: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"command.config: {path} is not UTF-8 text") from error
    try:
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"command.config: {path}: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"command.config: {path}: expects `key: value` lines")
    return found


def prepared(
    spec: CommandSpec,
    assignment: Assignment,
    place: Place,
    *,
    gpus: int,
    token: str,
    resume_from: Path | None,
    evaluate_at_start: bool,
) -> Launch:
    """Write the attempt's files and return what to start."""
    chosen, config = tool(spec.tool), read_config(spec)
    settings = chosen.settings(
        TrialSettings(
            hyperparameters=assignment.hyperparameters,
            max_train_steps=assignment.max_train_steps,
            evaluate_every=assignment.evaluate_every,
            output=str(place.output),
            gpus=gpus,
            config={**config, **options_of(spec.run)},
            resume_from=None if resume_from is None else str(resume_from),
        )
    )
    place.output.mkdir(parents=True)
    place.hyperparameters.write_text(json.dumps(to_json(assignment.hyperparameters), indent=1))
    arguments = place.folder / "arguments.json"
    arguments.write_text(json.dumps(to_json(settings), indent=1))
    values: dict[str, str | list[str]] = {
        "args": list(_options(settings, hyphens="--")),
        "args_no_hyphens": list(_options(settings, hyphens="")),
        "args_json_file": str(arguments),
        "output_dir": str(place.output),
        "resume_from": str(resume_from or ""),
        "config": ""
        if spec.config is None
        else str(_written_config(spec.config, config, settings, chosen, place)),
    }
    run = [*spec.run, *(spec.resume if resume_from is not None else ())]
    command = tuple(part for each in run for part in _filled(each, values))
    environment = {
        **_inherited(os.environ),
        **_variables(assignment, place, resume_from=resume_from),
        "TUNER_TOKEN": token,
        "PYTHONPATH": os.pathsep.join(_python_path(os.environ)),
    }
    if evaluate_at_start:
        environment["TUNER_EVALUATE_AT_START"] = "1"
    return Launch((_executable(command[0], environment), *command[1:]), environment)


def placeholder_mistakes(spec: CommandSpec) -> Iterator[str]:
    """Yield what is wrong with the placeholders of a command."""
    named = set(_PLACEHOLDER.findall(" ".join(spec.run)))
    if not named & set(_VALUES):
        yield (
            "command.run: no hyperparameter reaches the command; add one of "
            + ", ".join(f'"${{{name}}}"' for name in _VALUES)
        )
    in_resume = set(_PLACEHOLDER.findall(" ".join(spec.resume)))
    known = (*_VALUES, "output_dir")
    for key, names, allowed in (("run", named, known), ("resume", in_resume, (*known, "resume_from"))):
        for name in sorted(names - {*allowed}):
            listed = ", ".join(f"${{{each}}}" for each in allowed)
            yield f"command.{key}: ${{{name}}} is unknown; expects one of {listed}"
    if "config" in named and spec.config is None:
        yield "command.run: uses ${config}, but there is no file; add `config: FILE` under command"
    if spec.config is not None and "config" not in named:
        yield 'command.config: is not used; add "${config}" to command.run'
    if spec.resume and "resume_from" not in in_resume:
        yield 'command.resume: expects "${resume_from}" in it, such as [--resume, "${resume_from}"]'


def missing_executable(command: Sequence[str], directory: Path) -> str | None:
    """Return the program of a command if it cannot be found; None if it can."""
    found = shutil.which(command[0], path=_search_path(os.environ)) or (directory / command[0]).is_file()
    return None if found else command[0]


def _filled(part: str, values: Mapping[str, str | list[str]]) -> list[str]:
    whole = _PLACEHOLDER.fullmatch(part)
    if whole is not None and isinstance(values[whole[1]], list):
        return list(values[whole[1]])
    return [_PLACEHOLDER.sub(lambda found: _as_text(values[found[1]]), part)]


def _as_text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)


def _options(settings: Settings, *, hyphens: str) -> Iterator[str]:
    """Yield `--name=value`, as W&B's `${args}`; a list follows its name. What is None is left out."""
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, (list, tuple)):
            yield f"{hyphens}{name}"
            yield from map(str, value)
        elif isinstance(value, Mapping):
            yield f"{hyphens}{name}={json.dumps(value)}"
        else:
            yield f"{hyphens}{name}={value}"


def _written_config(path: str, config: Settings, settings: Settings, chosen: Tool, place: Place) -> Path:
    """Write the configuration with the trial's values, in the format of the file."""
    kept = {name: value for name, value in config.items() if name not in chosen.replaced}
    written = to_json({**kept, **settings})
    copy = place.folder / Path(path).name
    if copy.suffix == ".json":
        copy.write_text(json.dumps(written, indent=1))
    else:
        copy.write_text(yaml.safe_dump(written, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return copy


def stable_step(hyperparameters: Hyperparameters, max_train_steps: int) -> int | None:
    """Return the end of the stable phase; None without one."""
    end = trunk_end(hyperparameters, max_train_steps)
    return end if end is not None and end > 0 else None


def _variables(assignment: Assignment, place: Place, *, resume_from: Path | None) -> dict[str, str]:
    """Return the documented variables of a command."""
    stable = stable_step(assignment.hyperparameters, assignment.max_train_steps)
    said = {
        "TUNER_METRICS": str(place.metrics),
        "TUNER_TRIAL_DIR": assignment.directory,
        "TUNER_OUTPUT_DIR": str(place.output),
        "TUNER_HYPERPARAMETERS": str(place.hyperparameters),
        "TUNER_MAX_STEPS": str(assignment.max_train_steps),
        "TUNER_EVALUATE_EVERY": str(assignment.evaluate_every),
        "TUNER_SEED": str(seed_of(assignment.hyperparameters)),
        "TUNER_SAVE_STEPS": ",".join(map(str, assignment.trunk_steps)),
    }
    if stable is not None:
        said["TUNER_STABLE_STEP"] = str(stable)
    if resume_from is not None:
        said["TUNER_RESUME_FROM"] = str(resume_from)
    return said


def _inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without what belongs to another trial or launcher."""
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith("TUNER_") and name not in _OF_ANOTHER_LAUNCH
    }
    return {**kept, "PATH": _search_path(environment)}


def _search_path(environment: Mapping[str, str]) -> str:
    """Return PATH with the folder of this interpreter last, where `python` and `trl` may be found."""
    return os.pathsep.join(filter(None, [environment.get("PATH"), str(Path(sys.executable).parent)]))


def _python_path(environment: Mapping[str, str]) -> list[str]:
    """Return PYTHONPATH with the hook first; an empty element would mean the current directory."""
    return [str(HOOK), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]


def _executable(name: str, environment: Mapping[str, str]) -> str:
    return shutil.which(name, path=environment["PATH"]) or name
