"""Format numbers, names, scores, speed, devices and nodes for people."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuner.playbook import results
from tuner.playbook.results import scored_before
from tuner.records import AnswerScore, FinalScore, Hyperparameters, NodeChange, Throughput, Trial, Value

NOTHING = "-"
"""Shown for a missing number."""


def loss(number: float | None) -> str:
    """Format a loss with four decimals, fewer if it is large; also nan and inf."""
    if number is None:
        return NOTHING
    if not math.isfinite(number):
        return str(number)
    return f"{number:.4f}" if abs(number) < 1000 else f"{number:.3g}"


def value(setting: Value | None) -> str:
    """Format a hyperparameter's value for a column: 0.00032, 1e-5, true, q_proj,v_proj.

    Of full names of layers, as PEFT writes them, only the ends are shown, and how many there are.
    """
    match setting:
        case None:
            return NOTHING
        case bool():
            return str(setting).lower()
        case float():
            return number(setting)
        case tuple() if any("." in str(part) for part in setting):
            ends = dict.fromkeys(str(part).rpartition(".")[2] for part in setting)
            return f"{','.join(ends)} ({len(setting)} layers)"
        case tuple():
            return ",".join(map(str, setting))
        case _:
            return str(setting)


def number(quantity: float, digits: int = 3) -> str:
    """Format a number to significant digits without a padded exponent: 1e-5, not 1e-05."""
    text = f"{quantity:.{digits}g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


def percent(share: float) -> str:
    """Format a share as in the findings: 12%, 0.34%."""
    return results.percent(share) if math.isfinite(share) else NOTHING


def duration(seconds: float) -> str:
    """Format seconds in suitable units: 3 h 05 min, 42 min, 4 min 10 s, 12 s."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if minutes >= 10 or (minutes and not rest):
        return f"{minutes} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def moment(at: float) -> str:
    """Format a time, in seconds since the epoch, by this machine's clock: 2026-11-29 05:12:03."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def size(num_bytes: float) -> str:
    """Format bytes in decimal units: 98 MB, 1.4 GB."""
    scaled, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while scaled >= 1000 and len(units) > 1:
        scaled, units = scaled / 1000, units[1:]
    return f"{scaled:.0f} {units[0]}" if scaled >= 10 or units[0] == "B" else f"{scaled:.1f} {units[0]}"


def count(quantity: int, noun: str) -> str:
    """Format a number with its noun: 1 trial, 1,200 trials."""
    return results.counted(quantity, noun)


def goal_label(goal: str) -> str:
    """Return what introduces a study's goal, which need not be a question."""
    return "You asked" if goal.rstrip().endswith("?") else "Goal"


