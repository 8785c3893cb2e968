"""The facts every room shares: frozen values that refuse what cannot be, and their JSON form.

Nothing here decides or does anything. A *step* is one optimizer update, the only clock; losses are
nats per target token; sizes are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal, TypeAlias

Value: TypeAlias = bool | int | float | str | tuple[str, ...]
"""A hyperparameter's value. `target_modules` is the one whose value may be a tuple of names."""

Hyperparameters: TypeAlias = Mapping[str, Value]
"""A point of the search space, by name. Which names a round file may hold only `spec` knows."""


# --- the search space -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fixed:
    """One value for all trials of the round."""

    value: Value

    def contains(self, value: Value) -> bool:
        """Whether a trial may have this value."""
        return value == self.value


@dataclass(frozen=True, slots=True)
class Choices:
    """A list of values to search, in the file's order."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a list of choices must not be empty")

    def contains(self, value: Value) -> bool:
        """Whether a trial may have this value."""
        return value in self.values


@dataclass(frozen=True, slots=True)
class Range:
    """An interval to search, both ends included."""

    low: float
    high: float
    log: bool = False
    """Search the logarithm; needs low > 0."""
    integer: bool = False
    """Only whole numbers."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range needs low < high, both finite; got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range needs low > 0; got {self.low}")

    def contains(self, value: Value) -> bool:
        """Whether a trial may have this value."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return self.low <= value <= self.high and (not self.integer or float(value).is_integer())


@dataclass(frozen=True, slots=True)
class TimesSqrtRank:
    """`lora_alpha: {times_sqrt_r: FACTOR}`: the value follows the trial's `lora_r`."""

    factor: float

    def contains(self, value: Value) -> bool:
        """Never: the value is derived, so nobody may choose it."""
        return False


Dimension: TypeAlias = Fixed | Choices | Range | TimesSqrtRank
Space: TypeAlias = Mapping[str, Dimension]
"""Every hyperparameter of a round by name, the fixed ones and the defaults included."""


def searched(space: Space) -> dict[str, Choices | Range]:
    """The dimensions a sampler may choose from, in the file's order."""
    return {name: d for name, d in space.items() if isinstance(d, (Choices, Range))}


def complete_hyperparameters(space: Space, chosen: Hyperparameters) -> dict[str, Value]:
    """All hyperparameters of a trial: what was chosen, what is fixed, what follows from these.

    Raises KeyError when a searched name was not chosen.
    """
    values: dict[str, Value] = {}
    for name, dimension in space.items():
        match dimension:
            case Fixed(value=value):
                values[name] = value
            case TimesSqrtRank():
                continue
            case _:
                values[name] = chosen[name]
    for name, dimension in space.items():
        if isinstance(dimension, TimesSqrtRank):
            rank = values["lora_r"]
            assert isinstance(rank, (int, float))
            values[name] = dimension.factor * math.sqrt(rank)
    return values


# --- what a trial leaves --------------------------------------------------------------------------


