"""`study sweep`: which constant-rate round to run next for a first horizon, or the result of the sweep.

Everything follows from the files and facts of the study's sweep rounds, so that a sweep is resumed by
calling it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.config import DELETE, RoundFile, edit_round, read_round
from tuner.errors import InputError, RoundFileError
from tuner.methods.hyperparameters import Hyperparameter
from tuner.playbook.sweep import (
    SAMPLE_SIZE,
    ComputeBound,
    FirstHorizon,
    FitPoint,
    LongerSweep,
    SweepDecision,
    SweepTrial,
    WiderSweep,
    decide_sweep,
    default_grid,
)
from tuner.records import Choices, Dimension, Fixed, Range, Trial, TrialState, Value, possible
from tuner.store import Store
from tuner.study.folder import open_folder, opened
from tuner.study.promotion import write_round_file

_NEUTRAL: Mapping[str, Value] = {
    "schedule": "constant",
    "decay_steps": 0,
    "lora_dropout": 0.0,
    "weight_decay": 0.0,
}
_WIDENED = "bc"
"""Suffixes of the names of the first and of the second widening at a horizon."""


def next_sweep(file: RoundFile) -> RoundFile | SweepDecision:
    """Return the sweep's round to start or resume for a round file; or its result.

    Writes the round's file if it has none. Raises InputError if the file cannot be swept, or if the study has
    been swept with other data.
    """
    folder = open_folder(file.directory)
    with opened(folder) as store:
        names = [record.name for record in store.rounds() if record.is_sweep]
        if not names:
            return _written(file, first_sweep(file))
        swept = [folder.plan(name).file for name in names]
        _refuse_other_work(swept[0], file)
        latest = swept[-1]
        if not _is_complete(latest, store):
            return latest
        production_steps = _production_steps(file)
        decision = decide_sweep(
            [_sweep_trial(rate, trial) for rate, trial in _by_rate(store, names).items()],
            max_train_steps=latest.spec.max_train_steps,
            production_steps=production_steps,
            widenings=sum(name.endswith(tuple(_WIDENED)) for name in names),
        )
        if not isinstance(decision, (LongerSweep, WiderSweep)):
            return decision
        text = edit_round(latest.text, {"run.production_steps": production_steps}, {})
        return _written(latest, _following(text, latest.spec.max_train_steps, names, store, decision))


def first_sweep(file: RoundFile) -> str:
    """Return the text of the sweep's first round: fixed values stay, the rest is neutral, the rate is a grid.

    Its evaluation set is a sample of the training rows, so its loss says how well these are fitted.
    """
    spec, production_steps = file.spec, _production_steps(file)
    every = spec.evaluation.every_steps
    horizon = min(-(-spec.max_train_steps // every) * every, production_steps)
    changes: dict[str, Any] = {
        **{f"data.{name}": DELETE for name in ("eval_fraction", "test")},
        "data.eval": [
            s.model_dump(mode="json", exclude_defaults=True, exclude={"weight"}) for s in spec.data.train
        ],
        "data.allow_overlap": True,
        "objective": DELETE,
        "evaluation.answers": DELETE,
        "evaluation.every_steps": every,
        "evaluation.max_examples": SAMPLE_SIZE,
        "run.pruner": DELETE,
        "search.sampler": "quasi-random",
    }
    fixed: dict[str, Dimension] = dict(spec.space())
    for name, dimension in spec.space().items():
        value = _NEUTRAL.get(name, _fixed(spec.table[name], dimension))
        if value is not None:
            changes[f"hyperparameters.{name}"] = value
            fixed[name] = Fixed(value, only_with=dimension.only_with)
    changes |= {f"hyperparameters.{name}": DELETE for name in fixed.keys() - possible(fixed).keys()}
    comments = {
        "data.eval": "a sample of the training rows: how well are they fitted?",
        "data.allow_overlap": "on purpose: see eval",
        "evaluation.max_examples": "of the training rows",
    }
    text = edit_round(file.text, changes, comments)
    return _staged(text, f"sweep-{horizon}", horizon, [{"learning_rate": rate} for rate in default_grid()])


def with_first_horizon(file: RoundFile, answer: FirstHorizon | ComputeBound) -> RoundFile:
    """Return the round file with the horizon that a sweep found, on its evaluation grid; not yet written.

    The horizon is longer if the file's own warmup, decay or evaluations need more steps; the comment says so.
    """
    match answer:
        case FirstHorizon(max_train_steps=found, learning_rate=rate):
            why = f"study sweep: fits the training set fastest, at a constant rate of {rate:.3g}"
        case ComputeBound(max_train_steps=found):
            why = "study sweep: about 10% of run.production_steps, since training is compute-bound"
    every, old = file.spec.evaluation.every_steps, file.spec.max_train_steps
    least = min(-(-found // every) * every, _production_steps(file))
    for horizon in (least, *range(least + every, old, every), max(least, old)):
        needed = "" if horizon == least else f" ({found} steps; warmup, decay and evaluations need more)"
        text = edit_round(file.text, {"max_train_steps": horizon}, {"max_train_steps": why + needed})
        try:
            return read_round(text, file.path)
        except RoundFileError:
            continue
    raise InputError(f"{file.path}: no horizon of {found} or more steps fits the rest of the file")


def _production_steps(file: RoundFile) -> int:
    if file.spec.run.production_steps is None:
        raise InputError(
            f"{file.path.name}: run.production_steps: missing: a sweep doubles its steps up to the longest "
            "run that you can afford; add it under `run:`, or pass --epochs"
        )
    return file.spec.run.production_steps


def _refuse_other_work(first: RoundFile, file: RoundFile) -> None:
    """Refuse a sweep of another model or other training rows."""
    for what, swept, now in (
        ("model", first.spec.model, file.spec.model),
        ("data.train", first.spec.data.train, file.spec.data.train),
        ("data.max_length", first.spec.data.max_length, file.spec.data.max_length),
        ("data.loss_on", first.spec.data.loss_on, file.spec.data.loss_on),
    ):
        if swept != now:
            raise InputError(
                f"{file.path.name}: {what} is not that of {first.path.name}, with which the sweep of "
                "this study started, so its result does not apply to this file; change it back, or start "
                "another study"
            )


def _by_rate(store: Store, names: Sequence[str]) -> dict[float, Trial]:
    """Return the longest run of each rate: one that has diverged is not run again."""
    return {
        float(trial.hyperparameters["learning_rate"]): trial  # type: ignore[arg-type]
        for name in names
        for trial in store.trials(name)
        if trial.state.is_result
    }


def _sweep_trial(rate: float, trial: Trial) -> SweepTrial:
    return SweepTrial(
        rate,
        tuple(
            FitPoint(evaluation.step, evaluation.eval_loss, evaluation.token_accuracy)
            for evaluation in trial.evaluations
        ),
        is_infeasible=trial.state == TrialState.INFEASIBLE,
    )


def _following(
    text: str, horizon: int, names: Sequence[str], store: Store, decision: LongerSweep | WiderSweep
) -> str:
    """Return the next round's text: all sound trials continue, or new rates are tried at the same horizon."""
    match decision:
        case LongerSweep(max_train_steps=longer):
            found = _by_rate(store, names)
            sound = [found[rate] for rate in sorted(found) if found[rate].state == TrialState.COMPLETE]
            entries = [
                {
                    "learning_rate": trial.hyperparameters["learning_rate"],
                    "continues": trial.name,
                }
                for trial in sound
            ]
            return _staged(text, f"sweep-{longer}", longer, entries)
        case WiderSweep(learning_rates=rates):
            possible = (f"sweep-{horizon}{end}" for end in _WIDENED)
            name = next(name for name in possible if name not in names)
            return _staged(text, name, horizon, [{"learning_rate": rate} for rate in rates])


