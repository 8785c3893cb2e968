"""Put a round's conclusions into plain sentences, shared by the terminal, the page and the notes."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.playbook.gain import GainSource
from tuner.playbook.horizon import Diagnosis
from tuner.playbook.reopening import MIN_RANKED, CarriedOver, carried_over
from tuner.playbook.selection import trial_score
from tuner.records import Evaluation, Trial
from tuner.report import format
from tuner.report.round_report import RoundReport, metric_of

GAIN_SOURCES = {
    GainSource.COMPARISON: "measured by a comparison run",
    GainSource.STABLE_PHASE: "without a decay",
    GainSource.EARLIER_ROUND: "from an earlier round",
    GainSource.BEFORE_DECAY: "before the decay",
}

_RESTS_ON_THE_GAIN = (Diagnosis.UNDETERMINED, Diagnosis.SATURATED, Diagnosis.TOO_SHORT, Diagnosis.RIGHT)
LINEAGE_HEADERS = (
    "round", "steps", "trials", "best loss", "at step", "steps run", "carried over", "conclusion",
)  # fmt: skip


def headline(report: RoundReport) -> str:
    """Return the conclusion in one sentence: was the horizon right, and if not, what would be?"""
    steps, next_steps = report.max_train_steps, report.reading.suggested_max_train_steps
    if not report.results.complete:
        return "Nothing to conclude yet: no trial is complete."
    if report.reading.widens_rates:
        return f"The learning rates may all be too small: try higher ones at {steps} steps first."
    would_do = f" {next_steps} would do." if next_steps is not None and next_steps < steps else ""
    is_longer = next_steps is not None and next_steps > steps
    match report.reading.diagnosis:
        case Diagnosis.NO_LEARNING if any(best.step > 0 for _, best in report.ranked):
            return "No trial beat the base model by more than the noise."
        case Diagnosis.NO_LEARNING:
            return "Training did not help: no trial beat the base model."
        case Diagnosis.TOO_LONG:
            return f"{steps} steps are far too many.{would_do}"
        case Diagnosis.OVERFITTING:
            return f"The best trial overfits, so more steps will not help.{would_do}"
        case Diagnosis.UNDETERMINED if is_longer:
            return f"Unclear whether more steps would help. When in doubt, train longer: {next_steps} next."
        case Diagnosis.UNDETERMINED:
            return "This round cannot tell whether more steps would help."
        case Diagnosis.SATURATED:
            return f"{steps} steps are {'more than ' if would_do else ''}enough.{would_do}"
        case Diagnosis.TOO_SHORT if is_longer:
            return f"{steps} steps are too few. Train for {next_steps} next."
        case Diagnosis.TOO_SHORT:
            return f"{steps} steps are too few, but run.production_steps does not allow longer runs."
        case Diagnosis.RIGHT:
            return f"{steps} steps are about right."


def found(report: RoundReport) -> tuple[str, ...]:
    """Describe the best trial, and compare its loss with the base model's and the runner-up's."""
    trials = format.count(len(report.trials), "trial")
    if not report.ranked:
        return (f"{trials} so far: {format.counts(report.counts)}.",)
    (trial, best), *others = report.ranked
    if all(evaluation.step == 0 for _, evaluation in report.ranked):
        value = format.loss(best.value)
        return (f"None of {trials} ({format.counts(report.counts)}) beat the base model's {value}.",)
    share = format.percent(best.step / report.max_train_steps)
    scored = trial.answer_score
    answers = f"answers that score {format.answers_in_words(scored)}, " if scored else ""
    chosen = best.objective
    value = "" if chosen is None else f"{chosen.metric} {format.loss(best.value)}, "
    sentences = [
        f"The best of {trials} ({format.counts(report.counts)}) is "
        f"trial {trial.number}: {answers}{value}"
        f"evaluation loss {format.loss(best.eval_loss)} at step {best.step} of "
        f"{report.max_train_steps} ({share} of the run){_against_the_base(report, best.eval_loss)}."
    ]
    if (first := trial.evaluations[0].step) > 0:
        sentences.append(
            f"The base model was not evaluated; the first evaluation, at step {first}, stands for it."
        )
    if report.shown_names:
        sentences.append(f"It has {format.settings(trial.hyperparameters, report.shown_names)}.")
    if others:
        sentences.append(_runner_up(*others[0], trial, best))
    return tuple(sentences)


def _runner_up(runner_up: Trial, second: Evaluation, trial: Trial, best: Evaluation) -> str:
    named, loss = f"The runner-up, trial {runner_up.number},", format.loss(second.eval_loss)
    if trial_score(trial) is not None:
        return (
            f"{named} has {format.answer_score(runner_up.answer_score)} and loss {loss}. Trials are ranked "
            "by their answers; the conclusions about the horizon are based on losses."
        )
    if best.objective is not None:
        return f"{named} has {best.objective.metric} {format.loss(second.value)}."
    behind = format.percent((second.eval_loss - best.eval_loss) / abs(best.eval_loss or 1.0))
    return f"{named} is {behind} behind with {loss}."


def _against_the_base(report: RoundReport, loss: float) -> str:
    base = report.base_loss
    if base is None or base <= loss:
        return ""
    return f", {format.percent((base - loss) / abs(base))} below the base model's {format.loss(base)}"


def still_better(report: RoundReport, earlier: Sequence[RoundReport]) -> tuple[str, ...]:
    """Name a trial of an earlier round that is better by the same objective on the same workload."""
    by = _ranked_by(report)
    comparable = [
        e
        for e in earlier
        if e.ranked
        and e.record.workload == report.record.workload
        and (not report.ranked or _ranked_by(e) == by)
    ]
    champion = min(comparable, key=_merit, default=None)
    if champion is None or (report.ranked and _merit(champion) >= _merit(report)):
        return ()
    trial, best = champion.ranked[0]
    score = f"answers that score {format.answer_score(trial.answer_score)}, loss " if by is not None else ""
    name, value = trial.name, format.loss(best.value)
    metric = "" if best.objective is None else f"{best.objective.metric} "
    return (f"An earlier trial, {name}, is still better: {score}{metric}{value} at step {best.step}.",)


def _ranked_by(report: RoundReport) -> tuple[str, int] | str | None:
    """Return what ranks the trials: the answers' metric and number, or another metric of evaluations.

    Returns None if the loss does.
    """
    if not report.ranked:
        return None
    (trial, best), *_ = report.ranked
    if trial_score(trial) is not None and (score := trial.answer_score) is not None:
        return score.metric, score.num_examples
    return None if best.objective is None else best.objective.metric


def _merit(report: RoundReport) -> tuple[float, float]:
    """Return a sort key, lower is better: first a per-trial objective, then evaluations."""
    trial, best = report.ranked[0]
    return -(trial_score(trial) or 0.0), best.cost


def tested(report: RoundReport) -> tuple[str, ...]:
    """Report the scores on `data.test`, or how to measure one, once, at the end."""
    if report.scored:
        return tuple(f"{t.name}: {format.final_in_words(t, report.scored)}" for t in report.scored)
    if not report.has_test or not report.ranked:
        return ()
    return (
        "The lowest of many evaluation losses is optimistic. When you have chosen the final trial, "
        "score it once on data.test with `tuner trial show best --test`.",
    )


def lineage_rows(reports: Sequence[RoundReport]) -> list[tuple[str, ...]]:
    """Return a study's rounds, oldest first, as rows under `LINEAGE_HEADERS`."""
    return [_lineage_cells(report, reports[:position]) for position, report in enumerate(reports)]


