"""`study import`: finished runs become a round, so that best steps, verdict and suggestion are there."""

from __future__ import annotations

import math
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tuner.commands.check import workload
from tuner.commands.finished import FinishedRun
from tuner.commands.kept import Keeper, can_resume
from tuner.commands.launch import MISSING_COMMAND
from tuner.commands.reported import not_finite
from tuner.config import RoundFile, read_round
from tuner.config.sections import refuse_bad_name
from tuner.config.yaml_text import one_line
from tuner.errors import CheckpointError, InputError, refusal, shown
from tuner.methods.kinds import Anything, Integer, Kind, Method, Number
from tuner.methods.registry import BUILT_IN
from tuner.methods.schedules import DECAY_STEPS, known_schedule, schedule
from tuner.methods.table import HYPERPARAMETERS
from tuner.methods.tools import tool
from tuner.playbook import best_evaluation
from tuner.playbook.schedule import multiplier, trunk_end
from tuner.records import (
    LOSS,
    AttemptStarted,
    Checkpoint,
    CheckpointKind,
    Direction,
    Ended,
    Evaluated,
    Evaluation,
    Fact,
    Fixed,
    Objective,
    RoundBegun,
    RoundRecord,
    Saved,
    Trial,
    TrialAsked,
    TrialEnded,
    TrialState,
    Value,
    to_json,
)
from tuner.report.format import count
from tuner.store import exists, hold_study, open_store
from tuner.store.database import database_file, parse_url
from tuner.study.disk import taken_back
from tuner.study.plan import RoundPlan
from tuner.whole import forget_unpublished, lead, published, written_whole


@dataclass(frozen=True)
class Said:
    """What the files do not say and the user does."""

    round: str = "imported"
    metric: str = "eval_loss"
    direction: str | None = None
    max_train_steps: int | None = None
    command: str | None = None
    tool: str = "none"
    config: Path | None = None
    values: Mapping[str, Value] | None = None
    """Hyperparameters of all runs, such as `schedule` and `warmup_steps`."""


@dataclass(frozen=True)
class Imported:
    """A round of finished runs."""

    file: Path
    runs: tuple[str, ...]
    """Names of the runs by the number of their trial."""
    remarks: tuple[str, ...]
    unknown: tuple[str, ...]
    """What neither the runs nor the user said."""


def import_runs(
    directory: Path, runs: Sequence[FinishedRun], said: Said, *, clock: Callable[[], float]
) -> Imported:
    """Write the round's file and record its facts. The runs' own folders are only read.

    Raises InputError if there is such a round, or too little is known; nothing is changed then.
    """
    refuse_bad_name(said.round, asked="--round")
    horizon = said.max_train_steps or _horizon(runs)
    taken = [run for run in runs if _steps(run) == horizon and run.last_step <= horizon]
    remarks = [*_left_out(runs, taken, horizon)]
    if not taken:
        raise InputError(f"no run trains for {horizon} steps; {'; '.join(remarks)}")
    renamed = [_by_tuners_names(run, said, horizon) for run in taken]
    remarks += [remark for _, remark in renamed if remark is not None]
    remarks += _decay_remark(taken, said)
    remarks += _rate_remark([run for run, _ in renamed], said)
    taken = [run for run, _ in renamed]
    path = directory / f"{said.round}.yaml"
    _refuse_existing(path)
    file = read_round(_text(directory, taken, said, horizon), path)
    plan = RoundPlan(file)
    _refuse_existing(plan.checkpoints)
    with _held(plan), taken_back(plan.checkpoints), ExitStack() as undo:
        storage = plan.absolute.storage
        if not exists(storage):
            database = database_file(parse_url(storage))
            for suffix in ("", "-wal", "-shm"):
                undo.callback(Path(f"{database}{suffix}").unlink, missing_ok=True)
        undo.callback(shutil.rmtree, plan.checkpoints, ignore_errors=True)
        undo.callback(path.unlink, missing_ok=True)
        facts, notes = _written(plan, taken, horizon, clock)
        remarks += notes
        with closing(open_store(storage, study=plan.spec.study)) as store:
            store.record(*facts)
        undo.pop_all()
    return Imported(path, tuple(run.name for run in taken), tuple(remarks), tuple(unknown_of(file)))


