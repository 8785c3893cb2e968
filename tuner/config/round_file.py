"""A round file as a value: its top level, and paths relative to the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from tuner.config.command_section import CommandSpec, command_refusals, flattened, flattened_enqueue
from tuner.config.data_section import DataSpec, SourceSpec
from tuner.config.dimensions import as_numbers, as_range, complete_space, names_schema
from tuner.config.rules import (
    adapter_refusals,
    direction_refusals,
    horizon_refusals,
    objective_refusals,
    search_refusals,
)
from tuner.config.sections import (
    IGNORED_WHERE_INACTIVE,
    STRICT,
    CheckpointsSpec,
    Count,
    EvaluationSpec,
    ModelSpec,
    Name,
    ObjectiveSpec,
    PathText,
    RunSpec,
    SearchSpec,
    Table,
    WrittenHyperparameters,
    condition_of,
    counts_with,
    described_choice,
    using,
)
from tuner.config.wording import ONE_HORIZON, Refusal, mistake, refuse
from tuner.config.yaml_text import one_line
from tuner.errors import InputError, shown
from tuner.methods.metrics import metric
from tuner.methods.plug_ins import Chooser, PlugIn, table_for, unloaded
from tuner.methods.registry import BUILT_IN, is_built_in, trusting_names
from tuner.methods.tools import Tool, tool
from tuner.methods.variants import possible_variants
from tuner.records import Choices, Direction, Fixed, Objective, Space, num_points

_DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
_PATTERN = re.compile(r"[*?\[]")
_SQLITE_FILE = re.compile(r"(sqlite(?:\+\w+)?:///)([^?]+)(.*)", re.DOTALL)


def absolute_model(path: str, directory: Path) -> str:
    """The model's directory, or the id on the Hub unchanged: a name is a path when it exists or begins so."""
    is_path = _begins_like_a_path(path) or _exists(directory / path)
    return absolute_path(path, directory) if is_path else path


def absolute_source(path: str, directory: Path, *, is_plain_text: bool = False) -> str:
    """The data file or pattern of files, or the Hub's id or the URL unchanged.

    A name that ends like a data file, has a character of patterns, or is of plain text, is a path.
    """
    if "://" in path:
        return path
    is_path = (
        is_plain_text
        or _begins_like_a_path(path)
        or path.lower().endswith(_DATA_SUFFIXES)
        or _PATTERN.search(path) is not None
        or _exists(directory / path)
    )
    return absolute_path(path, directory) if is_path else path


def absolute_metric(metric: str, directory: Path) -> str:
    """`file.py:function` with the file made absolute; a module of a file that is there is that file."""
    place, colon, function = metric.rpartition(":")
    if not colon:
        return metric
    if not place.endswith(".py"):
        file = f"{place.replace('.', '/')}.py"
        if not _exists(directory / file):
            return metric
        place = file
    return f"{absolute_path(place, directory)}:{function}"


def absolute_storage(url: str, directory: Path) -> str:
    """The URL with SQLite's file made absolute; any other URL unchanged."""
    found = _SQLITE_FILE.fullmatch(url)
    if found is None or found[2].startswith("file:"):
        return url
    scheme, path, query = found.groups()
    return f"{scheme}{absolute_path(path, directory)}{query}"


_SECRET_OPTION = re.compile(r"([?&](?:password|passfile|sslpassword|oauth_client_secret)=)[^&#]*")


def without_secrets(url: str) -> str:
    """The URL of a database as it may be recorded and shown; text that is no URL is not shown at all."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "(not a database URL)"
    account, at, place = rest.rpartition("@")
    if at and not scheme.startswith("sqlite"):
        user, colon, _ = account.partition(":")
        rest = f"{user}{':***' if colon else ''}@{place}"
    return _SECRET_OPTION.sub(r"\1***", f"{scheme}://{rest}")


def absolute_path(path: str, directory: Path) -> str:
    """`~` expanded, `..` resolved by name, links left alone."""
    return os.path.normpath(directory.absolute() / Path(path).expanduser())


def _tool_of(command: Any) -> Tool:
    """Return the tool that a file's command names; the least particular one where it cannot be read."""
    name = command.get("tool", "none") if isinstance(command, dict) else "none"
    return tool(name if name in BUILT_IN["tool"] else "none")


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  Path.exists raises for a name that is too long