def _lineage_cells(report: RoundReport, earlier: Sequence[RoundReport]) -> tuple[str, ...]:
    best = report.ranked[0][1] if report.ranked else None
    return (
        report.record.name,
        str(report.max_train_steps),
        format.counts(report.counts),
        format.loss(best.eval_loss if best else None),
        str(best.step) if best else format.NOTHING,
        f"{report.executed_steps:,}",
        _carried_cell(report, carried(report, earlier)),
        headline(report),
    )


def _carried_cell(report: RoundReport, over: CarriedOver | None) -> str:
    if over is None:
        return format.NOTHING
    saved = f", {format.count(report.inherited_steps, 'step')} saved" if report.inherited_steps else ""
    return f"{len(over.trials)} of {over.from_round}{saved}"


def carried(report: RoundReport, earlier: Sequence[RoundReport]) -> CarriedOver | None:
    """Describe what a round took over from earlier ones."""
    return carried_over(report.results, [other.results for other in earlier])


def held(reports: Sequence[RoundReport]) -> tuple[str, ...]:
    """Report whether the order of carried-over trials held, per round; `reports` are oldest first."""
    found = ((report, carried(report, reports[:position])) for position, report in enumerate(reports))
    return tuple(_held(report, over) for report, over in found if over is not None and over.compared)


