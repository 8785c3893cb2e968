"""Rounds whose curves are formulas, so that what a report must say of them is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tuner.playbook.reading import read_round
from tuner.playbook.results import RoundResults
from tuner.records import (
    Attempt,
    Choices,
    Continuation,
    Evaluation,
    Fixed,
    Range,
    RoundRecord,
    Space,
    Throughput,
    Trial,
    TrialState,
    Value,
)
from tuner.report.round_report import RoundReport

SPACE: Space = {
    "learning_rate": Range(1e-5, 3e-3, log=True),
    "lora_r": Choices((8, 16, 32)),
    "lora_alpha": Fixed(16),
    "target_modules": Fixed("all-linear"),
    "batch_size": Fixed(8),
    "optimizer": Fixed("adamw_8bit"),
    "warmup_steps": Fixed(5),
    "schedule": Fixed("linear"),
    "decay_steps": Fixed(24),
    "lora_dropout": Fixed(0.0),
    "training_seed": Fixed(0),
}
BASE_LOSS = 2.4310
NUM_EXAMPLES = 40
WORK = (
    Throughput("1-1", 30.0, 9.0, 1.0, 100, 350, 40, 90_000, 100_000, 2_000_000_000),
    Throughput("2-1", 10.0, 9.0, 1.0, 100, 350, 40, 30_000, 50_000, 3_000_000_000),
)
"""Of two workers: 3,000 tokens/s, 2 trial-steps/s, packing factor 3.5, padding 20%, evaluation 30%, 3 GB."""


def evaluation(step: int, loss: float, *, rate: float = 1e-4) -> Evaluation:
    """One evaluation; the examples' own losses differ around the mean in the same way at every step."""
    tokens = tuple(20 + i % 7 for i in range(NUM_EXAMPLES))
    spread = [0.8 + 0.4 * random.Random(i).random() for i in range(NUM_EXAMPLES)]
    scale = loss * sum(tokens) / sum(t * s for t, s in zip(tokens, spread, strict=True))
    has_examples = math.isfinite(loss)
    return Evaluation(
        step=step,
        eval_loss=loss,
        train_loss=None if step == 0 else loss - 0.02,
        learning_rate=None if step == 0 else rate,
        example_nll=tuple(scale * t * s for t, s in zip(tokens, spread, strict=True)) if has_examples else (),
        example_tokens=tokens if has_examples else (),
    )


def curve(
    rate: float,
    *,
    max_train_steps: int,
    every: int = 5,
    floor: float = 1.20,
    noise: float = 0.002,
    seed: int = 0,
) -> tuple[Evaluation, ...]:
    """A curve that falls faster with the rate, best near 3e-4."""
    draw = random.Random(seed)
    gap = abs(math.log10(rate / 3e-4))
    made = []
    for step in range(0, max_train_steps + 1, every):
        pace = 1 + step * min(rate, 1e-3) * 900
        loss = floor + 0.12 * gap + (BASE_LOSS - floor - 0.12 * gap) * pace**-0.6
        loss += draw.gauss(0, noise) if step else 0
        made.append(evaluation(step, loss, rate=rate))
    return tuple(made)


def diverging(rate: float, *, every: int = 5) -> tuple[Evaluation, ...]:
    """A curve that improves once and then goes to NaN."""
    losses = [BASE_LOSS, 2.1, 4.9, 9.7, math.nan]
    return tuple(evaluation(every * i, loss, rate=rate) for i, loss in enumerate(losses))


def trial(
    number: int,
    rate: float,
    *,
    round: str = "round1",
    max_train_steps: int = 60,
    rank: int = 16,
    state: TrialState = TrialState.COMPLETE,
    evaluations: Sequence[Evaluation] | None = None,
    continues: Continuation | None = None,
    reason: str | None = None,
) -> Trial:
    """A trial of the formula, complete unless told otherwise."""
    if evaluations is None:
        evaluations = curve(rate, max_train_steps=max_train_steps, seed=number)
    last = evaluations[-1].step if evaluations else 0
    start = continues.step if continues else 0
    attempts = (Attempt(1, start, last, 1000.0, 1000.0 + 2 * (last - start), "complete"),) if last else ()
    fixed = {name: d.value for name, d in SPACE.items() if isinstance(d, Fixed)}
    return Trial(
        round=round,
        number=number,
        hyperparameters={"learning_rate": rate, "lora_r": rank, **fixed},
        state=state,
        reason=reason,
        continues=continues,
        evaluations=tuple(evaluations),
        attempts=attempts,
    )


def trials(round: str = "round1", *, max_train_steps: int = 60) -> tuple[Trial, ...]:
    """Seven complete trials and one that diverged."""
    rates = [1.2e-5, 3.4e-5, 7.9e-5, 1.6e-4, 2.8e-4, 5.5e-4, 9.1e-4]
    ranks = [8, 16, 32, 8, 16, 32, 8]
    done = [
        trial(number, rate, round=round, rank=rank, max_train_steps=max_train_steps)
        for number, (rate, rank) in enumerate(zip(rates, ranks, strict=True))
    ]
    lost = trial(
        7,
        2.7e-3,
        round=round,
        rank=32,
        state=TrialState.INFEASIBLE,
        evaluations=diverging(2.7e-3),
        reason="evaluation loss is nan at step 20",
    )
    return (*done, lost)


