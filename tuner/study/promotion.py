"""`study promote`: write the next round's file for review, and record the plan behind it.

The file is written first, the fact second: a file without a recorded plan that says what would be written
gets its plan recorded, so that an interrupted promotion is completed by promoting again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from tuner.config import DELETE, RoundFile, dimension_to_yaml, edit_round, with_plug_ins, without_secrets
from tuner.config.sections import refuse_bad_name
from tuner.config.settings import added_dimensions, with_settings
from tuner.config.yaml_text import one_line, parse
from tuner.data import TABLE_VERSION
from tuner.errors import InputError, one_of
from tuner.methods.schedules import DecayRule
from tuner.playbook import NextRound, Reading, RoundResults, plan_next_round
from tuner.playbook.promotion import EnqueuedTrial
from tuner.playbook.restarts import (
    Enough,
    LongerRound,
    Restart,
    following,
    next_horizon,
    plan_restart,
    points_left,
)
from tuner.process_log import harmless
from tuner.records import (
    LOSS,
    Objective,
    Promotion,
    PromotionPlanned,
    RoundRecord,
    TrialState,
    num_points,
    to_json,
)
from tuner.store import Store, hold_study
from tuner.study.folder import StudyFolder, opened
from tuner.study.lookup import begun_round
from tuner.study.results import (
    as_written_now,
    earlier_results,
    num_branches_left,
    num_promised,
    objective_of,
    reading_of,
)
from tuner.whole import written_whole


@dataclass(frozen=True)
class Overrides:
    """The user's decisions that replace the playbook's."""

    max_train_steps: int | None = None
    top: int | None = None
    """Number of trials to carry over; None: three, or half of the round's if that is fewer."""
    decay: DecayRule = "share"
    add: tuple[str, ...] = ()
    """What to search in addition, as `NAME=VALUES` or `NAME=LOW:HIGH[:log]`."""
    settings: tuple[str, ...] = ()
    """Values to write into the file, as `KEY=VALUE`."""
    reason: str = "set by --max-train-steps"
    """Why the horizon is not the suggested one, for the comment beside it."""

    def __post_init__(self) -> None:
        if self.decay not in get_args(DecayRule):
            raise InputError(f"decay={self.decay!r}: expects {one_of(get_args(DecayRule))}")
        for name, number in (("max_train_steps", self.max_train_steps), ("top", self.top)):
            if number is not None and (type(number) is not int or number < 1):
                raise InputError(f"{name}={number!r}: expects a whole number of at least 1")


_AS_PLANNED = Overrides()


@dataclass(frozen=True)
class PromotedRound:
    """A promotion that was written."""

    path: Path
    next_round: NextRound
    reading: Reading
    document: Mapping[str, Any]
    """The JSON document of `study promote --json`."""


def promote(
    folder: StudyFolder,
    store: Store,
    *,
    to: str,
    from_round: str | None,
    overrides: Overrides = _AS_PLANNED,
    force: bool,
    clock: Callable[[], float],
) -> PromotedRound:
    """Plan the next round, write its file and record the plan.

    Raises InputError if the file exists with other content (unless `force`) or its round has started;
    TunerError if the round suggests no horizon and none is given.
    """
    to = to.removesuffix(".yaml")
    refuse_bad_name(to, asked="--to")
    record = _source(folder, store, to, from_round)
    file = _file(folder, record.name, to)
    record = as_written_now(record, file)
    _refuse_unpayable(file, overrides.max_train_steps)
    results, reading = reading_of(store, record)
    planned = plan_next_round(
        results,
        reading,
        to=to,
        earlier=earlier_results(store, record),
        max_train_steps=overrides.max_train_steps,
        top=overrides.top,
        decay=overrides.decay,
        added=added_dimensions(overrides.add, file),
    )
    next_round = each_point_once(planned)
    next_round = replace(next_round, notes=(*next_round.notes, *_read_otherwise(results)))
    text, values = with_settings(
        round_text(file, next_round, reading, overrides),
        overrides.settings,
        folder.directory / f"{to}.yaml",
        comment="set by --set",
        refused=("max_train_steps",),
    )
    return _write(folder, store, record, next_round, reading, text, force=force, clock=clock, settings=values)


def promote_held(
    folder: StudyFolder,
    *,
    to: str,
    from_round: str | None,
    overrides: Overrides = _AS_PLANNED,
    force: bool = False,
) -> PromotedRound:
    """Promote while no other process runs or promotes a round of the study.

    Raises StorageError if one does.
    """
    if not folder.has_begun:
        with opened(folder) as store:
            folder.latest(store)
    with hold_study(folder.directory, folder.storage, folder.name), opened(folder) as store:
        return promote(
            folder, store, to=to, from_round=from_round, overrides=overrides, force=force, clock=time.time
        )


