"""The command section: a training command of the user's own that runs instead of tuner's trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from tuner.config.sections import (
    STRICT,
    EvaluationSpec,
    ObjectiveSpec,
    PathText,
    RunSpec,
    Text,
)
from tuner.config.wording import Refusal, meant_value, mistake
from tuner.errors import one_of, refusal
from tuner.methods.registry import BUILT_IN, is_built_in
from tuner.methods.tools import EXTRA, tool
from tuner.records import Space

TOO_QUIET_MINUTES = 60
TOOLS = BUILT_IN["tool"]


def _known_tool(name: object) -> object:
    if not isinstance(name, str) or name not in TOOLS:
        raise mistake(refusal(one_of(TOOLS), name, meant_value(name, TOOLS)))
    return name


class CommandSpec(BaseModel):
    """A command that trains one trial. It takes the place of `model` and `data`."""

    model_config = STRICT

    run: Annotated[list[Text], Field(min_length=1)]
    """The program and its arguments, as a list; there is no shell. `${args}` becomes the trial's values as
    `--name=value`, `${args_no_hyphens}` as `name=value`, `${args_json_file}` the path of a JSON file with
    them, `${config}` the path of the trial's copy of `config`, and `${output_dir}` the folder that the
    command writes to. It runs in the round file's folder."""
    tool: Annotated[str, BeforeValidator(_known_tool), WithJsonSchema({"enum": list(TOOLS)})] = "none"
    """What the command trains with: decides the names, how the schedule is written, and how trials resume.
    `trl`: a command or a script of TRL. `axolotl`: `axolotl train`. `llamafactory`: `llamafactory-cli train`.
    `transformers`: a script with Hugging Face's Trainer. `none`: a script of your own."""
    config: PathText | None = None
    """The tool's configuration, as YAML or JSON, relative to the round file. It is copied into the trial's
    folder with the trial's values."""
    resume: list[Text] = []
    """Arguments added to `run` when a trial resumes, such as `[--resume, "${resume_from}"]`; for
    `tool: none`. Without them trials of a longer round start over."""
    silence_minutes: Annotated[int, Field(ge=1)] = TOO_QUIET_MINUTES
    """A command that reports nothing and prints nothing for this long is ended and run again."""


def flattened(written: Any) -> Any:
    """Return hyperparameters with those below `extra:` as `extra.NAME`."""
    if not isinstance(written, dict) or not isinstance(written.get("extra"), dict):
        return written
    flat: dict[Any, Any] = {}
    for name, value in written.items():
        flat.update(
            {f"{EXTRA}{each}": raw for each, raw in value.items()} if name == "extra" else {name: value}
        )
    return flat


def command_refusals(
    command: CommandSpec,
    *,
    space: Space,
    evaluation: EvaluationSpec,
    objective: ObjectiveSpec,
    run: RunSpec,
) -> Iterator[Refusal]:
    """Yield what conflicts with a command."""
    if objective.direction is None and not is_built_in("metric", objective.metric):
        message = f"missing: say whether {objective.metric} is to `minimize` or to `maximize`"
        yield Refusal(("objective", "direction"), message, rests_on=("objective.metric",))
    if objective.metric == "answers" or evaluation.answers is not None:
        message = (
            "tuner scores answers only of the models that it trains itself; let the command report a metric"
        )
        key = ("objective", "metric") if objective.metric == "answers" else ("evaluation", "answers")
        yield Refusal(key, message, rests_on=("command",))
    if run.slots not in (1, "auto"):
        message = "a command trains one trial at a time; write auto, and use `--workers` for more at a time"
        yield Refusal(("run", "slots"), message, rests_on=("command",))
    chosen = tool(command.tool)
    if chosen.has_hook and command.resume:
        message = f"is for tool: none; {command.tool} resumes by itself. Remove it"
        yield Refusal(("command", "resume"), message, rests_on=("command.tool",))
    schedule = space.get("schedule")
    if command.resume and getattr(schedule, "value", None) == "unknown":
        message = (
            "requires a schedule that tuner knows: which checkpoint a longer round resumes from depends on "
            "it. Add `schedule: constant`, or `schedule: linear` with `decay_steps`, under hyperparameters; "
            "the command gets both"
        )
        yield Refusal(("command", "resume"), message, rests_on=("hyperparameters.schedule",))


def flattened_enqueue(search: Any) -> Any:
    """Return the search section with `extra:` of enqueued points flattened."""
    entries = search.get("enqueue") if isinstance(search, Mapping) else None
    if not isinstance(entries, list):
        return search
    return {**search, "enqueue": [flattened(entry) for entry in entries]}


def value_of(word: str) -> str:
    """Return the value of a command's word `--name=value`, or the word itself."""
    return word.partition("=")[2] if word.startswith("-") else word