def _staged(text: str, name: str, horizon: int, entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a sweep's round file as another of its rounds."""
    rates = [entry["learning_rate"] for entry in entries]
    changes = {
        "round": name,
        "kind": "sweep",
        "max_train_steps": horizon,
        "hyperparameters.learning_rate": rates[0] if len(rates) == 1 else rates,
        "search.trials": len(entries),
        "search.enqueue": entries,
    }
    comments = {
        "round": "of a sweep: how many steps at a constant rate fit the training set?",
        "max_train_steps": "of every trial",
    }
    return edit_round(text, changes, comments)


def _written(beside: RoundFile, text: str) -> RoundFile:
    name = read_round(text, beside.path).spec.round
    path = beside.directory / f"{name}.yaml"
    write_round_file(path, text, advice="move or delete it")
    return read_round(text, path)


def _is_complete(file: RoundFile, store: Store) -> bool:
    trials = store.trials(file.spec.round)
    return (
        all(trial.state.is_final for trial in trials)
        and sum(trial.state.is_result for trial in trials) >= file.spec.num_trials
    )


def _fixed(row: Hyperparameter, dimension: Dimension) -> Value | None:
    """Return the value that fixes a searched hyperparameter: the first of a list, a range's default or low
    end.

    A fixed warmup is written too, since its default follows the horizon. None leaves the file as it is.
    """
    match dimension:
        case Choices(values=values):
            return values[0]
        case Range(low=low):
            default = row.default
            return default if default is not None and dimension.contains(default) else low
        case Fixed(value=value) if row.name == "warmup_steps":
            return value
        case _:
            return None