def _refuse_existing(place: Path) -> None:
    if place.exists():
        raise InputError(f"{place}: exists; name another round with --round")


def _refuse_recorded(plan: RoundPlan) -> None:
    """Raise InputError for a round with facts: those of the new runs would not count."""
    storage, study = plan.absolute.storage, plan.spec.study
    if not exists(storage):
        return
    with closing(open_store(storage, study=study)) as store:
        if store.round(plan.name) is not None:
            raise InputError(
                f"{plan.name}: the study's database has a round of this name, though its file is gone; name "
                "another round with --round"
            )


@contextmanager
def _held(plan: RoundPlan) -> Iterator[None]:
    """Hold the study, without what an import that was killed has left; delete its folder if it stays empty.

    Another import may have ended since there was no such round, so that this is asked again.
    """
    directory = plan.file.directory
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{directory}: the runs cannot be copied there: {error}") from error
        with hold_study(directory, plan.absolute.storage, plan.spec.study):
            _refuse_existing(plan.file.path)
            _refuse_existing(plan.checkpoints)
            _refuse_recorded(plan)
            forget_unpublished(plan.checkpoints)
            yield
    finally:
        for place in missing:
            with suppress(OSError):  # it is not empty
                place.rmdir()


def _written(
    plan: RoundPlan, runs: Sequence[FinishedRun], horizon: int, clock: Callable[[], float]
) -> tuple[list[Fact], list[str]]:
    """Copy the checkpoints, and write the round file; return the facts, and what to say of the runs."""
    facts: list[Fact] = [_begun(plan, clock())]
    notes: list[str] = []

    def copy(folder: Path) -> None:
        for number, run in enumerate(runs):
            own, said = _trial(plan, folder, run, number, horizon, clock())
            facts.extend(own)
            notes.extend(said)

    try:
        published(plan.checkpoints, copy)
        with written_whole(plan.file.path) as place:
            place.write_text(plan.file.text, encoding="utf-8")
    except (OSError, CheckpointError) as error:
        raise InputError(f"{plan.file.directory}: the runs cannot be copied there: {error}") from error
    return facts, notes


def _steps(run: FinishedRun) -> int:
    """Return a run's horizon: what it was to train for, or its last evaluation."""
    return run.max_train_steps or run.last_step


def _horizon(runs: Sequence[FinishedRun]) -> int:
    """Return the horizon of most runs; of several the longest."""
    counted = Counter(_steps(run) for run in runs)
    return max(counted, key=lambda steps: (counted[steps], steps))


def _left_out(runs: Sequence[FinishedRun], taken: Sequence[FinishedRun], horizon: int) -> Iterator[str]:
    for run in runs:
        if run not in taken:
            yield (
                f"{run.name} is left out: it trains for {_steps(run)} steps, and the trials of a round all "
                f"for {horizon}; import it as another round with --max-train-steps {_steps(run)} --round NAME"
            )


_TRAINERS_NAMES = {
    "seed": "training_seed",
    "optim": "optimizer",
    "lr": "learning_rate",
}
"""A Trainer's names that tuner has another one for."""
_TRAINERS_SCHEDULES = {
    theirs: name for name in BUILT_IN["schedule"] for theirs in schedule(name).trainer_names
}
"""Its `lr_scheduler_type` and tuner's schedules; others stay unknown."""