def _held(report: RoundReport, over: CarriedOver) -> str:
    name, trials = report.record.name, format.count(len(over.compared), "trial")
    if len(over.compared) < MIN_RANKED:
        return f"{trials} of {over.from_round} ran in {name} too: too few to say whether the order held."
    metric = metric_of(report.trials)
    values = "losses" if metric is None else f"values of {metric}"
    if over.rank_correlation is None:
        return f"{trials} of {over.from_round} ran in {name} too, all with equal {values}."
    place, best = over.place_of_the_best, over.compared[0][0]
    stands = "still their best" if place == 1 else f"number {place} of the {len(over.compared)}"
    return (
        f"{trials} of {over.from_round} ran in {name} too. The rank correlation of their {values} in both "
        f"is {over.rank_correlation:.2f} (1: the same order, -1: reversed). The best in {over.from_round}, "
        f"trial {best}, is {stands} in {name}."
    )


def key_numbers(report: RoundReport) -> list[tuple[str, str, str]]:
    """Return the key numbers as (name, number, reference to compare it with)."""
    reading, steps = report.reading, report.max_train_steps
    numbers = []
    if report.ranked:
        trial, best = report.ranked[0]
        base = report.base_loss
        against = f"trial {trial.number}" + (f", base model {format.loss(base)}" if base is not None else "")
        if trial.answer_score is not None:
            by = f"{format.count(trial.answer_score.num_examples, 'answer')} by {trial.answer_score.metric}"
            numbers.append(("answer score", format.answer_score(trial.answer_score), by))
        if best.objective is not None:
            first = trial.evaluations[0]
            base_value = f", base model {format.loss(first.value)}" if first.step == 0 else ""
            beside = f"trial {trial.number}{base_value}"
            numbers.append((f"best {best.objective.metric}", format.loss(best.value), beside))
        is_lowest = trial_score(trial) is None and best.objective is None
        name = "best evaluation loss" if is_lowest else "its evaluation loss"
        numbers.append((name, format.loss(best.eval_loss), against))
        numbers.append(("its best step", str(best.step), f"of {steps}, {format.percent(best.step / steps)}"))
    is_telling = reading.diagnosis in _RESTS_ON_THE_GAIN and reading.leading
    if is_telling and reading.gain is not None and reading.gain_source is not None:
        noise = "noise unknown" if reading.noise is None else f"± {format.percent(2 * reading.noise)}"
        give = f"{noise}, {GAIN_SOURCES[reading.gain_source]}"
        numbers.append(("gain of the last doubling", format.percent(reading.gain), give))
    if reading.suggested_max_train_steps is not None:
        low, high = reading.suggestion_interval or (0, 0)
        between = f", {low} to {high} are as good" if low < high else ""
        suggested = f"{reading.suggested_max_train_steps}"
        numbers.append(("steps for the next round", suggested, f"now {steps}{between}"))
    return numbers


def rule_in_words(rule: str) -> str:
    """Return a rule's name as a heading: `too_few_trials` becomes "Too few trials"."""
    return rule.replace("_", " ").capitalize()


def progress(report: RoundReport) -> str | None:
    """Return a caution if trials are missing, or why a finished round has fewer than wanted."""
    done = len(report.results.results)
    if report.is_finished and done < report.num_wanted:
        points = format.count(report.num_promised, "point")
        return (
            f"The search space has {points}, so the round ended after {done} of {report.num_wanted} trials."
        )
    if report.is_finished:
        return None
    if done >= report.num_promised:
        return "Preliminary: the comparison runs, which measure the gain of a doubling, have not run yet."
    return (
        f"Preliminary: {done} of {report.num_promised} trials are done; the others may change the conclusion."
    )