def _begins_like_a_path(path: str) -> bool:
    return path.startswith(("/", "~", "./", "../")) or path in (".", "..")


_STORAGE = r"^(sqlite(\+\w+)?:///[^:].*|postgresql(\+\w+)?://.+)$"
_FILE_NAME = re.compile(r"(sqlite://)?(?P<file>[\w./-]+\.(db|sqlite3?))")
EVALUATIONS_BY_DEFAULT = 12
"""Evaluations of a trial after step 0 if `evaluation.every_steps` is not set."""


RECORDED_KEYS = ("plug_ins", "data_fingerprint", "model_fingerprint")
"""Of a recorded round, which a file does not have."""


def _nothing(plug_ins: object) -> bool:
    return not plug_ins


def _table(written: Mapping[str, Any], plug_ins: Sequence[Mapping[str, Any]], tool_name: str | None) -> Table:
    return table_for(written, plug_ins) if tool_name is None else tool(tool_name).table(written)


@lru_cache(maxsize=128)
def _space(content: str, max_train_steps: int, tool_name: str | None) -> Space:
    """Parse hyperparameters and descriptions of plug-ins, as JSON: once for all who ask, and for copies."""
    written, plug_ins = json.loads(content)
    with trusting_names():  # they were checked when the file was read
        return complete_space(
            written, max_train_steps=max_train_steps, table=_table(written, plug_ins, tool_name)
        )


NO_MODEL = ModelSpec.model_construct(path="")
"""The base model of a round that runs a command, which alone knows it."""
NO_DATA = DataSpec.model_construct(train=[], eval_fraction=0.5)
"""The rows of such a round."""


def _is_none(section: object) -> bool:
    return section is NO_MODEL or section is NO_DATA


def _schema(schema: dict[str, Any]) -> None:
    """Let `command` take the place of model and data, and of the table of hyperparameters."""
    schema["required"] = [name for name in schema["required"] if name not in ("evaluation", "model", "data")]
    schema["if"] = {"required": ["command"]}
    schema["then"] = {"not": {"anyOf": [{"required": ["model"]}, {"required": ["data"]}]}}
    schema["else"] = {"required": ["model", "data"], **names_schema(IGNORED_WHERE_INACTIVE)}