def _by_tuners_names(run: FinishedRun, said: Said, horizon: int) -> tuple[FinishedRun, str | None]:
    """Return a run with a Trainer's schedule by tuner's names, and what is to be said of it.

    A Trainer's `linear` decays from the warmup on. The learning rate is the peak, by the rates that were
    logged and the schedule, where both are known.

    Raises InputError for a `linear` whose warmup nobody gave, since where it decays depends on it, and for a
    value that no hyperparameter can have.
    """
    given = {**run.hyperparameters, **(said.values or {})}
    known = {_TRAINERS_NAMES.get(name, name): _usable(run, name, value) for name, value in given.items()}
    values = {name: value for name, value in known.items() if name not in _OF_TRAINERS_SCHEDULE}
    kind = known.get("lr_scheduler_type")
    if "schedule" not in values and kind in _TRAINERS_SCHEDULES:
        values["schedule"] = _TRAINERS_SCHEDULES[str(kind)]
    values |= _warmup(known, horizon)
    if "num_decay_steps" in known:
        values.setdefault("decay_steps", known["num_decay_steps"])
    decays = DECAY_STEPS in known_schedule(str(values.get("schedule"))).hyperparameters
    if decays and DECAY_STEPS.name not in values:
        warmup = values.get("warmup_steps")
        if not isinstance(warmup, int):
            raise InputError(
                f"{run.name}: a Trainer's linear schedule decays from the end of the warmup on, which is not "
                "known: add --set warmup_steps=N, or --set decay_steps=N for another decay"
            )
        if warmup > horizon:
            raise InputError(
                f"{run.name}: warmup_steps: {warmup} is above the {horizon} steps that it trains for"
            )
        values[DECAY_STEPS.name] = horizon - warmup
    remark = None
    if (
        run.rates
        and "learning_rate" not in (said.values or {})
        and {"schedule", "warmup_steps"} <= set(values)
    ):
        peak = _peak(run.rates, values, horizon)
        values |= {} if peak is None else {"learning_rate": peak}
        if peak is None:
            remark = (
                f"{run.name}: its logged learning rates do not follow {values['schedule']} with a warmup of "
                f"{values['warmup_steps']} steps; its learning_rate is the highest of them"
            )
    return replace(run, hyperparameters=values), remark


def _usable(run: FinishedRun, name: str, value: Any) -> Value:
    """Return a value as hyperparameters have it. Raises InputError for what none of them can have."""
    row = HYPERPARAMETERS.get(_TRAINERS_NAMES.get(name, name))
    if isinstance(value, (list, tuple)) and row is not None and isinstance(row.kind, _OF_ONE_VALUE):
        raise InputError(f"{run.name}: {name}: {refusal(row.kind.allowed, value)}")
    parts = value if isinstance(value, (list, tuple)) else (value,)
    if any(isinstance(part, (dict, list, tuple)) for part in parts):
        raise InputError(f"{run.name}: {name}: expects a value or a list of values, got {shown(value)}")
    if name in _STEPS and value is not None:
        is_share = name == "warmup_steps" and isinstance(value, float) and 0 < value < 1
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_share and not (is_number and value == int(value)):
            raise InputError(f"{run.name}: {name}: expects a whole number of steps, got {shown(value)}")
    return tuple(value) if isinstance(value, list) else value


_OF_ONE_VALUE = (Number, Integer, Method)
_STEPS = ("warmup_steps", "decay_steps", "num_decay_steps")


def _decay_remark(runs: Sequence[FinishedRun], said: Said) -> Iterator[str]:
    """Yield what is assumed of a Trainer's `warmup_stable_decay`, whose files do not say how it decays."""
    given = said.values or {}
    kinds = [given.get("lr_scheduler_type", run.hyperparameters.get("lr_scheduler_type")) for run in runs]
    if "warmup_stable_decay" in kinds and "schedule" not in given:
        yield (
            "warmup_stable_decay is read with a linear decay, but a Trainer's own default is a cosine: "
            "unless the runs had decay_type: linear, leave lr_scheduler_type out: the schedule stays unknown"
        )


def _rate_remark(runs: Sequence[FinishedRun], said: Said) -> Iterator[str]:
    """Yield that the rates are those that were logged, without a schedule or two that are the highest."""
    logged = [sorted(run.rates.values()) for run in runs if len(run.rates) > 1]
    is_stable = all(rates[-1] == rates[-2] for rates in logged)
    is_known = all({"schedule", "warmup_steps"} <= set(run.hyperparameters) for run in runs)
    if not is_stable and not is_known and "learning_rate" not in (said.values or {}):
        yield (
            "learning_rate is the highest rate that a run logged, and its peak may be higher: pass --set "
            "hyperparameters.lr_scheduler_type=linear (or another) and --set hyperparameters.warmup_steps=N"
        )


def _peak(rates: Mapping[int, float], values: Mapping[str, Value], horizon: int) -> float | None:
    """Return the peak that all logged rates agree on; None if they do not follow the schedule.

    Trainers log the rate of the last update, and older ones that of the next.
    """
    for ahead in (1, 0):
        shares = {step: multiplier(step - ahead, values, horizon) for step in rates if step <= horizon}
        peaks = [rates[step] / share for step, share in shares.items() if share > _TELLING]
        if peaks and max(peaks) - min(peaks) <= _ROUNDING * max(peaks):
            return float(f"{max(peaks):.10g}")
    return None


