"""How numbers, names, scores, speed and devices look in everything people read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuner.playbook import results
from tuner.playbook.scores import scored_before
from tuner.records import AnswerScore, FinalScore, Hyperparameters, Throughput, Trial, Value

NOTHING = "-"
"""Shown where there is no number."""


def loss(number: float | None) -> str:
    """A loss with four decimals, fewer where it is large; nan and inf are named."""
    if number is None:
        return NOTHING
    if not math.isfinite(number):
        return str(number)
    return f"{number:.4f}" if abs(number) < 1000 else f"{number:.3g}"


def value(setting: Value | None) -> str:
    """A hyperparameter's value, short enough for a column: 0.00032, 1e-5, true, q_proj,v_proj."""
    match setting:
        case None:
            return NOTHING
        case bool():
            return str(setting).lower()
        case float():
            return number(setting)
        case tuple():
            return ",".join(map(str, setting))
        case _:
            return str(setting)


def number(quantity: float, digits: int = 3) -> str:
    """A number with so many significant digits and no padded exponent: 1e-5, not 1e-05."""
    text = f"{quantity:.{digits}g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


def percent(share: float) -> str:
    """A share as the findings write it: 12%, 0.34%."""
    return results.percent(share) if math.isfinite(share) else NOTHING


def duration(seconds: float) -> str:
    """Seconds in the units that matter: 3 h 05 min, 42 min, 4 min 10 s, 12 s."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if minutes >= 10 or (minutes and not rest):
        return f"{minutes} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(num_bytes: float) -> str:
    """Bytes in decimal units: 98 MB, 1.4 GB."""
    scaled, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while scaled >= 1000 and len(units) > 1:
        scaled, units = scaled / 1000, units[1:]
    return f"{scaled:.0f} {units[0]}" if scaled >= 10 or units[0] == "B" else f"{scaled:.1f} {units[0]}"


def count(quantity: int, noun: str) -> str:
    """A number with its noun: 1 trial, 1,200 trials."""
    return results.counted(quantity, noun)


def varying(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Hyperparameters that are not the same in all trials, the seed included, in the trials' order."""
    names = {name: None for trial in trials for name in trial.hyperparameters}
    return tuple(name for name in names if len({trial.hyperparameters.get(name) for trial in trials}) > 1)


def settings(hyperparameters: Hyperparameters, names: Sequence[str]) -> str:
    """Some hyperparameters on one line: `learning_rate 0.0003, lora_r 16`."""
    known = [name for name in names if name in hyperparameters]
    return ", ".join(f"{name} {value(hyperparameters[name])}" for name in known)


def counts(by_state: Mapping[str, int]) -> str:
    """How many trials are in each state, those without any left out: `6 complete, 2 infeasible`."""
    return ", ".join(f"{n} {state}" for state, n in by_state.items() if n) or "none"


ANSWERS_HEADER = "answers"
"""Of a column of answer scores."""


def answer_score(score: AnswerScore | None) -> str:
    """The mean and its standard error: 0.42 ± 0.07."""
    if score is None:
        return NOTHING
    mean = number(score.mean)
    return mean if score.standard_error is None else f"{mean} ± {number(score.standard_error)}"


def answers_in_words(score: AnswerScore) -> str:
    """The same with what it is the mean of: `0.42 ± 0.07, the mean of 50 answers by exact_match`."""
    return f"{answer_score(score)}, the mean of {count(score.num_examples, 'answer')} by {score.metric}"


def final_score(score: FinalScore) -> str:
    """The loss on `data.test` and its standard error."""
    if score.standard_error is None:
        return loss(score.loss)
    return f"{loss(score.loss)} ± {loss(score.standard_error)}"


def final_in_words(trial: Trial, scored: Sequence[Trial]) -> str:
    """A scored trial's loss on `data.test`, and whether it is unbiased; `scored` are all of the study's."""
    score = trial.final_score
    assert score is not None
    rows, before = count(score.num_examples, "row"), scored_before(trial, scored)
    if not before:
        return f"On data.test, {rows} that nothing was chosen by, its loss is {final_score(score)}."
    others = ", ".join(other.name for other in before)
    return (
        f"On data.test, {rows}, its loss is {final_score(score)}. That is no longer unbiased: {others} had a "
        "score on them before, and the better of several is optimistic."
    )


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU at one moment, whoever uses it."""

    index: int
    """Among those that workers see."""
    name: str
    used_bytes: int
    total_bytes: int
    utilisation: float | None
    """Part of the last moments in which it computed, 0 to 1; None where the driver does not say."""


def gpu_line(reading: GpuReading) -> str:
    """`GPU 0  61.3 GB of 150 GB (41%), 97% busy  NVIDIA H200`."""
    share = percent(reading.used_bytes / reading.total_bytes) if reading.total_bytes else "?"
    busy = "" if reading.utilisation is None else f", {percent(reading.utilisation)} busy"
    used = f"{size(reading.used_bytes)} of {size(reading.total_bytes)} ({share})"
    return f"GPU {reading.index}  {used}{busy}  {reading.name}"


THROUGHPUT_HEADERS = ("measure", "value", "what it is")
_MEANINGS = {
    "tokens/s": "trained on, in a second of a worker's training",
    "trial-steps/s": "updates of all trials, in the same second",
    "packing factor": "trials that share a training pass, on average",
    "padding": "of the tokens computed in training",
    "evaluation": "of the time of training, evaluation and saving",
    "peak memory": "of the worker that used most",
}


def throughput_rows(throughput: Throughput | None) -> list[tuple[str, str, str]]:
    """Each number with its name and what it is of, under `THROUGHPUT_HEADERS`."""
    values = {} if throughput is None else _throughput_values(throughput)
    return [(name, value, _MEANINGS[name]) for name, value in values.items()]


def throughput_line(throughput: Throughput) -> str:
    """The same numbers on one line."""
    units = ("tokens/s", "trial-steps/s")
    values = _throughput_values(throughput).items()
    return ", ".join(f"{value} {name}" if name in units else f"{name} {value}" for name, value in values)


def _throughput_values(throughput: Throughput) -> dict[str, str]:
    values = {
        "tokens/s": _rate(throughput.tokens_per_second),
        "trial-steps/s": _rate(throughput.trial_steps_per_second),
        "packing factor": _rate(throughput.packing_factor),
        "padding": _share(throughput.padding_share),
        "evaluation": _share(throughput.evaluation_share),
        "peak memory": size(throughput.peak_memory_bytes),
    }
    return {name: value for name, value in values.items() if value is not None}


def _rate(rate: float | None) -> str | None:
    if rate is None:
        return None
    return f"{rate:,.0f}" if rate >= 100 else number(rate)


def _share(share: float | None) -> str | None:
    return None if share is None else percent(share)
