"""The JSON documents that the verbs print with `--json`, always valid JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

from tuner.errors import Mistake
from tuner.methods.table import seed_of
from tuner.playbook.curves import rise_after_best
from tuner.playbook.results import scored_before
from tuner.playbook.selection import beats_the_base, best_evaluation, objective_value, ranked, settled_step
from tuner.records import LOSS, Evaluation, NodeChange, Objective, Throughput, Trial, TrialState
from tuner.report.board import Board

_SHOWN_STATES = ("waiting", "running", "complete", "pruned", "infeasible", "failed")


@dataclass(frozen=True, slots=True)
class BestTrial:
    """The best complete trial of a round, by its objective."""

    trial: int
    eval_loss: float
    """At that step."""
    step: int
    adapter: str | None
    """Path of its best adapter; None if it was removed."""
    answer_score: float | None = None
    """Mean score of its answers; None if none were scored."""
    best_value: float | None = None
    """Value of the objective, as reported to Optuna."""


@dataclass(frozen=True, slots=True)
class RoundStatus:
    """State of a round."""

    round: str
    max_train_steps: int
    state: Literal["open", "running", "complete"]
    """running: a process holds it; open: incomplete, and no process runs it."""
    counts: Mapping[str, int]
    """Trials by state, in the documents' order; waiting includes those not yet started."""
    best: BestTrial | None
    throughput: Throughput | None = None
    """Throughput of all its workers so far; None if not measured."""
    throughput_by_node: Mapping[str, Throughput] = field(default_factory=dict)
    """The same by node of a cluster."""
    branches_left: int = 0
    """Comparison runs that are due and have not ended."""
    overfitting: Mapping[int, int] = field(default_factory=dict)
    """Overfitting trials: the evaluation loss rises now, or did at the end; with their best steps."""
    seconds_left: float | None = None
    """Seconds until every trial has ended, at the pace so far; None without a pace, and at the end."""
    objective: Objective = LOSS
    """What ranks its trials."""
    running: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    """Running trials, each with where it runs: `node` and `gpu`, empty on this machine."""
    node_changes: Sequence[NodeChange] = ()
    """Nodes of a cluster that joined or were lost, by time."""
    kept: str = "adapter"
    """What is kept of a trial, in a word."""


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """Plan of a round file, as `study check` prints it."""

    trials: int
    max_train_steps: int
    epochs: float | None = None
    """Passes over the training rows in one trial; None for a command, as all that only the command knows."""
    train_rows: int | None = None
    eval_rows: int | None = None
    tokens: int | None = None
    """Training tokens of all trials and comparison runs together."""
    evaluation_share: float | None = None
    """Share of the work spent on evaluation, 0 to 1."""
    checkpoint_bytes: int | None = None
    peak_memory_bytes: int | None = None
    """Measured by `--probe`."""
    hours: float | None = None
    """Measured by `--probe`."""
    branches: int = 0
    """Maximum number of comparison runs after the last trial."""
    branch_steps: int = 0
    """Total steps of the comparison runs."""
    token_lengths: Mapping[str, int] = field(default_factory=dict)
    """Tokens of the training rows before truncation: p50, p90, p99 and max; empty if not counted."""
    metric: str = LOSS.metric
    """What ranks the trials."""
    direction: str | None = LOSS.direction.value
    """minimize or maximize; None for a custom metric, which is not loaded here."""
    unchecked: Sequence[str] = ()
    """Not checked: names that are not built in, and the hyperparameters that only they define."""


def round_status(
    round: str,
    *,
    max_train_steps: int,
    trials: Sequence[Trial],
    rising: Sequence[Trial] | None = None,
    promised: int,
    is_running: bool,
    adapters: Mapping[int, str],
    throughput: Throughput | None = None,
    throughput_by_node: Mapping[str, Throughput] | None = None,
    branches_left: int = 0,
    now: float | None = None,
    objective: Objective = LOSS,
    node_changes: Sequence[NodeChange] = (),
    kept: str = "adapter",
) -> RoundStatus:
    """Return a round's state from its trials, its `search.trials` and the comparison runs that are due.

    `rising` are the trials that may overfit, all by default. `now` is the time on the clock of the running
    attempts; None if there are none. A failed trial is replaced by a new one, so it does not count towards
    `search.trials`.
    """
    by_state = Counter(trial.state for trial in trials)
    results = sum(by_state[state] for state in TrialState if state.is_result)
    by_state[TrialState.WAITING] = max(
        by_state[TrialState.WAITING], promised - results - by_state[TrialState.RUNNING]
    )
    unfinished = by_state[TrialState.WAITING] + by_state[TrialState.RUNNING] + branches_left
    return RoundStatus(
        round=round,
        max_train_steps=max_train_steps,
        state="running" if is_running else "open" if unfinished else "complete",
        counts={state: by_state[TrialState(state)] for state in _SHOWN_STATES},
        best=_best(trials, adapters),
        throughput=throughput,
        throughput_by_node=throughput_by_node or {},
        branches_left=branches_left,
        overfitting=_overfitting(trials if rising is None else rising),
        seconds_left=_seconds_left(
            trials,
            to_come=promised - results,
            max_train_steps=max_train_steps,
            now=now if is_running else None,
        ),
        objective=objective,
        running={
            trial.number: {name: env[name] for name in ("node", "gpu") if name in env}
            for trial in trials
            if trial.state == TrialState.RUNNING and trial.attempts
            for env in [trial.attempts[-1].environment]
        }
        if is_running
        else {},
        node_changes=node_changes,
        kept=kept,
    )