def _read_otherwise(results: RoundResults) -> Iterator[str]:
    """Return a warning if a version that read some rows otherwise has trained the round."""
    ran = [a.environment for trial in results.trials for a in trial.attempts if a.environment]
    ran = [environment for environment in ran if "tool" not in environment]  # a command reads its own rows
    if any(environment.get("rows") != str(TABLE_VERSION) for environment in ran):
        yield (
            f"a version of tuner that read some rows differently trained {results.name} (see the changelog): "
            "if it has such rows, the trials to be continued start over, and each says so when it starts"
        )


def continue_passes(
    folder: StudyFolder,
    store: Store,
    *,
    first: str,
    last: str,
    to: str,
    passes: int,
    clock: Callable[[], float],
) -> PromotedRound | str:
    """Write what comes after a complete round of a study in passes, or return why nothing does.

    Raises InputError if the file exists with other content.
    """
    record = _source(folder, store, to, last)
    results, reading = reading_of(store, record)
    before = [r for r in earlier_results(store, record) if r.workload == record.workload]
    # Only rounds since the first file belong to these passes.
    start = next((place for place, r in enumerate(before) if r.name == first), len(before))
    rounds = [*before[start:], results]
    follows = next_horizon(results, reading, earlier_results(store, record))
    longer = None if isinstance(follows, Enough) or follows <= record.max_train_steps else follows
    match following(rounds, longer=longer, passes=passes):
        case None:
            return (
                follows.reason
                if isinstance(follows, Enough)
                else "no trial is left that a longer round could continue"
            )
        case LongerRound() as step:
            planned = plan_next_round(
                results,
                reading,
                to=to,
                max_train_steps=step.max_train_steps,
                top=step.top,
                candidates=step.candidates,
                adds_trials=False,
            )
            planned = each_point_once(planned)
            text = _longer_text(_file(folder, last, to), planned)
        case Restart(number=number):
            file = _file(folder, rounds[0].name, to)
            trials = int(min(file.spec.search.trials, points_left(rounds)))
            planned = plan_restart(rounds[0], results, reading, to=to, trials=trials, number=number)
            text = _restart_text(file, planned, number)
    return _write(folder, store, record, planned, reading, text, force=False, clock=clock, passes=passes)


def each_point_once(planned: NextRound) -> NextRound:
    """Remove duplicate points, which rounding to fewer steps can make, and limit trials to the rest."""
    enqueue: list[EnqueuedTrial] = []
    for trial in planned.enqueue:
        if all(dict(trial.hyperparameters) != dict(other.hyperparameters) for other in enqueue):
            enqueue.append(trial)
    most = min(planned.trials_total, num_points(planned.space))
    return replace(planned, enqueue=tuple(enqueue), trials_total=int(most))


def _refuse_unpayable(file: RoundFile, max_train_steps: int | None) -> None:
    cap = file.spec.run.production_steps
    if max_train_steps is not None and cap is not None and max_train_steps > cap:
        raise InputError(
            f"--max-train-steps {max_train_steps} is above run.production_steps, {cap}, the longest run that "
            f"you can afford: raise it in {file.path.name}, or choose fewer steps"
        )


def _file(folder: StudyFolder, name: str, to: str) -> RoundFile:
    file = folder.file(name)
    if file is None:
        raise InputError(f"{folder.directory}: the file of {name} is missing; {to} is written from it")
    return with_plug_ins(file)


