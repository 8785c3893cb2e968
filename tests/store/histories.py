"""Random histories of a study, as hypothesis draws them, and which of their facts may be said again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tuner.records import (
    Answered,
    AnswerScore,
    Attempt,
    AttemptStarted,
    Branch,
    BranchAdvanced,
    Checkpoint,
    CheckpointKind,
    CheckpointsRemoved,
    Continuation,
    Ended,
    Evaluated,
    Evaluation,
    Fact,
    FinalScore,
    Measured,
    NodeChange,
    NodeChanged,
    Progressed,
    Promotion,
    PromotionPlanned,
    RoundBegun,
    RoundRecord,
    Saved,
    Started,
    Throughput,
    Trial,
    TrialAsked,
    TrialEnded,
    TrialNoted,
    TrialScored,
    TrialState,
)

# SQLite keeps 0.0 of -0.0 in a column of its own.
FLOATS = st.floats().map(lambda number: number + 0.0)
TIMES = st.floats(0, 2e9)
STEPS = st.integers(0, 40)
TEXTS = st.text(st.characters(), max_size=8)
ROUNDS = ("round1", "round2")
VALUES = st.one_of(
    st.booleans(), st.integers(-5, 5), st.floats(), TEXTS, st.lists(TEXTS, max_size=2).map(tuple)
)
DOCUMENTS = st.dictionaries(
    st.text(max_size=5), st.one_of(st.none(), VALUES, st.lists(st.floats(), max_size=2)), max_size=3
)


@st.composite
def evaluations(draw: st.DrawFn) -> Evaluation:
    examples = draw(st.lists(st.tuples(st.floats(), st.integers(0, 2**31 - 1)), max_size=3))
    return Evaluation(
        draw(STEPS),
        draw(FLOATS),
        draw(st.none() | FLOATS),
        draw(st.none() | FLOATS),
        draw(STEPS),
        tuple(nll for nll, _ in examples),
        tuple(tokens for _, tokens in examples),
    )


@st.composite
def histories(draw: st.DrawFn) -> list[Fact]:
    """Facts that follow from each other; some of them replace earlier ones."""
    hyperparameters = draw(st.dictionaries(TEXTS, VALUES, max_size=4).filter(_equals_itself))
    facts: list[Fact] = [RoundBegun(RoundRecord(name, 60, draw(DOCUMENTS), draw(TIMES))) for name in ROUNDS]
    trials = [(name, number) for name in ROUNDS for number in range(draw(st.integers(1, 2)))]
    facts += [TrialAsked(_trial(draw, trial, hyperparameters)) for trial in trials]
    facts += [AttemptStarted(*trial, 1, draw(STEPS), draw(TIMES)) for trial in trials]
    attempts = dict.fromkeys(trials, 1)
    for _ in range(draw(st.integers(0, 20))):
        trial = draw(st.sampled_from(trials))
        if draw(st.booleans()):
            facts.append(_said_of_attempt(draw, facts, trial, attempts))
        else:
            facts.append(draw(st.sampled_from(_SAID))(draw, trial, hyperparameters))
    return facts


def _equals_itself(values: dict[str, Any]) -> bool:
    return values == dict(values.items()) and all(value == value for value in values.values())


def _trial(draw: st.DrawFn, trial: tuple[str, int], hyperparameters: dict[str, Any]) -> Trial:
    continues = Continuation("round1", 0, 36) if trial[0] == "round2" else None
    return Trial(*trial, hyperparameters, continues=continues, optuna_trial=draw(st.none() | STEPS))


def _said_of_attempt(
    draw: st.DrawFn, facts: list[Fact], trial: tuple[str, int], attempts: dict[tuple[str, int], int]
) -> Fact:
    attempt = draw(st.integers(1, attempts[trial]))
    match draw(st.sampled_from(["start", "place", "end", "steps", "save", "remove"])):
        case "start":
            attempts[trial] += 1
            return AttemptStarted(*trial, attempts[trial], draw(STEPS), draw(TIMES))
        case "place":
            return Started(*trial, attempt, 0, {"torch": draw(TEXTS)})
        case "end":
            message = draw(st.none() | TEXTS)
            return Ended(*trial, attempt, draw(STEPS), "died", message, draw(TIMES))
        case "steps":
            return Progressed(*trial, attempt, draw(STEPS))
        case "save":
            kind, step = draw(st.sampled_from(CheckpointKind)), draw(st.sampled_from([5, 10]))
            saved = Checkpoint(kind, step, f"{kind}-{step}-{attempt}", draw(st.integers(0, 2**40)), "hash")
            return Saved(*trial, attempt, saved)
        case _:
            paths = {
                fact.checkpoint.path
                for fact in facts
                if isinstance(fact, Saved) and (fact.round, fact.trial) == trial
            }
            gone = draw(st.sets(st.sampled_from(sorted(paths)))) if paths else set()
            return CheckpointsRemoved(*trial, tuple(sorted(gone)))


_SAID: list[Callable[[st.DrawFn, tuple[str, int], dict[str, Any]], Fact]] = [
    lambda draw, trial, _: RoundBegun(RoundRecord(trial[0], 60, draw(DOCUMENTS), draw(TIMES))),
    lambda draw, trial, hyperparameters: TrialAsked(_trial(draw, trial, hyperparameters)),
    lambda draw, trial, _: Evaluated(*trial, 1, draw(evaluations())),
    lambda draw, trial, _: Evaluated(*trial, 1, draw(evaluations())),
    lambda draw, trial, _: TrialNoted(*trial, draw(TEXTS)),
    lambda draw, trial, _: TrialEnded(
        *trial,
        draw(st.sampled_from([state for state in TrialState if state.is_final])),
        draw(st.none() | TEXTS),
        draw(TIMES),
    ),
    lambda draw, trial, _: TrialScored(
        *trial, FinalScore(draw(STEPS), draw(FLOATS), draw(st.none() | FLOATS), 3, 7, "rows", draw(TIMES))
    ),
    lambda draw, trial, _: Answered(
        *trial,
        1,
        AnswerScore(
            draw(STEPS), "exact_match", draw(TIMES), draw(st.none() | FLOATS), 3, draw(st.booleans())
        ),
    ),
    lambda draw, trial, _: BranchAdvanced(
        trial[0],
        Branch(
            trial[1],
            draw(st.sampled_from([20, 28])),
            12,
            attempts=(Attempt(1, 12, draw(STEPS), draw(TIMES), message=draw(st.none() | TEXTS)),),
            reason=draw(st.none() | TEXTS),
            evaluation=draw(st.none() | evaluations()),
        ),
    ),
    lambda draw, trial, _: Measured(
        Throughput(draw(st.sampled_from("ab")), draw(TIMES), tokens=draw(st.integers(0, 2**60))), trial[0]
    ),
    lambda draw, trial, _: NodeChanged(
        NodeChange(
            draw(st.sampled_from("ab")),
            draw(st.sampled_from(["joined", "lost", "left_out"])),
            8,
            draw(TIMES),
            draw(st.none() | TEXTS),
        ),
        trial[0],
    ),
    lambda draw, trial, _: PromotionPlanned(
        Promotion(
            trial[0], draw(st.sampled_from(["round2", "round3"])), draw(DOCUMENTS), draw(TEXTS), draw(TIMES)
        )
    ),
]


def replayable(facts: list[Fact]) -> list[Fact]:
    """Those that no later fact has replaced."""
    latest = {_replaces(fact): position for position, fact in enumerate(facts)}
    return [fact for position, fact in enumerate(facts) if latest[_replaces(fact)] == position]


def _replaces(fact: Fact) -> object:
    """Facts of which this is equal replace one another; a fact that is never replaced has its own."""
    match fact:
        case RoundBegun(round=record):
            return ("round", record.name)
        case TrialAsked(trial=trial):
            return ("trial", trial.round, trial.number)
        case Evaluated():
            return ("evaluation", fact.round, fact.trial, fact.evaluation.step)
        case Saved():
            return ("checkpoint", fact.round, fact.trial, fact.checkpoint.path)
        case Started():
            return ("environment", fact.round, fact.trial, fact.attempt)
        case TrialNoted():
            return ("note", fact.round, fact.trial)
        case Answered():
            return ("answers", fact.round, fact.trial)
        case BranchAdvanced(round=name, branch=branch):
            return ("branch", name, branch.trial, branch.max_train_steps)
        case Measured():
            return ("work", fact.round, fact.throughput.session)
        case PromotionPlanned(promotion=promotion):
            return ("promotion", promotion.to_round)
        case _:
            return id(fact)