class TrialState(StrEnum):
    """Where a trial stands."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETE = "complete"
    PRUNED = "pruned"
    INFEASIBLE = "infeasible"
    """The hyperparameters' fault: a result, with a reason and without an objective."""
    FAILED = "failed"
    """The machine's fault, after the last attempt: not a result."""

    @property
    def is_final(self) -> bool:
        """Whether the trial will never run again."""
        return self not in (TrialState.WAITING, TrialState.RUNNING)

    @property
    def is_result(self) -> bool:
        """Whether the trial counts towards `search.trials`."""
        return self in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.INFEASIBLE)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss on the held-out examples at a step, and how training went since the one before."""

    step: int
    eval_loss: float
    """Sum of negative log-likelihoods over sum of target tokens; may be NaN or infinite."""
    train_loss: float | None = None
    """The same ratio over the training batches since the evaluation before; None at step 0."""
    learning_rate: float | None = None
    """Rate of the last update before this evaluation; None at step 0."""
    clipped_updates: int = 0
    """Updates since the evaluation before whose gradient norm was clipped."""
    example_nll: tuple[float, ...] = ()
    """Sum of negative log-likelihoods of each evaluation example; empty when not known."""
    example_tokens: tuple[int, ...] = ()
    """Target tokens of each evaluation example, in the same order."""
    correct_tokens: int | None = None
    """Those of all the target tokens than which the model finds no other likelier; None where not counted."""

    @property
    def token_accuracy(self) -> float | None:
        """Share of the target tokens that are predicted first, in [0, 1]; None where it was not counted."""
        if self.correct_tokens is None or not sum(self.example_tokens):
            return None
        return self.correct_tokens / sum(self.example_tokens)

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"an evaluation's step is at least 0; got {self.step}")
        if len(self.example_nll) != len(self.example_tokens):
            raise ValueError("an evaluation needs one token count for each example")


class CheckpointKind(StrEnum):
    """What a checkpoint is for."""

    BEST = "best"
    """The PEFT adapter directory of the best step so far."""
    LAST = "last"
    """Resumable, the newest: where the next attempt goes on."""
    TRUNK = "trunk"
    """Resumable, in the constant part of the schedule: where a longer round goes on."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An adapter saved at a step."""

    kind: CheckpointKind
    step: int
    path: str
    """Directory, relative to the round's checkpoint directory (`runs/ROUND`)."""
    size_bytes: int
    sha256: str
    """Of the directory: hash of the sorted (name, content hash) pairs."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a trial goes on from; its text form is `round1/3@36`."""

    round: str
    trial: int
    step: int

    def __str__(self) -> str:
        return f"{self.round}/{self.trial}@{self.step}"

    @classmethod
    def parse(cls, text: str) -> Continuation:
        """The inverse of `str`. Raises ValueError."""
        path, _, step = text.rpartition("@")
        round_name, _, trial = path.rpartition("/")
        if not round_name:
            raise ValueError(f"expected ROUND/TRIAL@STEP, got {text!r}")
        return cls(round_name, int(trial), int(step))


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a trial on a machine."""

    number: int
    """1, 2, ... within the trial."""
    from_step: int
    to_step: int
    """The last step known to have been run; to_step - from_step steps were executed."""
    started_at: float
    """Seconds since the epoch."""
    ended_at: float | None = None
    outcome: str | None = None
    """complete, infeasible, pruned, stopped (asked to), interrupted (the parent died), died (the worker
    did) or failed."""
    message: str | None = None


@dataclass(frozen=True, slots=True)
class FinalScore:
    """The loss of a trial's best adapter on `data.test`, by which nothing was chosen."""

    step: int
    """Of the adapter that was scored."""
    loss: float
    """As an evaluation loss: sum of negative log-likelihoods over sum of target tokens."""
    standard_error: float | None
    """Of the loss over the examples, in nats per token; None for a single one."""
    num_examples: int
    num_tokens: int
    """Target tokens of the examples."""
    rows: str
    """Fingerprint of the examples: trials with the same one were scored on the same rows."""
    scored_at: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Hyperparameters and a seed, run to the round's horizon; assembled from the facts."""

    round: str
    number: int
    hyperparameters: Hyperparameters
    state: TrialState = TrialState.WAITING
    reason: str | None = None
    """Why it is infeasible, pruned or failed; or why it started afresh although it was to go on."""
    continues: Continuation | None = None
    evaluations: tuple[Evaluation, ...] = ()
    """By step, each step once."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """Those that exist."""
    attempts: tuple[Attempt, ...] = ()
    optuna_trial: int | None = None
    """Number of its trial in the Optuna study `STUDY/ROUND`."""
    final_score: FinalScore | None = None
    """On `data.test`; None for all but the trials that somebody settled on."""

    @property
    def seed(self) -> int:
        """The seed of initialisation, data order and dropout."""
        seed = self.hyperparameters.get("training_seed", 0)
        assert isinstance(seed, (int, float))
        return int(seed)

    @property
    def executed_steps(self) -> int:
        """Steps really run, those repeated after a crash included, those inherited not."""
        return sum(attempt.to_step - attempt.from_step for attempt in self.attempts)

    def checkpoint(self, kind: CheckpointKind, step: int | None = None) -> Checkpoint | None:
        """The newest checkpoint of a kind, or the one at a step."""
        found = [c for c in self.checkpoints if c.kind == kind and step in (None, c.step)]
        return max(found, key=lambda c: c.step, default=None)


@dataclass(frozen=True, slots=True)
class Branch:
    """A decay branch: a short run from a trial's trunk to a horizon of its own, decaying all the way.

    It is no trial: it has no number, nothing of it is searched, and it leaves no adapter.
    """

    trial: int
    """Number of the trial whose trunk it leaves."""
    max_train_steps: int
    """Its own horizon."""
    from_step: int
    """Where it leaves the trunk."""
    attempts: tuple[Attempt, ...] = ()
    checkpoint: Checkpoint | None = None
    """Where the next attempt goes on; None at the trunk's own checkpoint."""
    state: Literal["open", "complete", "infeasible", "failed"] = "open"
    """As of a trial; `open` until it has ended."""
    reason: str | None = None
    evaluation: Evaluation | None = None
    """At its horizon."""

    @property
    def decay_steps(self) -> int:
        """Steps of its decay: all that it runs."""
        return self.max_train_steps - self.from_step

    @property
    def executed_steps(self) -> int:
        """Steps really run, those repeated after a crash included."""
        return sum(attempt.to_step - attempt.from_step for attempt in self.attempts)


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a worker process has done since it was ready, in sums."""

    session: str = ""
    """Names the life of one worker process; empty for a sum over several."""
    training_seconds: float = 0.0
    """Spent in training passes and updates. Those of workers side by side are added up."""
    evaluating_seconds: float = 0.0
    saving_seconds: float = 0.0
    passes: int = 0
    """Forward and backward passes of training."""
    micro_steps: int = 0
    """Trials' micro-batches in them."""
    trial_steps: int = 0
    """Optimizer updates, of all trials."""
    tokens: int = 0
    """Tokens trained on."""
    padded_tokens: int = 0
    """The same with the padding that was computed along."""
    peak_memory_bytes: int = 0
    """The most at once; of several workers, the largest."""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens trained on in a second of training; None without any."""
        return _ratio(self.tokens, self.training_seconds)

    @property
    def trial_steps_per_second(self) -> float | None:
        """Updates of all trials in a second of training; None without any."""
        return _ratio(self.trial_steps, self.training_seconds)

    @property
    def packing_factor(self) -> float | None:
        """Trials that share a training pass, on average; None without a pass."""
        return _ratio(self.micro_steps, self.passes)

    @property
    def padding_share(self) -> float | None:
        """Share of the computed tokens that is padding, in [0, 1]; None without a pass."""
        real = _ratio(self.tokens, self.padded_tokens)
        return None if real is None else 1.0 - real

    @property
    def evaluation_share(self) -> float | None:
        """Share of the measured seconds that evaluation took, in [0, 1]; None where none were."""
        measured = self.training_seconds + self.evaluating_seconds + self.saving_seconds
        return _ratio(self.evaluating_seconds, measured)


def added_up(parts: Iterable[Throughput]) -> Throughput | None:
    """What several worker processes have done together; None where there was none."""
    sessions = tuple(parts)
    if not sessions:
        return None
    return Throughput(
        training_seconds=sum(part.training_seconds for part in sessions),
        evaluating_seconds=sum(part.evaluating_seconds for part in sessions),
        saving_seconds=sum(part.saving_seconds for part in sessions),
        passes=sum(part.passes for part in sessions),
        micro_steps=sum(part.micro_steps for part in sessions),
        trial_steps=sum(part.trial_steps for part in sessions),
        tokens=sum(part.tokens for part in sessions),
        padded_tokens=sum(part.padded_tokens for part in sessions),
        peak_memory_bytes=max(part.peak_memory_bytes for part in sessions),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A round that has begun."""

    name: str
    max_train_steps: int
    spec: Mapping[str, Any]
    """The round file as it was when the round began (later with the keys that may change), as JSON."""
    begun_at: float
    """Seconds since the epoch."""
    train_rows: int = 0
    eval_rows: int = 0
    workload: str = ""
    """Fingerprint of base, data, evaluation set and length."""
    evaluation_share: float = 0.0
    """Share of a trial's work that its evaluations take, in [0, 1]."""
    throughputs: tuple[Throughput, ...] = ()
    """Of every worker process that measured its work for the round, by session."""
    branches: tuple[Branch, ...] = ()
    """Its decay branches that have begun, by trial and horizon."""

    @property
    def throughput(self) -> Throughput | None:
        """Of all of them together; None where nothing was measured."""
        return added_up(self.throughputs)


