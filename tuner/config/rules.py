"""Checks across the sections of a round file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tuner.config.dimensions import describe, largest, value_to_yaml
from tuner.config.sections import (
    IGNORED_WHERE_INACTIVE,
    TRIAL_PATH,
    EvaluationSpec,
    ObjectiveSpec,
    RunSpec,
    SearchSpec,
    counts_with,
    described_choice,
    table_in_use,
    written_at,
)
from tuner.config.wording import Refusal, meant_method
from tuner.errors import refusal, shown
from tuner.methods.kinds import ALL_LINEAR
from tuner.methods.metrics import metric
from tuner.methods.registry import expected, is_built_in, is_known
from tuner.methods.variants.initialisations import INITIALISATIONS
from tuner.records import (
    Choices,
    Dimension,
    Direction,
    Fixed,
    Range,
    Space,
    TimesSqrtRank,
    Value,
    active,
    num_points,
    searched,
)

_HORIZON = "max_train_steps"
MAX_EVALUATIONS = 100_000
"""Of a trial: they are kept, in memory too, and each is a row of the database."""


def horizon_refusals(
    max_train_steps: int, *, evaluation: EvaluationSpec, run: RunSpec, space: Space, written: Collection[str]
) -> Iterator[Refusal]:
    """Yield what does not fit into the horizon. `written` are the hyperparameters that the file names."""
    if evaluation.every_steps > max_train_steps:
        yield Refusal(
            ("evaluation", "every_steps"),
            f"{evaluation.every_steps} is above max_train_steps ({max_train_steps}): only the first and "
            "the last step would be evaluated",
            rests_on=(_HORIZON,),
        )
    if max_train_steps > MAX_EVALUATIONS * evaluation.every_steps:
        yield Refusal(
            ("evaluation", "every_steps"),
            f"{evaluation.every_steps} of {max_train_steps} steps is more than {MAX_EVALUATIONS:,} "
            "evaluations of a trial; raise it, or lower max_train_steps",
            rests_on=(_HORIZON,),
        )
    if run.production_steps is not None and run.production_steps < max_train_steps:
        yield Refusal(
            ("run", "production_steps"),
            f"{run.production_steps} is below max_train_steps ({max_train_steps}), but it is the longest run "
            "you can afford; raise it, or lower max_train_steps",
            rests_on=(_HORIZON,),
        )
    yield from _schedule_refusals(max_train_steps, space, written)


def objective_refusals(
    objective: ObjectiveSpec, *, evaluation: EvaluationSpec, run: RunSpec
) -> Iterator[Refusal]:
    """Yield what conflicts with the objective."""
    if not is_known("metric", objective.metric):
        wrong = refusal(expected("metric"), objective.metric, meant_method("metric", objective.metric))
        yield Refusal(("objective", "metric"), wrong)
        return
    yield from direction_refusals(objective)
    if objective.metric != "answers":
        if evaluation.answers is not None and evaluation.answers.objective:
            message = f"is true, but objective.metric is {objective.metric}; remove one of the two"
            yield Refusal(("evaluation", "answers", "objective"), message, rests_on=("objective.metric",))
        return
    key = "objective.metric"
    if evaluation.answers is None:
        message = (
            "answers requires evaluation.answers; add `answers: {metric: exact_match}` under evaluation, or "
            "use another metric"
        )
        yield Refusal(("objective", "metric"), message, rests_on=("evaluation.answers",))
        return
    if not evaluation.answers.objective:
        message = "is false, but objective.metric is answers; remove one of the two"
        yield Refusal(("evaluation", "answers", "objective"), message, rests_on=(key,))
    if run.pruner != "none":
        message = (
            f"{run.pruner} compares losses during training, but {key} is answers, which are scored only at "
            "the end; use pruner: none"
        )
        yield Refusal(("run", "pruner"), message, rests_on=(key,))
    if run.engine == "simulated":
        message = (
            "a dry run trains no model, so there are no answers to score; use "
            "`objective: {metric: eval_loss}` for the dry run, which ranks by the synthetic losses"
        )
        yield Refusal(("evaluation", "answers", "objective"), message, rests_on=("run.engine",))


def adapter_refusals(space: Space) -> Iterator[Refusal]:
    """Yield combinations that PEFT does not support."""
    even = [
        name for name, each in INITIALISATIONS.items() if each.even_rank and space["lora_init"].contains(name)
    ]
    if even and (odd := _odd_rank(space["lora_r"])) is not None:
        message = (
            f"{even[0]} requires even ranks, but lora_r can be {odd}; list the ranks, such as [8, 16, 32]"
        )
        yield Refusal(("hyperparameters", "lora_init"), message, rests_on=("hyperparameters.lora_r",))
    layers = [value for value in _values(space.get("layers_to_transform")) if isinstance(value, tuple)]
    targets = _values(space["target_modules"])
    regex = next((value for value in targets if isinstance(value, str) and value != ALL_LINEAR), None)
    if layers and regex is not None:
        message = (
            f"applies only to {ALL_LINEAR} or layer names, but target_modules can be the regular expression "
            f"{shown(regex)}; name the layers in the expression instead, such as '.*layers\\.(0|1)\\..*'"
        )
        where = ("hyperparameters", "layers_to_transform")
        yield Refusal(where, message, rests_on=("hyperparameters.target_modules",))


def _odd_rank(ranks: Dimension) -> int | None:
    if isinstance(ranks, Range):
        low = int(ranks.low)
        return low if low % 2 else low + 1
    return next((int(rank) for rank in _values(ranks) if isinstance(rank, int) and rank % 2), None)


def _values(dimension: Dimension | None) -> tuple[Value, ...]:
    match dimension:
        case Fixed(value=value):
            return (value,)
        case Choices(values=values):
            return values
        case _:
            return ()


def direction_refusals(objective: ObjectiveSpec) -> Iterator[Refusal]:
    """Yield a direction that contradicts the metric. A user's metric is checked when it is loaded."""
    if objective.direction is None or not is_built_in("metric", objective.metric):
        return
    own = metric(objective.metric).direction
    if objective.direction != own:
        message = (
            f"is {objective.direction}, but {'higher' if own == Direction.MAXIMIZE else 'lower'} values of "
            f"{objective.metric} are better; write {own}, or remove this line"
        )
        yield Refusal(("objective", "direction"), message, rests_on=("objective.metric",))


