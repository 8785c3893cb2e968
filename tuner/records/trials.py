"""What rounds, trials and comparison runs leave: assembled from facts, never changed."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Literal, overload

from tuner.records.space import LOSS, Hyperparameters, Objective
from tuner.records.throughput import Throughput, added_up, by_node


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
        """Return whether the trial will never run again."""
        return self not in (TrialState.WAITING, TrialState.RUNNING)

    @property
    def is_result(self) -> bool:
        """Return whether the trial counts towards `search.trials`."""
        return self in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.INFEASIBLE)


class Packed(Sequence[float]):
    """Numbers that are kept as bytes, little-endian float64, and equal the tuple of them.

    Ten thousand trials' losses of single examples are read in a fraction of the time, and numpy takes them as
    they are.
    """

    __slots__ = ("content",)

    def __init__(self, content: bytes) -> None:
        self.content = content

    def numbers(self) -> tuple[float, ...]:
        """As a tuple."""
        return struct.unpack(f"<{len(self)}d", self.content)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": (len(self),), "typestr": "<f8", "data": self.content}

    def __len__(self) -> int:
        return len(self.content) // 8

    @overload
    def __getitem__(self, place: int) -> float: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[float, ...]: ...
    def __getitem__(self, place: int | slice) -> float | tuple[float, ...]:
        return self.numbers()[place]

    def __iter__(self) -> Iterator[float]:
        return iter(self.numbers())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Packed, tuple)) and self.numbers() == tuple(other)

    def __hash__(self) -> int:
        return hash(self.numbers())

    def __repr__(self) -> str:
        return repr(self.numbers())


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
    example_nll: tuple[float, ...] | Packed = ()
    """Sum of negative log-likelihoods of each evaluation example; empty when not known."""
    example_tokens: tuple[int, ...] = ()
    """Target tokens of each evaluation example, in the same order."""
    correct_tokens: int | None = None
    """Those of all the target tokens than which the model finds no other likelier; None where not counted."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name, the objective's among them where it is not the loss."""
    objective: Objective | None = None
    """What chooses the best step of the trial; None is the loss."""

    @property
    def value(self) -> float:
        """Return the objective's value: the loss, or the metric that the round names; NaN if missing."""
        if self.objective is None:
            return self.eval_loss
        return self.metrics.get(self.objective.metric, math.nan)

    @property
    def cost(self) -> float:
        """Return the value with the sign that makes lower better."""
        return self.eval_loss if self.objective is None else self.objective.cost(self.value)

    def with_cost(self, cost: float) -> Evaluation:
        """Return the evaluation with another value of the objective."""
        if self.objective is None:
            return replace(self, eval_loss=cost)
        return replace(self, metrics={**self.metrics, self.objective.metric: self.objective.cost(cost)})

    def by(self, objective: Objective) -> Evaluation:
        """Return the evaluation as a round with that objective has it: never the best where it lacks it."""
        if objective.per == "trial" or objective == LOSS:
            return self if self.objective is None else replace(self, objective=None)
        value = self.metrics.get(objective.metric)
        if value is None and objective.metric == "token_accuracy":
            value = self.token_accuracy
        known = {} if value is None else {objective.metric: value}
        return replace(self, objective=objective, metrics={**self.metrics, **known})

    @property
    def token_accuracy(self) -> float | None:
        """Return the share of target tokens that rank first, in [0, 1]; None if it was not counted."""
        if self.correct_tokens is None or not sum(self.example_tokens):
            return None
        return self.correct_tokens / sum(self.example_tokens)

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"an evaluation's step is at least 0; got {self.step}")
        if len(self.example_nll) != len(self.example_tokens):
            raise ValueError("an evaluation needs one token count for each example")


def _recorded() -> Callable[..., Evaluation]:
    # The constructor of a frozen dataclass sets its fields through `object.__setattr__`: twice as long, and a
    # study has 100,000 evaluations.
    setters = [getattr(Evaluation, each.name).__set__ for each in fields(Evaluation)]
    step_, loss_, train_loss_, rate_, clipped_, nll_, tokens_, correct_, metrics_, objective_ = setters
    new = object.__new__

    def made(*values: Any) -> Evaluation:
        """Return an evaluation of the values of all fields, in their order; they are not checked again."""
        step, loss, train_loss, rate, clipped, nll, tokens, correct, metrics, objective = values
        evaluation = new(Evaluation)
        step_(evaluation, step)
        loss_(evaluation, loss)
        train_loss_(evaluation, train_loss)
        rate_(evaluation, rate)
        clipped_(evaluation, clipped)
        nll_(evaluation, nll)
        tokens_(evaluation, tokens)
        correct_(evaluation, correct)
        metrics_(evaluation, metrics)
        objective_(evaluation, objective)
        return evaluation

    return made


recorded_evaluation = _recorded()


@dataclass(frozen=True, slots=True)
class RunId:
    """What a worker runs: a trial to its round's horizon, or a comparison run whose parent is the trial."""

    round: str
    trial: int
    horizon: int | None = None
    """Where a comparison run ends; None for the trial itself."""

    def __str__(self) -> str:
        name = f"{self.round}/{self.trial}"
        return name if self.horizon is None else f"{name} to step {self.horizon}"


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

    @property
    def age(self) -> tuple[int, int]:
        """Return a sort key of adapters: the attempt that saved it, by the end of its name, and the step.

        An attempt may resume before the best step of the attempt before, and runs the steps after it anew.
        """
        attempt = re.search(r"\.a(\d+)$", self.path)
        return int(attempt[1]) if attempt else 0, self.step