_TELLING = 0.01
"""A share of the peak below this says little about it."""
_ROUNDING = 1e-6


_OF_TRAINERS_SCHEDULE = (
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "num_decay_steps", "num_stable_steps",
)  # fmt: skip


def _warmup(known: Mapping[str, Value], horizon: int) -> dict[str, Value]:
    """Return the warmup in steps; a Trainer may have it as a share of the run."""
    share = known.get("warmup_ratio")
    steps = known.get("warmup_steps", 0 if share else None)
    if isinstance(steps, float) and 0 < steps < 1:
        share, steps = steps, 0
    if not steps and isinstance(share, (int, float)) and share:
        return {"warmup_steps": math.ceil(share * horizon)}
    return {} if steps is None else {"warmup_steps": int(float(str(steps)))}


def _text(directory: Path, runs: Sequence[FinishedRun], said: Said, horizon: int) -> str:
    """Return the round file: what differs between the runs is searched, what is equal is fixed."""
    names = dict.fromkeys(name for run in runs for name in run.hyperparameters)
    known = [name for name in names if all(name in run.hyperparameters for run in runs)]
    table = tool(said.tool).table(dict.fromkeys(known))
    kinds = {name: table[name].kind if name in table else None for name in known}
    written = {name: _dimension([run.hyperparameters[name] for run in runs], kinds[name]) for name in known}
    every = _interval(runs)
    command: dict[str, Any] = {
        "run": shlex.split(said.command) if said.command else [MISSING_COMMAND, "${args}"]
    }
    if said.tool != "none":
        command["tool"] = said.tool
    if said.config is not None:
        command["config"] = str(said.config)
    objective = {"metric": said.metric} | ({"direction": said.direction} if said.direction else {})
    study = directory.resolve().name
    lines = [
        f"study: {one_line(study)}",
        f"round: {one_line(said.round)}",
        f"goal: {one_line('Imported from ' + count(len(runs), 'finished run'))}",
        "command:",
        *(f"  {name}: {one_line(value)}" for name, value in command.items()),
        f"max_train_steps: {horizon}",
        "hyperparameters:",
        *(f"  {name}: {one_line(value)}" for name, value in written.items()),
        f"search: {{trials: {len(runs)}}}",
        f"evaluation: {{every_steps: {every}}}",
        f"objective: {one_line(objective)}",
        "run: {decay_branches: false}",
    ]
    if not written:
        lines[lines.index("hyperparameters:")] = "hyperparameters: {}"
    return "\n".join(lines) + "\n"


def _dimension(values: Sequence[Value], kind: Kind | None) -> Any:
    """Return a scalar, a range of three or more real numbers, or a list."""
    different = sorted(set(values), key=lambda value: (str(type(value)), value))
    if len(different) == 1:
        is_list_of_choices = isinstance(different[0], tuple) and isinstance(kind, Anything)
        return [to_json(different[0])] if is_list_of_choices else to_json(different[0])
    numbers = [value for value in different if isinstance(value, float)]
    if len(numbers) == len(different) >= 3:
        low, high = numbers[0], numbers[-1]
        return {"low": low, "high": high} | ({"log": True} if low > 0 and high / low >= 10 else {})
    return [to_json(value) for value in different]


def _interval(runs: Sequence[FinishedRun]) -> int:
    """Return the most frequent number of steps between two evaluations."""
    steps = [[evaluation.step for evaluation in run.evaluations] for run in runs]
    gaps = Counter(b - a for each in steps for a, b in pairwise(each))
    return max(gaps, key=lambda gap: (gaps[gap], gap)) if gaps else max(1, steps[0][-1])


def _begun(plan: RoundPlan, at: float) -> RoundBegun:
    spec = plan.spec
    document = spec.model_dump(mode="json")
    document["objective"]["direction"] = spec.recorded_objective.direction.value
    known = spec.command is not None and spec.command.run[0] != MISSING_COMMAND
    fingerprint = workload(plan.absolute, plan.file.directory) if known else "imported"
    record = RoundRecord(plan.name, spec.max_train_steps, document, at, workload=fingerprint, kind=plan.kind)
    return RoundBegun(record)