def report(
    *,
    round: str = "round1",
    max_train_steps: int = 60,
    trials_of_round: Sequence[Trial] | None = None,
    goal: str = "Learning rate and rank for Alpaca on SmolLM2",
    promised: int = 8,
    earlier: Sequence[RoundReport] = (),
    throughputs: Sequence[Throughput] = (),
    space: Space = SPACE,
) -> RoundReport:
    """A round of the formula as a report, read by the playbook."""
    ran = (
        trials(round, max_train_steps=max_train_steps) if trials_of_round is None else tuple(trials_of_round)
    )
    results = RoundResults(
        name=round,
        max_train_steps=max_train_steps,
        evaluate_every=5,
        space=space,
        trials=ran,
        train_rows=400,
        production_steps=2000,
        evaluation_share=0.22,
        workload="w",
        seconds_per_step=2.0,
    )
    spec = {
        "model": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct", "dtype": "bfloat16", "quantization": "none"},
        "search": {"trials": promised},
    }
    return RoundReport(
        study="alpaca-smollm2",
        goal=goal,
        record=RoundRecord(
            round,
            max_train_steps,
            spec,
            1000.0,
            train_rows=400,
            eval_rows=40,
            workload="w",
            throughputs=tuple(throughputs),
        ),
        results=results,
        reading=read_round(results, [other.results for other in earlier]),
        adapters={t.number: f"runs/{round}/trial-{t.number:04d}/best" for t in ran},
        next_command="tuner study promote --to round2",
        environment={"tuner": "0.1.0", "torch": "2.13.0", "hardware": "2 CPU cores"},
    )


def two_rounds() -> tuple[RoundReport, RoundReport]:
    """A round, and one three times as long whose trials go on from the first one's three best."""
    first = report()
    later = [
        trial(
            number,
            float(source.hyperparameters["learning_rate"]),  # type: ignore[arg-type]
            rank=int(source.hyperparameters["lora_r"]),  # type: ignore[arg-type]
            round="round2",
            max_train_steps=180,
            continues=Continuation("round1", source.number, 36),
        )
        for number, (source, _) in enumerate(first.ranked[:3])
    ]
    return first, report(
        round="round2", max_train_steps=180, trials_of_round=later, promised=3, earlier=[first]
    )


def overfitting_report() -> RoundReport:
    """Five trials whose evaluation loss turns up at step 25."""
    return shaped_report(lambda step: 2 - 0.04 * step if step <= 25 else 1 + 0.004 * (step - 25))


def shaped_report(shape: Callable[[int], float], *, num_trials: int = 5, promised: int = 5) -> RoundReport:
    """Trials whose losses follow `shape` of the step, each a little worse than the one before."""
    ran = [
        trial(
            number,
            1e-4 * (number + 1),
            evaluations=[
                evaluation(step, shape(step) + (0.002 * number if step else 0)) for step in range(0, 61, 5)
            ],
        )
        for number in range(num_trials)
    ]
    return report(trials_of_round=ran, promised=promised)


def with_hyperparameters(trial: Trial, changed: Mapping[str, Value]) -> Trial:
    """The trial with other values."""
    return replace(trial, hyperparameters={**trial.hyperparameters, **changed})


def many_trials(count: int, *, max_train_steps: int = 60) -> list[Trial]:
    """Trials at random points of six hyperparameters; the highest rates diverge."""
    draw = random.Random(1)
    made = []
    for number in range(count):
        rate = 10 ** draw.uniform(-5, -2.5)
        one = trial(number, rate, rank=draw.choice((8, 16, 32)), max_train_steps=max_train_steps)
        if rate > 2.2e-3:
            reason = "evaluation loss is nan at step 20"
            lost, evaluations = TrialState.INFEASIBLE, diverging(rate)
            one = replace(one, state=lost, reason=reason, evaluations=evaluations)
        values = {
            "weight_decay": draw.uniform(0, 0.1),
            "schedule": draw.choice(("linear", "cosine")),
            "target_modules": draw.choice(("all-linear", ("q_proj", "v_proj"))),
            "lora_dropout": draw.choice((0.0, 0.05, 0.1)),
        }
        made.append(with_hyperparameters(one, values))
    return made


WIDE_SPACE: Space = {
    **SPACE,
    "weight_decay": Range(0, 0.1),
    "schedule": Choices(("linear", "cosine")),
    "target_modules": Choices(("all-linear", ("q_proj", "v_proj"))),
    "lora_dropout": Choices((0.0, 0.05, 0.1)),
}
"""Of `many_trials`."""


def large_report(count: int = 200) -> RoundReport:
    """A round of many trials over six hyperparameters."""
    return replace(
        report(trials_of_round=many_trials(count), promised=count, space=WIDE_SPACE),
        importance={"learning_rate": 0.61, "lora_r": 0.2, "weight_decay": 0.1, "schedule": 0.09},
    )