def _seconds_left(
    trials: Sequence[Trial], *, to_come: int, max_train_steps: int, now: float | None
) -> float | None:
    """Estimate the pace from the steps of all attempts and the time in which at least one ran.

    `to_come` are the results that the round lacks. Leaves out attempts of a killed process: their end is not
    known.
    """
    board = Board(trials_total=to_come, max_train_steps=max_train_steps)
    board.sync([trial for trial in trials if not trial.state.is_final])
    if not board.remaining_steps:
        return None
    steps, seconds, until = 0, 0.0, -math.inf
    attempts = [a for trial in trials for a in trial.attempts if a.outcome != "interrupted"]
    for attempt in sorted(attempts, key=lambda attempt: attempt.started_at):
        ended = now if attempt.ended_at is None else attempt.ended_at
        if ended is None:
            continue
        steps += attempt.to_step - attempt.from_step
        seconds += max(0.0, ended - max(attempt.started_at, until))
        until = max(until, ended)
    return board.remaining_steps * seconds / steps if steps else None


def _overfitting(trials: Sequence[Trial]) -> dict[int, int]:
    """Return the overfitting trials, by the playbook's rule; running ones by their evaluations so far.

    Leaves out trials that have not beaten the base model: they have nothing to overfit.
    """
    sound = [t for t in trials if t.state not in (TrialState.INFEASIBLE, TrialState.FAILED)]
    rises = ((trial, rise_after_best(trial.evaluations)) for trial in sound)
    return {
        trial.number: rise.best_step
        for trial, rise in rises
        if rise is not None and rise.is_overfitting and beats_the_base(trial)
    }


def _best(trials: Sequence[Trial], adapters: Mapping[int, str]) -> BestTrial | None:
    for trial, best in ranked(trials):
        answers = trial.answer_score.mean if trial.answer_score is not None else None
        adapter, value = adapters.get(trial.number), objective_value(trial)
        return BestTrial(trial.number, best.eval_loss, best.step, adapter, answers, value)
    return None


def trial_document(
    trial: Trial, *, adapter: str | None, scored: Sequence[Trial] = (), objective: Objective = LOSS
) -> dict[str, Any]:
    """Return the document of `trial show --json`, which is also an element of `trial list --json`.

    `adapter` is the path of its best adapter; `scored` are the study's trials that were scored on
    `data.test`, in order; `objective` is the round's. An infeasible trial has its best evaluation before it
    diverged, which is not a result.
    """
    best = best_evaluation(trial.evaluations)
    return {
        "number": trial.number,
        "round": trial.round,
        "state": trial.state.value,
        "reason": trial.reason,
        "hyperparameters": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in trial.hyperparameters.items()
        },
        "seed": seed_of(trial.hyperparameters),
        "best_step": best.step if best else None,
        "best_eval_loss": best.eval_loss if best else None,
        "settled_step": settled_step(trial.evaluations),
        "metric": objective.metric,
        "direction": objective.direction.value,
        "best_value": objective_value(trial),
        "adapter": adapter,
        "answers": _answers(trial),
        "test": _test(trial, scored),
        "continues": str(trial.continues) if trial.continues else None,
        "executed_steps": trial.executed_steps,
        "executed_steps_exact": not trial.was_killed,
        "attempts": len(trial.attempts),
        "evaluations": [_evaluation(evaluation) for evaluation in trial.evaluations],
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    accuracy = evaluation.token_accuracy
    counted = {} if accuracy is None else {"token_accuracy": accuracy}
    metrics = {"eval_loss": evaluation.eval_loss, **counted, **evaluation.metrics}
    return {
        "step": evaluation.step,
        "train_loss": evaluation.train_loss,
        "eval_loss": evaluation.eval_loss,
        "learning_rate": evaluation.learning_rate,
        "token_accuracy": metrics.get("token_accuracy"),
        "metrics": metrics,
    }