def _schedule_refusals(max_train_steps: int, space: Space, written: Collection[str]) -> Iterator[Refusal]:
    """Yield warmup and decay that do not fit into the horizon at their largest values."""
    lengths = [name for name, row in table_in_use().items() if row.in_decay == "length" and name in space]
    warmup = largest(space["warmup_steps"]) if "warmup_steps" in space else 0
    decay = sum(largest(space[name]) for name in lengths)
    parts = [name for name in (*lengths, "warmup_steps") if name in written]
    rests_on = (
        _HORIZON,
        *(f"hyperparameters.{name}" for name in (*lengths, "warmup_steps", "schedule")),
    )
    if warmup > max_train_steps:
        message = (
            f"{warmup} is above max_train_steps ({max_train_steps}): the rate would never reach its peak"
        )
        yield Refusal(("hyperparameters", "warmup_steps"), message, rests_on=(_HORIZON,))
    elif decay and warmup + decay > max_train_steps:
        message = (
            f"warmup_steps ({warmup}) + {' + '.join(lengths)} ({decay}) = {warmup + decay} is above "
            f"max_train_steps ({max_train_steps}); shorten one of them, or use the schedule constant or "
            "cosine"
        )
        yield Refusal(("hyperparameters", (*parts, "schedule")[0]), message, rests_on=rests_on)


def search_refusals(round_name: str, *, search: SearchSpec, space: Space) -> Iterator[Refusal]:
    """Yield enqueued points outside the space or repeated, and spaces that the sampler cannot search."""
    if search.sampler_arguments and is_built_in("sampler", search.sampler):
        message = (
            f"applies only to a sampler given as package.module:Class, not to {search.sampler}; remove it"
        )
        yield Refusal(("search", "sampler_arguments"), message, rests_on=("search.sampler",))
    if search.sampler == "grid":
        for name, dimension in space.items():
            if isinstance(dimension, Range):
                message = "is a range, but the grid sampler requires lists; write a list, or use quasi-random"
                yield Refusal(("hyperparameters", *written_at(name)), message, rests_on=("search.sampler",))
    if len(search.enqueue) > search.trials:
        message = f"has {len(search.enqueue)} entries, but search.trials is {search.trials}"
        yield Refusal(("search", "enqueue"), message, rests_on=("search.trials",))
    outside = [
        Refusal(("search", "enqueue", position, name), wrong, rests_on=(f"hyperparameters.{name}",))
        for position, entry in enumerate(search.enqueue)
        for name, value in entry.items()
        if (wrong := _enqueue_mistake(name, value, round_name, space, entry))
    ]
    yield from outside or _repeats(search, space)