def _write(
    folder: StudyFolder,
    store: Store,
    record: RoundRecord,
    next_round: NextRound,
    reading: Reading,
    text: str,
    *,
    force: bool,
    clock: Callable[[], float],
    passes: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> PromotedRound:
    """Write the file, then record the plan behind it; `settings` were written over the plan's values."""
    to = next_round.to_round
    path = folder.directory / f"{to}.yaml"
    document = promotion_document(
        folder.name,
        path,
        next_round,
        reading,
        is_open=_is_open(record, store),
        passes=passes,
        objective=objective_of(record, store.trials(record.name)),
    )
    _state(document, settings or {})
    write_round_file(path, text, force=force, advice="--force overwrites it, or choose another --to")
    kept = recordable(text)
    plan = Promotion(record.name, to, document, kept, clock())
    if not any(
        p.to_round == to and p.file_text == kept and dict(p.plan) == document for p in store.promotions()
    ):
        store.record(PromotionPlanned(plan))
    return PromotedRound(path, next_round, reading, document)


def recordable(text: str) -> str:
    """Return a round file's text without passwords, whichever way the file quotes them."""
    storage = str(parse(text).document.get("storage", ""))
    shown = without_secrets(storage)
    return harmless(edit_round(text, {"storage": shown}, {}) if storage not in ("", shown) else text)


def _state(document: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Add what `--set` wrote to the document of a promotion."""
    for key, value in settings.items():
        name = key.removeprefix("hyperparameters.")
        if name != key and name in document["hyperparameters"]:
            document["hyperparameters"][name] |= {"to": value, "reason": "set by --set"}
        else:
            shown = without_secrets(value) if key == "storage" else one_line(value)
            document["notes"] = [*document.get("notes", []), f"{key}: set by --set to {shown}"]


def promoted_from(folder: StudyFolder, store: Store, round_name: str) -> str | None:
    """Return the latest round promoted from this one that has a file; None if there is none."""
    found = (p.to_round for p in reversed(store.promotions()) if p.from_round == round_name)
    return next((name for name in found if folder.file(name) is not None), None)


def round_text(file: RoundFile, next_round: NextRound, reading: Reading, overrides: Overrides) -> str:
    """Return the next round's file: the last one's text, with a reason on each changed line."""
    is_given = overrides.max_train_steps not in (None, reading.suggested_max_train_steps)
    comments = {
        "max_train_steps": f"{next_round.old_max_train_steps} in {next_round.from_round}"
        + (f": {overrides.reason}" if is_given else ""),
        "search.trials": _number_of_trials(file, next_round)
        + (f"; --top {overrides.top}" if overrides.top is not None else ""),
        "search.enqueue": f"the best of {next_round.from_round} run first, unchanged"
        if next_round.enqueue
        else f"none: no complete trial of {next_round.from_round} beat the base model",
    }
    return _edited(
        file, next_round, comments, by_option="set by --decay steps" if overrides.decay == "steps" else ""
    )


def _number_of_trials(file: RoundFile, next_round: NextRound) -> str:
    """Return where the trials come from, for the comment beside their number."""
    enqueued, total = len(next_round.enqueue), next_round.trials_total
    if enqueued == total:
        return "all enqueued, none new"
    is_longer = next_round.max_train_steps > next_round.old_max_train_steps
    fewer = ": fewer, longer runs" if is_longer and total < file.spec.num_trials else ""
    return f"{enqueued} enqueued, the rest new{fewer}" if enqueued else "all new"


def _longer_text(file: RoundFile, next_round: NextRound) -> str:
    old = next_round.old_max_train_steps
    comments = {
        "max_train_steps": f"{old} in {next_round.from_round}",
        "search.trials": "a third of the last round's, all carried over: a longer round adds none",
        "search.enqueue": f"the best trials of {old} steps that have not been run longer",
    }
    return _edited(file, next_round, comments)


def _restart_text(file: RoundFile, next_round: NextRound, number: int) -> str:
    search = file.spec.search
    changes = {
        "round": next_round.to_round,
        "search.trials": next_round.trials_total,
        "search.sampler": next_round.sampler,
        "search.seed": search.seed + number - 1,
        "search.enqueue": [],
    }
    comments = {
        "search.sampler": next_round.sampler_reason,
        "search.seed": f"restart {number - 1}",
        "search.enqueue": f"none: {file.spec.round} has run them",
    }
    changed = {key: value for key, value in changes.items() if key != "search.enqueue" or search.enqueue}
    return edit_round(file.text, changed, {key: said for key, said in comments.items() if key in changed})


def _edited(
    file: RoundFile, next_round: NextRound, comments: Mapping[str, str], *, by_option: str = ""
) -> str:
    """Return the file's text with the next round's values; `by_option` set the decay, if not the rule."""
    changes: dict[str, Any] = {
        "round": next_round.to_round,
        **_changed_horizon(next_round),
        "search.trials": next_round.trials_total,
        "search.sampler": next_round.sampler,
        "search.enqueue": [_entry(trial) for trial in next_round.enqueue],
    }
    said = {key: text for key, text in comments.items() if key in changes}
    said["search.sampler"] = next_round.sampler_reason
    reasons = {name: change.reason for name, change in next_round.changes.items()}
    if by_option:
        rescaled = {name for name, reason in reasons.items() if reason.startswith("rescaled")}
        reasons.update({name: f"{reasons[name]}: {by_option}" for name in rescaled})
    for name, change in next_round.changes.items():
        if change.to_dimension != change.from_dimension:
            kind = row.kind if (row := file.spec.table.get(name)) else None
            changes[f"hyperparameters.{name}"] = dimension_to_yaml(change.to_dimension, kind)
            said[f"hyperparameters.{name}"] = reasons[name]
    for name in file.spec.hyperparameters:
        if name not in next_round.space and name in file.spec.space():
            changes[f"hyperparameters.{name}"] = DELETE
    text = edit_round(file.text, changes, said)
    # Defaults that depend on the horizon would change with it, so they are written out.
    written = file.edited(text).spec
    space = written.space()
    moved = {
        f"hyperparameters.{n}": dimension_to_yaml(d) for n, d in next_round.space.items() if space[n] != d
    }
    said.update({key: reasons[key.partition(".")[2]] for key in moved})
    if written.evaluation.every_steps != next_round.evaluate_every:
        moved["evaluation.every_steps"] = next_round.evaluate_every
        said["evaluation.every_steps"] = (
            f"as in {next_round.from_round}: trials continue from steps that both evaluate"
        )
    return edit_round(file.text, {**changes, **moved}, said) if moved else text


def _changed_horizon(next_round: NextRound) -> dict[str, int]:
    is_new = next_round.max_train_steps != next_round.old_max_train_steps
    return {"max_train_steps": next_round.max_train_steps} if is_new else {}


def promotion_document(
    study: str,
    path: Path,
    next_round: NextRound,
    reading: Reading,
    *,
    is_open: bool,
    passes: int = 1,
    objective: Objective = LOSS,
) -> dict[str, Any]:
    """Return the JSON of `study promote --json`; `passes` is that of the `study auto` that promotes."""
    findings = [
        {"rule": finding.rule, "severity": str(finding.severity), "message": finding.message}
        for finding in next_round.findings
    ]
    if is_open:
        message = f"{next_round.from_round} is not complete: its remaining trials may change this plan"
        findings.insert(0, {"rule": "incomplete_round", "severity": "warning", "message": message})
    return {
        "study": study,
        "from": next_round.from_round,
        "to": next_round.to_round,
        "file": str(path),
        "max_train_steps": {"from": next_round.old_max_train_steps, "to": next_round.max_train_steps},
        "metric": objective.metric,
        "direction": objective.direction.value,
        "diagnosis": str(reading.diagnosis),
        "evidence": list(reading.evidence),
        "hyperparameters": {
            name: {
                "from": None if change.from_dimension is None else dimension_to_yaml(change.from_dimension),
                "to": dimension_to_yaml(change.to_dimension),
                "tier": str(change.tier),
                "reason": change.reason,
            }
            for name, change in next_round.changes.items()
        },
        "trials": {"enqueued": len(next_round.enqueue), "total": next_round.trials_total},
        "continues": [
            {"trial": trial.name, "from_step": trial.from_step}
            for trial in next_round.enqueue
            if trial.from_step is not None
        ],
        "findings": findings,
        "notes": list(next_round.notes),
        "passes": passes,
        "restarts": passes - 1,
    }


def _source(folder: StudyFolder, store: Store, to: str, from_round: str | None) -> RoundRecord:
    """Return the round to promote from: the named one, else the latest."""
    if store.round(to) is not None:
        raise InputError(
            f"{to} has started, so its file cannot change. Promote to another name, such as {to}b"
        )
    if from_round is None:
        return folder.latest(store)
    record = begun_round(store, from_round.removesuffix(".yaml"), asked=f"--from {from_round}")
    if record.is_sweep:
        raise InputError(
            f"--from {from_round}: a round of a sweep finds a first horizon and cannot be promoted; run the "
            "round file that it was made from, and promote that one"
        )
    return record


def _is_open(record: RoundRecord, store: Store) -> bool:
    trials = store.trials(record.name)
    return (
        sum(t.state.is_result for t in trials) < num_promised(record)
        or any(t.state == TrialState.RUNNING for t in trials)
        or num_branches_left(store, record) > 0
    )


def _entry(trial: EnqueuedTrial) -> dict[str, Any]:
    entry: dict[str, Any] = to_json(trial.hyperparameters)
    return {**entry, "continues": trial.name}


def write_round_file(path: Path, text: str, *, advice: str, force: bool = False) -> None:
    """Write the file atomically. Raises InputError, with the advice, if it exists with other content."""
    try:
        if path.exists():
            if path.read_text(encoding="utf-8", errors="replace") == text:
                return
            if not force:
                raise InputError(f"{path}: exists with other content; {advice}")
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