def _trial(
    plan: RoundPlan, folder: Path, run: FinishedRun, number: int, horizon: int, at: float
) -> tuple[list[Fact], list[str]]:
    """Return the facts of a run as a trial, and what is to be said of it. Copies its checkpoints into the
    round's folder.

    tuner has run none of its steps: its attempt, which checkpoints need, is empty.
    """
    values = _values(plan, run)
    state, reason = _ended(run, horizon)
    name = (plan.name, number)
    facts: list[Fact] = [
        TrialAsked(Trial(plan.name, number, values)),
        AttemptStarted(*name, 1, run.last_step, at),
        *(Evaluated(*name, 1, evaluation) for evaluation in run.evaluations),
    ]
    kept, notes = _kept(plan, folder, run, number, values)
    facts += [Saved(*name, 1, checkpoint) for checkpoint in kept]
    facts.append(Ended(*name, 1, run.last_step, "stopped", None, at))
    facts.append(TrialEnded(*name, state, reason, at))
    said = [f"trial {number} ({run.name}): {reason}"] if reason else []
    return facts, [*said, *notes]


def _values(plan: RoundPlan, run: FinishedRun) -> dict[str, Value]:
    """Return the trial's hyperparameters: what the file fixes, and its own values of what is searched."""
    values: dict[str, Value] = {}
    for name, dimension in plan.space.items():
        values[name] = dimension.value if isinstance(dimension, Fixed) else run.hyperparameters[name]
    return values


def _ended(run: FinishedRun, horizon: int) -> tuple[TrialState, str | None]:
    wrong = next((why for evaluation in run.evaluations if (why := not_finite(evaluation))), None)
    if wrong is not None:
        return TrialState.INFEASIBLE, wrong
    if run.last_step < horizon:
        return TrialState.PRUNED, f"ended at step {run.last_step} of {horizon} (early stopping?)"
    return TrialState.COMPLETE, None


def _kept(
    plan: RoundPlan, folder: Path, run: FinishedRun, number: int, values: Mapping[str, Value]
) -> tuple[list[Checkpoint], list[str]]:
    """Copy the best checkpoint and, if the schedule is known, the stable one."""
    keeper = Keeper(folder / f"trial-{number:04d}", 1)
    best, kept, notes = best_evaluation(run.evaluations), [], []
    best_folder: tuple[int, Path] | None = None
    if best is not None and best.step in run.checkpoints:
        checkpoint = keeper.keep_best(run.checkpoints[best.step], best.step)
        best_folder = best.step, folder / checkpoint.path
        lead(keeper.trial / "best", best_folder[1])
        kept.append(checkpoint)
    elif best is not None:
        notes.append(f"trial {number} ({run.name}) has no checkpoint of its best step {best.step}")
    end = trunk_end(values, plan.spec.max_train_steps)
    if end is None or not end:
        return kept, notes
    stable = [step for step in run.checkpoints if step <= end and can_resume(run.checkpoints[step])]
    if not stable:
        notes.append(f"trial {number} ({run.name}) has no checkpoint of its stable phase (up to step {end})")
        return kept, notes
    step = max(stable)
    before: list[Evaluation] = [e for e in run.evaluations if e.step <= step]
    known_best = best_folder if best_folder is not None and best_folder[0] <= step else None
    kept.append(
        keeper.keep_resumable(
            run.checkpoints[step], step, kind=CheckpointKind.TRUNK, evaluations=before, best=known_best
        )
    )
    return kept, notes


def objective_said(said: Said) -> Objective:
    """Return the objective that the runs are read by. Raises InputError if its direction is not known."""
    if said.metric == LOSS.metric:
        return LOSS
    if said.direction not in ("minimize", "maximize"):
        raise InputError(f"--metric {said.metric}: add --direction minimize or maximize")
    direction = Direction(said.direction)
    return Objective(said.metric, direction, is_relative_to_gained=direction == Direction.MAXIMIZE)


def unknown_of(file: RoundFile) -> list[str]:
    """Return what the runs did not tell and nobody gave."""
    command = file.spec.command
    has_command = command is not None and command.run[0] != MISSING_COMMAND
    names = [
        name
        for name in ("schedule", "warmup_steps", "training_seed")
        if name not in file.spec.hyperparameters
    ]
    return [*([] if has_command else ["command"]), *names]