def varying(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Return the hyperparameters that vary between trials, including the seed, in the trials' order."""
    settings = [trial.hyperparameters for trial in trials]
    names = dict.fromkeys(name for own in dict.fromkeys(map(tuple, settings)) for name in own)
    return tuple(name for name in names if len({own.get(name) for own in settings}) > 1)


def settings(hyperparameters: Hyperparameters, names: Sequence[str]) -> str:
    """Format hyperparameters on one line: `learning_rate 0.0003, lora_r 16`."""
    known = [name for name in names if name in hyperparameters]
    return ", ".join(f"{name} {value(hyperparameters[name])}" for name in known)


def counts(by_state: Mapping[str, int]) -> str:
    """Format the number of trials in each state that has any: `6 complete, 2 infeasible`."""
    return ", ".join(f"{n} {state}" for state, n in by_state.items() if n) or "none"


ANSWERS_HEADER = "answers"
"""Header of a column of answer scores."""


def answer_score(score: AnswerScore | None) -> str:
    """Format the mean and its standard error: 0.42 ± 0.07."""
    if score is None:
        return NOTHING
    mean = number(score.mean)
    return mean if score.standard_error is None else f"{mean} ± {number(score.standard_error)}"


def answers_in_words(score: AnswerScore) -> str:
    """Format a score with its metric: `0.42 ± 0.07, the mean of 50 answers by exact_match`."""
    return f"{answer_score(score)}, the mean of {count(score.num_examples, 'answer')} by {score.metric}"


def final_score(score: FinalScore) -> str:
    """Format the loss on `data.test` and its standard error."""
    if score.standard_error is None:
        return loss(score.loss)
    return f"{loss(score.loss)} ± {loss(score.standard_error)}"


def final_in_words(trial: Trial, scored: Sequence[Trial]) -> str:
    """Describe a trial's loss on `data.test` and whether it is unbiased; `scored` are all scored trials."""
    score = trial.final_score
    assert score is not None
    rows, before = count(score.num_examples, "row"), scored_before(trial, scored)
    if not before:
        return f"On data.test ({rows}, not used for any choice), its loss is {final_score(score)}."
    others = ", ".join(other.name for other in before)
    return (
        f"On data.test ({rows}), its loss is {final_score(score)}. This is no longer unbiased: {others} "
        "had been scored on the same rows, and the best of several scores is optimistic."
    )


@dataclass(frozen=True, slots=True)
class GpuReading:
    """Format one GPU's current use by all processes."""

    index: int
    """Index among the devices that workers see."""
    name: str
    used_bytes: int
    total_bytes: int
    utilisation: float | None
    """Recent utilisation, 0 to 1; None if the driver does not report it."""


def place(environment: Mapping[str, str]) -> str:
    """Return where an attempt runs, from its environment: `node1 GPU 0`; empty on this machine."""
    gpu = f" GPU {environment['gpu']}" if "gpu" in environment else ""
    return f"{environment['node']}{gpu}" if "node" in environment else ""


def node_change(change: NodeChange) -> str:
    """Return what became of a node, to follow its name: `joined: 1 GPU`. A reason may have many lines."""
    match change.change:
        case "joined":
            return f"joined: {count(change.gpus, 'GPU')}"
        case "lost":
            return "left the cluster"
        case "left_out":
            return f"is left out: {change.reason}"


def gpu_line(reading: GpuReading) -> str:
    """`GPU 0  61.3 GB of 150 GB (41%), 97% busy  NVIDIA H200`."""
    share = percent(reading.used_bytes / reading.total_bytes) if reading.total_bytes else "?"
    busy = "" if reading.utilisation is None else f", {percent(reading.utilisation)} busy"
    used = f"{size(reading.used_bytes)} of {size(reading.total_bytes)} ({share})"
    return f"GPU {reading.index}  {used}{busy}  {reading.name}"


THROUGHPUT_HEADERS = ("measure", "value", "what it is")
_MEANINGS = {
    "tokens/s": "training tokens per second of a worker's training time",
    "trial-steps/s": "updates of all trials per second of a worker's training time",
    "packing factor": "average number of trials in a training pass",
    "padding": "share of the tokens computed in training",
    "evaluation": "share of the time for training, evaluation and saving",
    "peak memory": "maximum over the workers",
}


def throughput_rows(
    throughput: Throughput | None,
    nodes: Mapping[str, Throughput] | None = None,
    changes: Sequence[NodeChange] = (),
) -> list[tuple[str, str, str]]:
    """Return each number with its name and meaning, under `THROUGHPUT_HEADERS`.

    `nodes` are a cluster's, and `changes` what became of them.
    """
    became = {change.node: "; " + node_change(change).partition("\n")[0] for change in changes}
    values = {} if throughput is None else _throughput_values(throughput)
    rows = [(name, value, _MEANINGS[name]) for name, value in values.items()]
    steps = max(1, 0 if throughput is None else throughput.trial_steps)
    for node, part in (nodes or {}).items():
        if (rate := _rate(part.tokens_per_second)) is not None:
            share = percent(part.trial_steps / steps)
            meaning = f"of a worker there; {share} of all updates{became.get(node, '')}"
            rows.append((f"tokens/s on {node}", rate, meaning))
    return rows


def throughput_line(throughput: Throughput) -> str:
    """Format the same numbers on one line."""
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