@dataclass(frozen=True, slots=True)
class Promotion:
    """A plan that `promote` recorded."""

    from_round: str
    to_round: str
    plan: Mapping[str, Any]
    """The JSON document of `study promote --json`."""
    file_text: str
    """The round file as written."""
    planned_at: float


# --- what a worker is told, and what it says ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assignment:
    """A trial, or the rest of one, for a worker to run."""

    round: str
    trial: int
    """The trial's number; a negative one names a decay branch."""
    attempt: int
    hyperparameters: Hyperparameters
    max_train_steps: int
    evaluate_every: int
    directory: str
    """Where the trial's checkpoints go: absolute, `.../runs/ROUND/trial-0007`."""
    resume_from: str | None = None
    """Absolute path of the resumable checkpoint to start from; None starts at step 0."""
    resume_sha256: str | None = None
    """What `resume_from` must hash to."""
    trunk_steps: tuple[int, ...] = ()
    """Steps at which to keep a resumable checkpoint for longer rounds."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has loaded base and data and takes assignments."""

    slots: int
    device: str
    base: Evaluation | None = None
    """The untouched base's evaluation, measured or told."""
    train_rows: int = 0
    eval_rows: int = 0
    workload: str = ""
    """Fingerprint of base, data, evaluation set and length."""
    evaluation_share: float = 0.0
    """Share of a trial's work that its evaluations take, in [0, 1]."""
    smallest_adapter: int = 0
    """Weights of the smallest adapter that a trial of the round may have; 0 where nothing is written."""
    largest_adapter: int = 0
    """Weights of the largest one."""