def _enqueue_mistake(
    name: str, raw: Any, round_name: str, space: Space, entry: Mapping[str, Any]
) -> str | None:
    if name == "continues":
        found = TRIAL_PATH.fullmatch(raw)
        own = found is not None and found[1] == round_name
        return f"{raw} is a trial of this round; only an earlier round can be continued" if own else None
    row = table_in_use()[name]
    missing = Fixed(row.default) if row.only_if_written and row.default is not None else None
    if (idle := _idle_in(entry, name, space)) is not None or (name not in space and missing is None):
        return idle
    dimension, value = space.get(name) or missing, row.kind.parse(raw)
    assert dimension is not None
    read = shown(value_to_yaml(value))
    if dimension.contains(value):
        return None
    if isinstance(dimension, TimesSqrtRank):
        return f"depends on the rank ({describe(dimension)}), so it cannot be set here; remove it"
    if isinstance(dimension, Fixed):
        both = f"hyperparameters.{name}: [{describe(dimension)}, {read}]"
        return f"{read} is not in the search space, only {describe(dimension)}; to try both, write {both}"
    return f"{read} is not in the search space; allowed: {describe(dimension)}"


def _idle_in(entry: Mapping[str, Any], name: str, space: Space) -> str | None:
    """Return why a hyperparameter does not apply to an entry; None if it does, or if it is ignored."""
    row = table_in_use()[name]
    if row.only_with is None or name in IGNORED_WHERE_INACTIVE:
        return None
    chooser, values = row.only_with
    if name not in space:
        return f"{counts_with(row)}; {described_choice(chooser, space, table_in_use())}"
    if isinstance(space.get(chooser), Fixed):
        return None
    if chooser not in entry:
        return f"{counts_with(row)}; add {chooser} to this entry"
    return (
        None
        if entry[chooser] in values
        else f"{counts_with(row)}; this entry has {chooser}: {entry[chooser]}"
    )


def _repeats(search: SearchSpec, space: Space) -> Iterator[Refusal]:
    """Yield entries that are the same point, and entries for which the space has too few points."""
    dimensions, table = searched(space), table_in_use()
    parsed = [
        {name: table[name].kind.parse(raw) for name, raw in entry.items() if name in dimensions}
        for entry in search.enqueue
    ]
    entries = [{name: p[name] for name in active(dimensions, p) if name in p} for p in parsed]
    refused: set[int] = set()
    for entry in [*entries, {}]:
        within = [position for position, other in enumerate(entries) if entry.items() <= other.items()]
        given = {name: Fixed(v, only_with=dimensions[name].only_with) for name, v in entry.items()}
        room = num_points({**dimensions, **given})
        for position in within[int(min(room, len(within))) :]:
            if position in refused:
                continue
            refused.add(position)
            yield Refusal(
                ("search", "enqueue", position),
                _repeat(entry, within[0], num_points=int(room), num_entries=len(within)),
                rests_on=tuple(f"hyperparameters.{name}" for name in dimensions),
            )


def _repeat(entry: Mapping[str, Value], first: int, *, num_points: int, num_entries: int) -> str:
    point = ", ".join(f"{name}: {shown(value_to_yaml(value))}" for name, value in entry.items())
    if num_points == 1:
        said = f" ({point})" if point else ""
        return (
            f"is the same point as search.enqueue[{first}]{said}, and each point is tried once; remove one "
            "of them, or list two values of hyperparameters.training_seed and give each entry one"
        )
    where = f" with {point}" if point else ""
    return (
        f"is one of {num_entries} entries{where}, and the search space has only {num_points} points{where}; "
        f"remove {num_entries - num_points} of them, or search more values"
    )