def next_step(report: RoundReport) -> str:
    """Return the reason for the next command."""
    if report.ended_because is not None:
        if report.reading.diagnosis in (Diagnosis.TOO_SHORT, Diagnosis.UNDETERMINED):
            because = report.ended_because[0].upper() + report.ended_because[1:]
            return f"{because}. Use the best trial's adapter, or promote the round and continue by hand."
        return "The study has ended: use the best trial's adapter."
    if not report.is_finished:
        return "Finish the round first: the same command resumes it."
    if not report.results.complete:
        return "No trial is complete. Find out why before running more."
    steps, next_steps = report.max_train_steps, report.reading.suggested_max_train_steps
    if report.reading.widens_rates:
        return f"Search higher learning rates in another round of {steps} steps."
    match report.reading.diagnosis:
        case Diagnosis.NO_LEARNING:
            return "Do not train longer yet: check which tokens are in the loss, and the learning rates."
        case Diagnosis.RIGHT:
            return f"Keep {steps} steps and search closer to the best trials."
        case Diagnosis.OVERFITTING:
            return "Get more data or regularise more before adding steps."
        case _ if next_steps is not None and next_steps != steps:
            return f"Carry the best trials into a round of {next_steps} steps.{_cost(report)}"
        case _:
            return f"Carry the best trials into another round of {steps} steps."


def _cost(report: RoundReport) -> str:
    cost = report.reading.cost
    if cost is None:
        return ""
    parts = [f"{format.number(cost.epochs)} epochs"] if cost.epochs is not None else []
    parts += [f"about {format.duration(3600 * cost.hours)}"] if cost.hours is not None else []
    return f" A trial of that length takes {' and '.join(parts)}." if parts else ""


def setting(report: RoundReport) -> dict[str, str]:
    """Return what was run, by name: base model, data, horizon and cost."""
    model = report.record.spec.get("model", {})
    facts = {"model": _model(model) if model else ""}
    if "command" in report.record.spec:
        facts["command"] = " ".join(report.record.spec["command"]["run"])
    else:
        rows = f"{report.record.train_rows:,} training rows, {report.record.eval_rows:,} for evaluation"
        facts["data"] = rows
    epochs = _epochs(report)
    facts["each trial"] = format.count(report.max_train_steps, "step") + (
        f" ({format.number(epochs)} epochs), evaluated every {report.results.evaluate_every}"
        if epochs is not None
        else f", evaluated every {report.results.evaluate_every}"
    )
    facts["cost"] = f"{report.executed_steps:,} steps run"
    if report.branch_steps:
        facts["cost"] += f", {report.branch_steps:,} of them in comparison runs"
    if report.inherited_steps:
        facts["cost"] += f", {report.inherited_steps:,} more taken over from earlier trials"
    seconds = _trial_seconds(report)
    facts["time"] = f"{format.duration(seconds)} of trials" if seconds else ""
    return {name: fact for name, fact in {**facts, **report.environment}.items() if fact}


def _model(model: dict[str, object]) -> str:
    how = [str(model[key]) for key in ("dtype", "quantization") if model.get(key) not in (None, "none")]
    return f"{model.get('path', '')} ({', '.join(how)})" if how else str(model.get("path", ""))


def _epochs(report: RoundReport) -> float | None:
    batch_sizes = {trial.hyperparameters.get("batch_size") for trial in report.results.trials}
    size = batch_sizes.pop() if len(batch_sizes) == 1 else None
    if not isinstance(size, (int, float)) or report.record.train_rows <= 0:
        return None
    return report.max_train_steps * size / report.record.train_rows


def _trial_seconds(report: RoundReport) -> float:
    """Return the total seconds of all attempts, including those that ran in parallel."""
    attempts = (attempt for trial in report.results.trials for attempt in trial.attempts)
    return sum(a.ended_at - a.started_at for a in attempts if a.ended_at is not None)
