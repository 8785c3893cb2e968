"""What of a command can be checked without running it, and the fingerprint of its workload."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.commands.launch import MISSING_COMMAND, missing_executable, placeholder_mistakes, read_config
from tuner.commands.probe import middle
from tuner.config import CommandSpec, RoundSpec
from tuner.config.command_section import value_of
from tuner.errors import InputError
from tuner.methods.tools import EXTRA, Mistaken, TrialSettings, bare, options_of, tool
from tuner.methods.tools.transformers import batch_mistake, device_batch_mistake
from tuner.records import Choices, Dimension, Fixed, Range, Value, complete_hyperparameters

_CODE = (".py", ".sh", ".yaml", ".yml", ".json", ".toml")


def refuse_unusable(spec: RoundSpec, directory: Path) -> None:
    """Raise InputError with everything that keeps the trials of a round from running. Starts nothing."""
    found = [f"{name}: {message}" if name else message for name, message in mistakes(spec, directory)]
    if found:
        raise InputError("\n".join(found))


def mistakes(spec: RoundSpec, directory: Path) -> Iterator[Mistaken]:
    """Yield what is wrong with a command, its configuration and its names. Raises InputError."""
    command = _command(spec)
    if command.run[0] == MISSING_COMMAND:
        yield Mistaken("command.run", "is not known of imported runs: write the command that trains a trial")
        return
    for message in placeholder_mistakes(command):
        key, _, said = message.partition(": ")
        yield Mistaken(key, said)
    if (missing := missing_executable(command.run, directory)) is not None:
        yield Mistaken("command.run", f"{missing} cannot be found; install it, or give its path")
    for part in command.run[1:]:
        if part.endswith(".py") and "$" not in part and not (directory / part).is_file():
            yield Mistaken("command.run", f"there is no file {directory / part}")
    chosen, config = tool(command.tool), read_config(command)
    if command.config is not None:
        yield from _beside_the_config(config, Path(command.config).parent, directory)
    space = spec.space()
    written = {name: space[name] for name in spec.hyperparameters if name in space}
    for name, message in chosen.mistakes(command.run, config, written):
        is_of_the_config = name in config and command.config is not None
        said = f"{Path(str(command.config)).name}: {name}: {message}"
        yield Mistaken("command.config", said) if is_of_the_config else Mistaken(name, message)
    if chosen.has_hook and "batch_size" in space:
        options = {**config, **options_of(command.run)}
        if (wrong := device_batch_mistake(options, chosen.device_batch)) is not None:
            yield Mistaken("hyperparameters.batch_size", wrong)
            return
        sizes = _values(space["batch_size"])
        wrong = batch_mistake(sizes, options, spec.run.gpus_per_worker, chosen.device_batch)
        if wrong is not None:
            yield Mistaken("hyperparameters.batch_size", wrong)
        if (own := EXTRA + chosen.device_batch[0]) in space:
            yield Mistaken(f"hyperparameters.{own}", "divides batch_size: write it in the configuration")
    yield from _set_twice(spec)


_MAY_BE_GIVEN = ("logging_steps", "data_seed")
"""Settings of trials that change neither their length nor what they are compared by."""


def _set_by_trials(spec: RoundSpec) -> Mapping[str, Any]:
    """Return what trials set by the tool's names, without what is below `extra`; values are examples."""
    command, chosen = _command(spec), tool(_command(spec).tool)
    values = complete_hyperparameters(spec.space(), middle(spec))
    trial = TrialSettings(
        {name: value for name, value in values.items() if not name.startswith(EXTRA)},
        spec.max_train_steps,
        spec.evaluation.every_steps,
        output="",
        gpus=spec.run.gpus_per_worker,
        config={**read_config(command), **options_of(command.run)},
    )
    return chosen.settings(trial)


def _set_twice(spec: RoundSpec) -> Iterator[Mistaken]:
    """Yield what the command or `extra` sets beside the trial, where one of the two would win in silence."""
    command = _command(spec)
    names = {*_set_by_trials(spec), *tool(command.tool).replaced} - {*_MAY_BE_GIVEN}
    is_same = any("${output_dir}" in part for part in command.run)
    for name in sorted(options_of(command.run).keys() & names - ({"output_dir"} if is_same else set())):
        yield Mistaken("command.run", f"sets --{name}, which tuner sets for each trial; remove it")
    for name in spec.space():
        if name.startswith(EXTRA) and bare(name) in names:
            yield Mistaken(f"hyperparameters.{name}", "is set by tuner for each trial; remove it from extra")


