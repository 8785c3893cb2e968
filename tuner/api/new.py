"""`study new`: count rows and write a commented round file."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic_core import PydanticCustomError

from tuner.api.check import PrepareWith, refuse_unusable
from tuner.commands.finished import read_runs
from tuner.config import ModelSpec, RoundFile, SourceSpec, load_round, new_round, read_round
from tuner.config.new_round import EVAL_FRACTION, MAX_LENGTH, new_command_round
from tuner.config.sections import possible_path
from tuner.config.settings import with_settings
from tuner.config.yaml_text import YamlError, parse
from tuner.data import load_tokenizer, share_for_evaluation
from tuner.data.preview import matching_columns, survey
from tuner.errors import InputError, ModelError, TargetModulesError
from tuner.records import Value
from tuner.report.format import count
from tuner.study.disk import taken_back
from tuner.study.imported import Imported, Said, import_runs, objective_said
from tuner.study.plan import RoundPlan

Telling = Callable[[], AbstractContextManager[Callable[[str], None]]]
"""Opens a receiver for the progress of a long task."""
_OF_TURNS = ("messages", "sharegpt")
"""Formats rendered by a chat template."""
_TEMPLATE_OF_TURNS = "chatml"
"""Template to write if the tokenizer has none."""
_WANTED_ROWS = 50
"""Evaluation rows to hold out if there are enough: with fewer, noise hides the gains."""


def write_first_round(
    directory: Path,
    *,
    model: str,
    data: str,
    eval_data: str | None,
    format: str | None,
    columns: Sequence[str] = (),
    split: str | None = None,
    template: str | None = None,
    settings: Sequence[str] = (),
    prepare: PrepareWith,
    telling: Telling,
) -> Path:
    """Write DIR/round1.yaml, which passes `study check`; return its path.

    `settings` are values to write into it, as `KEY=VALUE`; `prepare` prepares the rows, `telling` receives
    the progress. Raises InputError if the file exists or cannot be written, and the errors of `study check`;
    the file is then removed.
    """
    path = directory / "round1.yaml"
    if path.exists():
        raise InputError(f"{path}: exists; choose another folder, or edit the file")
    base = _model(_local("--model", model))
    data = _local("--data", data)
    eval_data = None if eval_data is None else _local("--eval", eval_data)
    named = dict(_named(option) for option in columns)
    if named and format is None:
        raise InputError("--columns requires --format")
    source = SourceSpec(path=data, format=_known(format) if format else "alpaca", columns=named, split=split)
    found, train_rows = survey(source, recognised=format is None)
    source = source.model_copy(update={"format": found})
    made = partial(_text, directory, base, source, train_rows, eval_data, template)

    def text(**known: Any) -> str:
        return with_settings(made(**known), settings, path)[0]

    with taken_back(directory, directory / ".tuner-cache"), ExitStack() as undo:
        undo.callback(path.unlink, missing_ok=True)
        file = _written(path, text(max_length=MAX_LENGTH))
        needs_template = found in _OF_TURNS and not load_tokenizer(_model_of(file)).chat_template
        # What is known only of model and tokenizer; the rows are counted with it.
        known: dict[str, Any] = {
            "max_length": _max_length(file),
            "template": _TEMPLATE_OF_TURNS if needs_template else None,
        }
        if eval_data is None:
            known["eval_fraction"] = _eval_fraction(_written(path, text(**known)), telling)
        _written(path, text(**known))
        try:
            refuse_unusable(path, prepare=prepare)
        except TargetModulesError as error:
            if not error.fitting:
                raise
            _written(path, text(**known, target_modules=error.fitting))
            refuse_unusable(path, prepare=prepare)
        undo.pop_all()
    return path


def _text(
    directory: Path,
    base: tuple[str, str | None],
    source: SourceSpec,
    train_rows: int,
    eval_data: str | None,
    recipe: str | None,
    **known: Any,
) -> str:
    """Return the file's text; `known` are arguments of `new_round` that depend on model and tokenizer."""
    path, gguf_file = base
    return new_round(
        study=_study_of(directory),
        model=_from_folder(path, directory),
        gguf_file=gguf_file,
        data=_from_folder(source.path, directory),
        eval=None if eval_data is None else _from_folder(eval_data, directory),
        format=source.format,
        columns=matching_columns(source),
        train_rows=train_rows,
        split=source.split,
        recipe=recipe,
        **known,
    )


def _study_of(directory: Path) -> str:
    """Return a study's name by its folder's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip("-.") or "study"


def _model_of(file: RoundFile) -> ModelSpec:
    return file.spec.absolute(file.directory).model


def _written(path: Path, text: str) -> RoundFile:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return load_round(path)


def _max_length(file: RoundFile) -> int:
    """Limit the row length to the model's number of positions."""
    from tuner.adapters import positions_of  # loads torch

    model = _model_of(file)
    load_tokenizer(model)  # has the clearest errors for a broken model
    return min(MAX_LENGTH, positions_of(model) or MAX_LENGTH)