class RoundSpec(BaseModel):
    """One round: an Optuna study in which every trial trains for the same number of steps."""

    model_config = STRICT | ConfigDict(json_schema_extra=_schema)

    study: Name
    """Name of the study that all rounds in this folder belong to."""
    round: Name
    """Name of this round; also its folder under `checkpoints.directory`."""
    goal: str = ""
    """Purpose of the round, shown in reports."""
    kind: Literal["search", "sweep"] = "search"
    """`sweep`: a round written by `study sweep`, which is never promoted or compared with other rounds."""
    model: Annotated[ModelSpec, Field(exclude_if=_is_none)]
    """The frozen base model."""
    data: Annotated[DataSpec, Field(exclude_if=_is_none)]
    """Training, evaluation and test rows."""
    command: Annotated[CommandSpec | None, Field(exclude_if=_nothing)] = None
    """A training command of your own, in place of `model` and `data`."""
    max_train_steps: Count
    """Number of optimizer steps of every trial. It is one number and never searched."""
    hyperparameters: WrittenHyperparameters = {}
    """One line each: a scalar fixes a value, a list or `{low, high, log}` searches it; the rest use
    defaults."""
    search: SearchSpec = SearchSpec()
    """Number of trials, and how hyperparameters are proposed."""
    evaluation: EvaluationSpec
    """When the loss is measured."""
    objective: ObjectiveSpec = ObjectiveSpec()
    """The metric that chooses the best step and the best trials."""
    checkpoints: CheckpointsSpec = CheckpointsSpec()
    """What is kept on disk."""
    run: RunSpec = RunSpec()
    """Where and how it runs."""
    plug_ins: SkipJsonSchema[Annotated[list[dict[str, Any]], Field(exclude_if=_nothing)]] = []
    """Recorded descriptions of plug-ins. Not a key of the file."""
    data_fingerprint: SkipJsonSchema[Annotated[str, Field(exclude_if=_nothing)]] = ""
    """Recorded fingerprint of the rows. Not a key of the file."""
    model_fingerprint: SkipJsonSchema[Annotated[str, Field(exclude_if=_nothing)]] = ""
    """Recorded fingerprints of the model's configuration and of its files. Not a key of the file."""
    storage: Annotated[PathText, Field(json_schema_extra={"pattern": _STORAGE})] = "sqlite:///tuner.db"
    """The database: `sqlite:///FILE` relative to the round file, or
    `postgresql+psycopg://USER@HOST/DATABASE`."""

    @model_validator(mode="wrap")
    @classmethod
    def _with_plug_ins(cls, document: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Check hyperparameters against the table with those of the plug-ins, as far as known."""
        if not isinstance(document, dict):
            return handler(document)
        if document.get("command") is not None:
            return cls._with_command(document, handler)
        recorded = document.get("plug_ins", ())
        for plug_in in recorded:
            PlugIn.from_json(plug_in).stand_in()
        written = document.get("hyperparameters")
        with using(table_for(written if isinstance(written, dict) else {}, recorded)):
            return handler(document)

    @classmethod
    def _with_command(cls, document: dict[str, Any], handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Check a round that runs a command against the names of its tool."""
        chosen = _tool_of(document["command"])
        written = flattened(document.get("hyperparameters", {}))
        flat = {"model": NO_MODEL, "data": NO_DATA, **document, "hyperparameters": written}
        if "search" in document:
            flat["search"] = flattened_enqueue(document["search"])
        table = chosen.table(written if isinstance(written, dict) else {})
        with using(table, unknown=chosen.unknown_name):
            return handler(flat)

    @model_validator(mode="before")
    @classmethod
    def _evaluate_by_default(cls, document: Any) -> Any:
        if not isinstance(document, dict):
            return document
        evaluation, horizon = document.get("evaluation", {}), document.get("max_train_steps")
        if not isinstance(evaluation, dict) or "every_steps" in evaluation:
            return document
        every = max(1, round(horizon / EVALUATIONS_BY_DEFAULT)) if isinstance(horizon, int) else 1
        return {**document, "evaluation": {"every_steps": every, **evaluation}}

    @model_validator(mode="before")
    @classmethod
    def _one_objective(cls, document: Any) -> Any:
        """`evaluation.answers.objective: true`, the former spelling, means `objective: {metric: answers}`."""
        evaluation = document.get("evaluation") if isinstance(document, dict) else None
        answers = evaluation.get("answers") if isinstance(evaluation, dict) else None
        if not isinstance(evaluation, dict) or not isinstance(answers, dict):
            return document
        objective = document.get("objective")
        if answers.get("objective") is True and "objective" not in document:
            return {**document, "objective": {"metric": "answers"}}
        is_answers = isinstance(objective, dict) and objective.get("metric") == "answers"
        if is_answers and "objective" not in answers:
            answers = {**answers, "objective": True}
            return {**document, "evaluation": {**evaluation, "answers": answers}}
        return document

    @field_validator("max_train_steps", mode="before")
    @classmethod
    def _one_horizon(cls, horizon: Any) -> Any:
        if isinstance(horizon, (list, dict)):
            raise mistake(f"expects one whole number, got {shown(horizon)}. {ONE_HORIZON}")
        return horizon

    @field_validator("storage")
    @classmethod
    def _database_on_disk_or_server(cls, url: str) -> str:
        if not re.fullmatch(_STORAGE, url):
            file = _FILE_NAME.fullmatch(url)
            scheme = url.partition(":")[0]  # nothing more of it: a password may stand anywhere
            begins = f"; this begins with {scheme!r}" if scheme.replace("+", "").isalnum() else ""
            raise mistake(
                "expects sqlite:///FILE (relative to this file) or postgresql+psycopg://USER@HOST/DATABASE"
                + (begins if url != scheme else "")
                + (" and names no file" if scheme.startswith("sqlite") and url != scheme else "")
                + (f"; for that file, write sqlite:///{file['file']}" if file else "")
            )
        return url

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        with using(self.table):  # runs outside of the validator above
            refuse("round", self._refusals())
        return self

    def _refusals(self) -> list[Refusal]:
        """Return the conflicts between sections."""
        space = self.space()
        refusals = [
            *horizon_refusals(
                self.max_train_steps,
                evaluation=self.evaluation,
                run=self.run,
                space=space,
                written=self.hyperparameters,
            ),
            *search_refusals(self.round, search=self.search, space=space),
        ]
        if self.command is None:
            refusals += adapter_refusals(space)
            refusals += objective_refusals(self.objective, evaluation=self.evaluation, run=self.run)
        else:
            refusals += self._beside_command()
            refusals += direction_refusals(self.objective)
            refusals += command_refusals(
                self.command,
                space=space,
                evaluation=self.evaluation,
                objective=self.objective,
                run=self.run,
            )
        return refusals

    def _beside_command(self) -> list[Refusal]:
        """Return the sections that a command takes the place of."""
        message = "the command has its own; remove this section, or remove command"
        written = {"model": self.model is not NO_MODEL, "data": self.data is not NO_DATA}
        return [
            Refusal((name,), message, rests_on=("command",)) for name, is_there in written.items() if is_there
        ]

    @classmethod
    def recorded(cls, document: Mapping[str, Any]) -> Self:
        """Return the file that a round has recorded, whether or not the packages it names are installed."""
        with trusting_names():
            return cls.model_validate(dict(document))

    def space(self) -> Space:
        """Return all hyperparameters: the file's in its order, then the fixed defaults."""
        tool_name = None if self.command is None else self.command.tool
        written = json.dumps([self.hyperparameters, [] if tool_name else self.plug_ins])
        return dict(_space(written, self.max_train_steps, tool_name))

    @property
    def table(self) -> Table:
        """Return all hyperparameters that the file may name: tuner's and those of plug-ins or the tool."""
        return _table(
            self.hyperparameters, self.plug_ins, None if self.command is None else self.command.tool
        )

    @property
    def unloaded(self) -> tuple[tuple[Chooser, str], ...]:
        """Return the plug-ins of the file whose descriptions are not known yet, as kind and name."""
        return () if self.command is not None else unloaded(self.hyperparameters, self.plug_ins)

    def require_model(self, wish: str) -> None:
        """Raise InputError if the round runs a command, whose model and rows tuner does not know.

        `wish` says what needs them, such as `trial generate`.
        """
        if self.command is not None:
            raise InputError(
                f"{wish}: {self.round} runs a command, and only the command knows its model and rows; use "
                "the checkpoint of the trial (see `tuner trial show`) with the tool that trained it"
            )

    @property
    def recorded_objective(self) -> Objective:
        """The objective as far as the file says it: a metric of the user's is not loaded for it.

        Its direction is that of the file, which the record of a begun round always has.
        """
        name, direction = self.objective.metric, self.objective.direction
        if is_built_in("metric", name):
            return metric(name).objective(name)
        known = Direction(direction) if direction else Direction.MINIMIZE
        return Objective(name, known, is_relative_to_gained=known == Direction.MAXIMIZE)

    @property
    def is_sweep(self) -> bool:
        """Return whether the round was written by `study sweep`."""
        return self.kind == "sweep"

    @property
    def num_trials(self) -> int:
        """Return the number of trials: `search.trials`, or fewer if the search space has fewer points."""
        return int(min(self.search.trials, num_points(self.space())))

    @property
    def ends_early(self) -> str | None:
        """Return a note if the search space has fewer points than `search.trials`; else None."""
        if self.num_trials == self.search.trials:
            return None
        points = "1 point" if self.num_trials == 1 else f"{self.num_trials} points"
        return (
            f"The search space has {points}, so the round ends after {self.num_trials} of "
            f"{self.search.trials} trials."
        )

    def without_effect(self) -> Iterator[str]:
        """Yield notes on hyperparameters of the file that no trial has, and that are not refused for it.

        Files of earlier versions have a `decay_steps` beside any schedule.
        """
        space, table = self.space(), self.table
        for name in self.hyperparameters:
            if name in IGNORED_WHERE_INACTIVE and name not in space:
                chooser = condition_of(table[name]).chosen_by
                yield (
                    f"hyperparameters.{name} has no effect: it {counts_with(table[name])}, but "
                    f"{described_choice(chooser, space, table)}; remove it"
                )

    def doubtful_values(self) -> Iterator[str]:
        """Yield notes on a list of two numbers far apart, and on two numbers in one text, as of a range."""
        for name, dimension in self.space().items():
            if isinstance(dimension, Choices) and (between := as_range(dimension)):
                two = " and ".join(f"{value:g}" for value in dimension.values if isinstance(value, float))
                yield (
                    f"hyperparameters.{name} is a list: only {two} are tried. To search between them, write "
                    f"{one_line(between)}"
                )
            text = dimension.value if isinstance(dimension, Fixed) else None
            if isinstance(text, str) and (how := as_numbers(text)) is not None:
                yield f"hyperparameters.{name} is the text {shown(text)}; {how}"

    @property
    def trains_alone(self) -> str | None:
        """Return why workers have only one slot whatever `run.slots` is; None if trials can share a
        worker."""
        if self.command is not None:
            return None
        alone = [each.title for each in possible_variants(self.space()) if not each.packs]
        return f"{alone[0]} trains one trial at a time: a worker has one slot" if alone else None

    def absolute(self, directory: Path) -> RoundSpec:
        """The same round with every path made absolute from the round file's directory.

        Ids on the Hub and URLs of servers stay as they are. Doing it twice changes nothing.
        """

        def sources(of: list[SourceSpec]) -> list[SourceSpec]:
            return [each.model_copy(update={"path": path_of(each)}) for each in of]

        def path_of(source: SourceSpec) -> str:
            return absolute_source(source.path, directory, is_plain_text=source.split_on is not None)

        data, checkpoints, answers = self.data, self.checkpoints, self.evaluation.answers
        command = self.command
        if command is not None:
            config = None if command.config is None else absolute_path(command.config, directory)
            return self.model_copy(
                update={
                    "command": command.model_copy(update={"config": config}),
                    "checkpoints": checkpoints.model_copy(
                        update={"directory": absolute_path(checkpoints.directory, directory)}
                    ),
                    "storage": absolute_storage(self.storage, directory),
                }
            )
        if answers is not None:
            answers = answers.model_copy(update={"metric": absolute_metric(answers.metric, directory)})
        return self.model_copy(
            update={
                "model": self.model.model_copy(update={"path": absolute_model(self.model.path, directory)}),
                "data": data.model_copy(
                    update={name: sources(getattr(data, name)) for name in ("train", "eval", "test")}
                ),
                "evaluation": self.evaluation.model_copy(update={"answers": answers}),
                "checkpoints": checkpoints.model_copy(
                    update={"directory": absolute_path(checkpoints.directory, directory)}
                ),
                "storage": absolute_storage(self.storage, directory),
            }
        )