def _test(trial: Trial, scored: Sequence[Trial]) -> dict[str, Any] | None:
    score = trial.final_score
    if score is None:
        return None
    return {
        "loss": score.loss,
        "standard_error": score.standard_error,
        "step": score.step,
        "examples": score.num_examples,
        "tokens": score.num_tokens,
        "scored_before": [other.name for other in scored_before(trial, scored)],
    }


def _answers(trial: Trial) -> dict[str, Any] | None:
    score = trial.answer_score
    if score is None:
        return None
    return {
        "score": score.mean,
        "standard_error": score.standard_error,
        "step": score.step,
        "metric": score.metric,
        "examples": score.num_examples,
        "is_objective": score.is_objective,
    }


def status_document(study: str, rounds: Sequence[RoundStatus]) -> dict[str, Any]:
    """Return the document of `study status --json`."""
    return _document(
        {
            "study": study,
            "rounds": [
                {
                    "round": status.round,
                    "max_train_steps": status.max_train_steps,
                    "state": status.state,
                    "trials": {state: status.counts.get(state, 0) for state in _SHOWN_STATES},
                    "metric": status.objective.metric,
                    "direction": status.objective.direction.value,
                    "best": asdict(status.best) if status.best else None,
                    "running": [
                        {"trial": trial, "node": where.get("node"), "gpu": where.get("gpu")}
                        for trial, where in status.running.items()
                    ],
                    "branches_left": status.branches_left,
                    "seconds_left": status.seconds_left,
                    "overfitting": [
                        {"trial": trial, "since_step": step} for trial, step in status.overfitting.items()
                    ],
                    "throughput": _throughput(status.throughput) if status.throughput else None,
                    "throughput_by_node": {
                        node: _throughput(part) for node, part in status.throughput_by_node.items()
                    },
                    "node_changes": [asdict(change) for change in status.node_changes],
                }
                for status in rounds
            ],
        }
    )


def _throughput(throughput: Throughput) -> dict[str, float | None]:
    return {
        "tokens_per_second": throughput.tokens_per_second,
        "trial_steps_per_second": throughput.trial_steps_per_second,
        "packing_factor": throughput.packing_factor,
        "padding_share": throughput.padding_share,
        "evaluation_share": throughput.evaluation_share,
        "peak_memory_bytes": throughput.peak_memory_bytes,
        "training_seconds": throughput.training_seconds,
        "evaluating_seconds": throughput.evaluating_seconds,
        "saving_seconds": throughput.saving_seconds,
    }


def check_document(
    mistakes: Sequence[Mistake], plan: RoundPlan | None, remarks: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the document of `study check --json`; `plan` is None if mistakes prevented it."""
    return _document(
        {
            "ok": not mistakes,
            "errors": [asdict(mistake) for mistake in mistakes],
            "plan": asdict(plan) if plan else None,
            "remarks": list(remarks),
        }
    )


def dumps(document: Any) -> str:
    """Return a document as JSON text, with null for every number that is not finite."""
    return _text(document, "\n")


def dumped(documents: Iterable[Any]) -> Iterator[str]:
    """Yield the text of `dumps` of a list of documents piece by piece, so that no more than one is held."""
    inner, has_any = "\n  ", False
    for document in documents:
        yield f"{',' if has_any else '['}{inner}{_text(document, inner)}"
        has_any = True
    yield "\n]" if has_any else "[]"


_quoted = json.JSONEncoder(ensure_ascii=False).encode


def _text(value: Any, line: str) -> str:
    """Return what `json.dumps` with an indent of 2 does, in a quarter of the time; `line` begins a line."""
    kind = value.__class__
    if kind is float:
        return repr(value) if math.isfinite(value) else "null"
    if value is None:
        return "null"
    if kind is int:
        return repr(value)
    if kind is str:
        return _quoted(value)
    inner = f"{line}  "
    if kind is dict or isinstance(value, Mapping):
        return _form(tuple(value), line) % tuple([_text(item, inner) for item in value.values()])
    if isinstance(value, (list, tuple)):
        texts = [_text(item, inner) for item in value]
        return f"[{inner}{f',{inner}'.join(texts)}{line}]" if texts else "[]"
    return _text(float(value), line) if isinstance(value, float) else _quoted(value)


@lru_cache(maxsize=256)
def _form(keys: tuple[str, ...], line: str) -> str:
    """Return the text of an object with a `%s` for each value: documents repeat the same keys."""
    inner = f"{line}  "
    texts = [f"{_quoted(key).replace('%', '%%')}: %s" for key in keys]
    return f"{{{inner}{f',{inner}'.join(texts)}{line}}}" if texts else "{}"


def _document(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """Convert a value to JSON's types; a number that is not finite becomes null."""
    match value:
        case Mapping():
            return _document(value)
        case tuple() | list():
            return [_plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value