def _eval_fraction(file: RoundFile, telling: Telling) -> float:
    spec = file.spec.absolute(file.directory)
    with telling() as say:
        return share_for_evaluation(
            spec,
            load_tokenizer(spec.model),
            RoundPlan(file).cache,
            say,
            least=EVAL_FRACTION,
            wanted_rows=_WANTED_ROWS,
        )


def import_finished(
    directory: Path,
    runs: Sequence[Path],
    *,
    round: str,
    metric: str,
    direction: str | None,
    max_train_steps: int | None,
    hyperparameters: Mapping[str, Value],
    command: str | None,
    tool: str,
    config: str | None,
) -> Imported:
    """Make a round of finished runs, as `Study.from_runs` says. Raises InputError."""
    said = Said(
        round=round,
        metric=metric,
        direction=direction,
        max_train_steps=max_train_steps,
        command=command,
        tool=tool,
        config=None if config is None else Path(config),
        values=hyperparameters,
    )
    return import_runs(directory, read_runs(runs, objective_said(said)), said, clock=time.time)


def write_first_command(directory: Path, *, tool: str, config: Path, settings: Sequence[str] = ()) -> Path:
    """Write DIR/round1.yaml for a training command, and return its path.

    `settings` are values to write into it, as `KEY=VALUE`. Raises InputError if the file exists, has a
    mistake or cannot be written; nothing is left then.
    """
    path = directory / "round1.yaml"
    if path.exists():
        raise InputError(f"{path}: exists; choose another folder, or edit the file")
    if not config.is_file():
        raise InputError(f"--config {config}: there is no such file")
    name = _study_of(directory)
    text = new_command_round(study=name, tool=tool, config=_from_folder(str(config.absolute()), directory))
    text = with_settings(text, settings, path)[0]
    read_round(text, path)  # refuses it before anything is written
    with taken_back(directory):
        _written(path, text)
    return path


def _model(path: str) -> tuple[str, str | None]:
    """Return a model's path, and the name of its GGUF file if it has one. Raises ModelError."""
    place = Path(path)
    if place.is_file() and place.suffix.lower() == ".gguf":
        return str(place.parent), place.name
    if not place.is_dir() or (place / "config.json").exists():
        return path, None
    files = sorted(file.name for file in place.iterdir() if file.suffix.lower() == ".gguf")
    if not files:
        raise ModelError(f"{path}: not a model: no config.json and no GGUF file")
    if len(files) > 1:
        raise ModelError(
            f"{path}: has {count(len(files), 'GGUF file')}: {', '.join(files)}; pass one of them as --model"
        )
    return path, files[0]


def _named(option: str) -> tuple[str, str]:
    """Parse a field of the format and its column name."""
    column, equals, name = option.partition("=")
    if not (column and equals and name):
        raise InputError(f"--columns {option}: expects COLUMN=NAME, such as prompt=question")
    return column, name


def _local(option: str, path: str) -> str:
    """Expand `~` in a path; return an id or a URL unchanged. Raises InputError for anything else."""
    if not path:
        raise InputError(f"{option}: is empty; pass a file, a directory or an id on the Hub")
    try:
        possible_path(path)
    except PydanticCustomError as error:
        raise InputError(f"{option}: {error.message()}") from None
    return os.path.expanduser(path)  # noqa: PTH111  a Path would merge the two slashes of a URL


def _known(format: str) -> Any:
    allowed = get_args(SourceSpec.model_fields["format"].annotation)
    if format not in allowed:
        raise InputError(f"--format {format}: expects one of {', '.join(allowed)}")
    return format


def _from_folder(path: str, directory: Path) -> str:
    """Make a local path or pattern relative to the study's folder; return a Hub id or a URL unchanged."""
    is_path = "://" not in path and (Path(path).exists() or set("*?[") & set(path))
    return os.path.relpath(path, directory) if is_path else path


_PLACE = "hyperparameters."


def values_of(options: Sequence[str], *, hint: Callable[[str], None]) -> dict[str, Any]:
    """Return the values of `--set hyperparameters.NAME=VALUE`, read as in a round file, by name.

    `hint` gets a sentence where the former spelling, without `hyperparameters.`, is used. Raises InputError.
    """
    found: dict[str, Any] = {}
    former = [option for option in options if not option.startswith(_PLACE)]
    for option in options:
        name, equals, text = option.removeprefix(_PLACE).partition("=")
        if not name or not equals:
            raise InputError(f"--set {option}: expects KEY=VALUE, such as {_PLACE}schedule=linear")
        if name in found:
            raise InputError(f"--set {option}: {name} is set twice")
        try:
            found[name] = parse(f"value: {text}").document["value"]
        except YamlError as error:
            raise InputError(f"--set {option}: {text} cannot be read: {error}") from None
    if former:
        hint(f"--set {former[0]} is now written --set {_PLACE}{former[0]}, as in study new; both work")
    return found