@dataclass(frozen=True, slots=True)
class Started:
    """A trial's attempt begins."""

    round: str
    trial: int
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class Progressed:
    """A sign of life for the live view and the step count; said at most about once a second."""

    round: str
    trial: int
    attempt: int
    step: int
    train_loss: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A trial was evaluated (or had been, in the checkpoint it resumed from)."""

    round: str
    trial: int
    attempt: int
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is on disk under its final name."""

    round: str
    trial: int
    attempt: int
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class Measured:
    """The worker's throughput since it was ready; said after evaluations and at the end."""

    throughput: Throughput


Outcome: TypeAlias = Literal["complete", "infeasible", "pruned", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Ended:
    """A trial's attempt is over and its slot free."""

    round: str
    trial: int
    attempt: int
    step: int
    outcome: Outcome
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Died:
    """A worker is gone; every trial it held goes on in a new one, or fails."""

    reason: str
    trials: tuple[int, ...] = ()
    """Those it held."""
    is_input_error: bool = False
    """Whether the round file, the model or the data is to blame, so that a new worker would not help."""


Event: TypeAlias = Ready | Started | Progressed | Evaluated | Saved | Measured | Ended | Died
_EVENTS: dict[str, type[Event]] = {
    kind.__name__.lower(): kind
    for kind in (Ready, Started, Progressed, Evaluated, Saved, Measured, Ended, Died)
}


# --- JSON -----------------------------------------------------------------------------------------


def to_json(record: Any) -> Any:
    """A record as JSON values. Floats keep every digit; NaN and infinity stay as they are."""
    return _plain(asdict(record))


def evaluation_from_json(document: Mapping[str, Any]) -> Evaluation:
    """The inverse of `to_json` for an Evaluation."""
    return Evaluation(
        **{
            **document,
            "example_nll": tuple(document.get("example_nll", ())),
            "example_tokens": tuple(document.get("example_tokens", ())),
        }
    )


def checkpoint_from_json(document: Mapping[str, Any]) -> Checkpoint:
    """The inverse of `to_json` for a Checkpoint."""
    return Checkpoint(**{**document, "kind": CheckpointKind(document["kind"])})


def branch_from_json(document: Mapping[str, Any]) -> Branch:
    """The inverse of `to_json` for a Branch."""
    checkpoint, evaluation = document["checkpoint"], document["evaluation"]
    return Branch(
        **{
            **document,
            "attempts": tuple(Attempt(**attempt) for attempt in document["attempts"]),
            "checkpoint": None if checkpoint is None else checkpoint_from_json(checkpoint),
            "evaluation": None if evaluation is None else evaluation_from_json(evaluation),
        }
    )


def hyperparameters_from_json(document: Mapping[str, Any]) -> dict[str, Value]:
    """Hyperparameters whose lists became tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}


def assignment_from_json(document: Mapping[str, Any]) -> Assignment:
    """The inverse of `to_json` for an Assignment."""
    return Assignment(
        **{
            **document,
            "hyperparameters": hyperparameters_from_json(document["hyperparameters"]),
            "trunk_steps": tuple(document.get("trunk_steps", ())),
        }
    )


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as a JSON object whose `event` names its kind."""
    return {"event": type(event).__name__.lower(), **to_json(event)}


def event_from_json(document: Mapping[str, Any]) -> Event:
    """The inverse of `event_to_json`. Raises KeyError for an unknown kind."""
    values = {key: value for key, value in document.items() if key != "event"}
    kind = _EVENTS[document["event"]]
    for name, parse in (("evaluation", evaluation_from_json), ("base", evaluation_from_json)):
        if values.get(name) is not None:
            values[name] = parse(values[name])
    if "checkpoint" in values:
        values["checkpoint"] = checkpoint_from_json(values["checkpoint"])
    if "trials" in values:
        values["trials"] = tuple(values["trials"])
    if "throughput" in values:
        values["throughput"] = Throughput(**values["throughput"])
    return kind(**values)


def finite_or_none(number: float | None) -> float | None:
    """The number, or None where JSON has no form for it."""
    return number if number is not None and math.isfinite(number) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value