@dataclass(frozen=True, slots=True)
class Continuation:
    """The checkpoint that a trial continues from; its text form is `round1/3@36`."""

    round: str
    trial: int
    step: int

    def __str__(self) -> str:
        return f"{self.round}/{self.trial}@{self.step}"

    @classmethod
    def parse(cls, text: str) -> Continuation:
        """Invert `str`. Raises ValueError."""
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
    environment: Mapping[str, str] = field(default_factory=dict)
    """What its worker computed with, by name: `device`, `threads`, `slots`, packages with their versions, and
    of a user's `metric` the hash of its file. Empty where it was not recorded."""


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
class AnswerScore:
    """How a trial's best adapter answers evaluation rows, by `evaluation.answers`; higher is better."""

    step: int
    """Of the adapter that answered."""
    metric: str
    """As the round file names it: `exact_match`, or the user's function."""
    mean: float
    """Over the answers, in the metric's own scale."""
    standard_error: float | None
    """Of the mean over the answers; None for a single one."""
    num_examples: int
    """Answers."""
    is_objective: bool = False
    """Whether the round ranks its trials by it; else by the evaluation loss."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"an answer score is a finite number; got {self.mean}")


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
    answer_score: AnswerScore | None = None
    """Of the best step; None unless the trial is complete and its round has `evaluation.answers`."""

    @property
    def name(self) -> str:
        """Return its name, such as `round1/7`."""
        return f"{self.round}/{self.number}"

    @property
    def executed_steps(self) -> int:
        """Return the steps run, including those repeated after a crash and without inherited ones.

        Never less than events and checkpoints prove; see `was_killed`.
        """
        return sum(attempt.to_step - attempt.from_step for attempt in self.attempts)

    @property
    def was_killed(self) -> bool:
        """Whether an attempt ended without a word, so that up to a second of its steps is unknown."""
        return any(attempt.outcome in ("interrupted", "died") for attempt in self.attempts)

    def checkpoint(self, kind: CheckpointKind, step: int | None = None) -> Checkpoint | None:
        """Return the newest checkpoint of a kind, or the one at a step.

        Adapters of the best step are the latest attempt's; resumable ones of two attempts are equal.
        """
        found = [c for c in self.checkpoints if c.kind == kind and step in (None, c.step)]
        return max(found, key=lambda c: c.age if kind == CheckpointKind.BEST else (0, c.step), default=None)


@dataclass(frozen=True, slots=True)
class Branch:
    """A comparison run: a trial's hyperparameters run to a shorter horizon on the same schedule.

    It is a decay branch where it starts from the trial's stable checkpoint. It is no trial: it has no number,
    nothing of it is searched, and it leaves no adapter.
    """

    trial: int
    """Number of the trial that it is compared with."""
    max_train_steps: int
    """Its own horizon."""
    from_step: int
    """Step of the stable checkpoint that it starts from; 0 from scratch."""
    attempts: tuple[Attempt, ...] = ()
    checkpoint: Checkpoint | None = None
    """Where the next attempt resumes; None where it starts."""
    state: Literal["open", "complete", "infeasible", "failed"] = "open"
    """As of a trial; `open` until it has ended."""
    reason: str | None = None
    evaluation: Evaluation | None = None
    """At its horizon."""

    @property
    def executed_steps(self) -> int:
        """Return the steps run, including those repeated after a crash."""
        return sum(attempt.to_step - attempt.from_step for attempt in self.attempts)


@dataclass(frozen=True, slots=True)
class NodeChange:
    """A node joined the cluster of a round while it ran, was lost, or was left out."""

    node: str
    """Its name, as in an attempt's environment."""
    change: Literal["joined", "lost", "left_out"]
    """`left_out`: it gets no more workers in this run, as `reason` says."""
    gpus: int
    at: float
    """Seconds since the epoch."""
    reason: str | None = None


class RoundKind(StrEnum):
    """What a round is for."""

    SEARCH = "search"
    SWEEP = "sweep"
    """A round of `study sweep`, so none to promote from or to compare with."""
    DRY_RUN = "dry run"
    """A search in which nothing is trained."""


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
    kind: RoundKind = RoundKind.SEARCH
    throughputs: tuple[Throughput, ...] = ()
    """Of every worker process that measured its work for the round, by session."""
    branches: tuple[Branch, ...] = ()
    """Its comparison runs that have begun, by trial and horizon."""
    node_changes: tuple[NodeChange, ...] = ()
    """Of its cluster's nodes, by time."""

    @property
    def throughput(self) -> Throughput | None:
        """Return the throughput of all workers together; None if nothing was measured."""
        return added_up(self.throughputs)

    @property
    def throughput_by_node(self) -> Mapping[str, Throughput]:
        """Return the throughput of each node of a cluster, by its name; empty on one machine."""
        return by_node(self.throughputs)

    @property
    def is_sweep(self) -> bool:
        """Whether `study sweep` began it."""
        return self.kind == RoundKind.SWEEP

    @property
    def kept(self) -> str:
        """What is kept of a trial, in a word: tuner does not know what a command writes."""
        return "checkpoint" if self.spec.get("command") else "adapter"


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