_INPUT = re.compile(r"^(?!output|logging|save|cache)(.*_)?(path|file|files|dataset|dataset_name|dir)$")
"""Names of a configuration whose values may be files and folders that a command reads."""


def _beside_the_config(value: Any, there: Path, here: Path, name: str = "") -> Iterator[Mistaken]:
    """Yield the files that lie beside a configuration, where a command that runs elsewhere misses them.

    A library may then take a data set of the Hub, or of its cache, that is called like the folder.
    """
    match value:
        case dict():
            for key, part in value.items():
                yield from _beside_the_config(part, there, here, str(key))
        case list():
            for part in value:
                yield from _beside_the_config(part, there, here, name)
        case str() if (
            value and _INPUT.search(name) and (there / value).exists() and not (here / value).exists()
        ):
            yield Mistaken(
                "command.config",
                f"{name}: {value} lies beside the configuration, in {there}, but the command runs in {here}: "
                "write an absolute path, or move the round file there",
            )


def remarks(spec: RoundSpec) -> Iterator[str]:
    """Yield what `study check` says of a command: what is replaced, and what cannot be known."""
    command = _command(spec)
    chosen, config = tool(command.tool), read_config(command)
    trials = {**dict.fromkeys(chosen.replaced), **_set_by_trials(spec)}
    replaced = [
        name for name, value in config.items() if name in trials and value not in (None, trials[name])
    ]
    if replaced and command.config is not None:
        yield f"{Path(command.config).name}: every trial sets {', '.join(replaced)} itself, by the round file"
    trackers = {**config, **options_of(command.run)}.get("report_to") or "none"
    listed = ", ".join(map(str, trackers if isinstance(trackers, list) else [trackers]))
    if chosen.has_hook and listed != "none":
        yield (
            f"the tool's report_to ({listed}) logs every attempt as a run of its own; run.report_to of the "
            "round file logs trials by their names"
        )
    said, devices = options_of(command.run), max(1, spec.run.gpus_per_worker)
    processes = said.get("nproc_per_node", said.get("num_processes", ""))
    if chosen.has_hook and "batch_size" in spec.space() and processes.isdigit() and int(processes) != devices:
        yield (
            f"the command starts {processes} processes, but run.gpus_per_worker is "
            f"{spec.run.gpus_per_worker}: an update has {int(processes) / devices:g} times batch_size "
            "sequences"
        )
    if not chosen.has_hook and not command.resume:
        yield (
            "there is no command.resume, so an interrupted trial and trials of longer rounds start over from "
            "step 0"
        )
    if "schedule" in spec.space() and spec.space()["schedule"] == Fixed("unknown"):
        yield (
            "the command's schedule is unknown, so trials of longer rounds start over; name it if it is one "
            "of tuner's"
        )


def workload(spec: RoundSpec, directory: Path, *, names: Mapping[str, str] | None = None) -> str:
    """Return the fingerprint of what is held fixed: command, configuration, scripts and number of GPUs.

    `names` says what the round file calls files that were sent to this machine: path here -> path there.
    """
    command = _command(spec)
    total = hashlib.sha256()
    chosen, config = tool(command.tool), read_config(command)
    fixed = {name: value for name, value in config.items() if name not in chosen.replaced}
    said = [_as_written(command.run, names or {}), command.tool, fixed, spec.run.gpus_per_worker]
    total.update(json.dumps(said, sort_keys=True, default=str).encode())
    for part in command.run:
        path = directory / part
        if path.suffix in _CODE and path.is_file():
            total.update(path.read_bytes())
    return f"command-{total.hexdigest()[:32]}"


def _as_written(run: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Return a command's words with the paths that the round file has."""
    places = sorted(names, key=len, reverse=True)
    found = {
        part: next((here for here in places if f"{value_of(part)}/".startswith(f"{here}/")), None)
        for part in run
    }
    return [part if (here := found[part]) is None else part.replace(here, names[here], 1) for part in run]


def _command(spec: RoundSpec) -> CommandSpec:
    assert spec.command is not None
    return spec.command


def _values(dimension: Dimension) -> tuple[Value, ...]:
    """Return the values of a dimension; of a range its whole numbers, as far as they matter."""
    match dimension:
        case Fixed(value=value):
            return (value,)
        case Choices(values=values):
            return values
        case Range(low=low, high=high):
            return tuple(range(int(low), int(high) + 1))[:2]
        case _:
            return ()
