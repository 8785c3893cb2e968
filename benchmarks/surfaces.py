"""tuner's rounds against other tuners on two made-up loss surfaces of LoRA.

python benchmarks/surfaces.py                            both surfaces, 30 seeds, 10 and 17 full runs
python benchmarks/surfaces.py --seeds 3 --surfaces A --methods tuner,tpe --output surfaces.md
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from replay import contest
from replay.task import ReplayOver

from tuner.records import Choices, Hyperparameters, Range
from tuner.study.proposals import distributions
from tuner.study.samplers.points import random_point


@dataclass(frozen=True)
class LoraSurface:
    """A family of noise-free losses; see `losses` for the formula.

    With r, p, b and w for rank, dropout, batch size and warmup steps, and x for the rate in units of the
    best one, `best_rate * (r / 16)^rate_by_rank * (b / 16)^rate_by_batch`.
    """

    name: str
    base_loss: float
    """Of the model before training."""
    floor: float
    """What endless training at an endless rank comes to, without overfitting."""
    power: float
    pace_steps: float
    """What is left to learn falls as (1 + progress)^-power; a step at the best rate is 1 / pace of it."""
    best_rate: float
    rate_by_rank: float
    rate_by_batch: float
    rank_gap: float
    rank_power: float
    """Rank r lacks rank_gap * (r / 8)^-rank_power."""
    gradient_noise: float
    """Loss on top at a constant rate, at x = 1 and batch 16."""
    shock: float
    shock_steps: float
    """A warmup of w leaves shock * x^1.5 * exp(-w / shock_steps) behind, that training slowly heals."""
    harm: float
    """What a rate costs in the long run: harm * x * log(1 + progress)."""
    overfitting: float
    rows: int
    """Epochs beyond the first cost overfitting * (epochs - 1)^1.3, more so with rank, less with dropout."""
    kept_out: float
    """Dropout that takes overfitting down to 1 / e."""
    max_rate: float = 10.0
    """x at which training without warmup diverges."""
    full_steps: int = 1080
    every_steps: int = 20
    evaluation_noise: float = 0.002
    run_noise: float = 0.0015

    def space(self) -> Mapping[str, Range | Choices]:
        """What is searched."""
        return {
            "learning_rate": Range(1e-5, 3e-3, log=True),
            "lora_r": Choices((4, 8, 16, 32, 64)),
            "lora_dropout": Range(0.0, 0.2),
            "warmup_steps": Range(0, 60, integer=True),
            "batch_size": Choices((8, 16, 32)),
        }

    def losses(self, hyperparameters: Hyperparameters, steps: np.ndarray, horizon: int) -> np.ndarray:
        """At each of the steps of a run with a linear decay to its horizon; NaN once it has diverged.

        Before the decay they do not depend on the horizon. The decay is that of `tuner/engines/synthetic.py`.
        """
        rate, rank, dropout, batch, warmup, decay = (
            float(hyperparameters[name])  # type: ignore[arg-type]
            for name in (
                *("learning_rate", "lora_r", "lora_dropout"),
                *("batch_size", "warmup_steps", "decay_steps"),
            )
        )
        x = rate / (self.best_rate * (rank / 16) ** self.rate_by_rank * (batch / 16) ** self.rate_by_batch)
        warming = np.minimum(steps, warmup)
        decaying = np.maximum(0.0, steps - max(warmup, horizon - decay))
        left = 1.0 - decaying / max(1.0, decay)
        learned_in_decay = decay / 1.1 * (1.0 - left**1.1)
        worth = warming**2 / (2.0 * max(1.0, warmup)) + (steps - warming - decaying) + learned_in_decay
        annealed = decaying**2 / (2.0 * max(1.0, decay)) / np.maximum(1.0, steps - warming)

        speed = 3.0 * x / (1.0 + 2.0 * x**1.3) * (batch / 16) ** 0.25 * (1.0 - dropout)
        progress = worth * speed / self.pace_steps
        begun = np.minimum(1.0, progress)
        floor = self.floor + self.rank_gap * (rank / 8) ** -self.rank_power
        learned = (self.base_loss - floor) * (1.0 - (1.0 + progress) ** -self.power)
        noise = self.gradient_noise * x / (1.0 + 0.1 * x) * (16 / batch) ** 0.5 * (1.0 + 2.0 * dropout)
        shock = self.shock * x**1.5 * math.exp(-warmup / self.shock_steps)
        epochs = steps * batch / self.rows
        memorised = (rank / 16) ** 0.4 * min(1.0, x) ** 0.5 * math.exp(-dropout / self.kept_out)
        losses = (
            self.base_loss
            - learned
            + noise * begun / (1.0 + annealed / 0.025)
            + shock * begun * (1.0 + progress) ** -0.3
            + self.harm * x * np.log1p(progress)
            + self.overfitting * memorised * np.maximum(0.0, epochs - 1.0) ** 1.3
        )
        diverges = x > self.max_rate * (1.0 + warmup / 60)
        return np.where(diverges & (steps > 0), np.nan, losses)


A = LoraSurface(
    name="A",
    base_loss=1.9,
    floor=1.05,
    power=0.8,
    pace_steps=70.0,
    best_rate=3e-4,
    rate_by_rank=-0.25,
    rate_by_batch=0.5,
    rank_gap=0.02,
    rank_power=0.7,
    gradient_noise=0.10,
    shock=0.02,
    shock_steps=12.0,
    harm=0.003,
    overfitting=0.003,
    rows=6_000,
    kept_out=0.08,
)
"""Instructions on some thousand rows: learnt fast, overfitted soon, ranks matter little."""

B = LoraSurface(
    name="B",
    base_loss=1.3,
    floor=0.6,
    power=0.5,
    pace_steps=40.0,
    best_rate=1.5e-4,
    rate_by_rank=-0.4,
    rate_by_batch=0.3,
    rank_gap=0.03,
    rank_power=0.6,
    gradient_noise=0.06,
    shock=0.03,
    shock_steps=20.0,
    harm=0.004,
    overfitting=0.002,
    rows=9_000,
    kept_out=0.12,
)
"""Code on more rows: learnt slowly, high ranks pay at lower rates, and a short warmup costs."""

SURFACES = {surface.name: surface for surface in (A, B)}

METHODS: dict[str, contest.Method] = {
    "tuner": contest.rounds(contest.Path()),
    "two-rounds": contest.rounds(contest.Path(divisors=(3, 1), first_trials=16)),
    "tenth-of-16": contest.rounds(contest.Path(divisors=(10, 1), first_trials=16)),
    "optuna-halving": contest.tpe_with_halving,
    "optuna-early-halving": contest.tpe_with_early_halving,
    "tpe": contest.tpe_full_length,
    "quasi-random": contest.quasi_random_full_length,
    "random": contest.random_full_length,
}
"""What is compared, tuner's first."""
REFERENCE = "tuner"
DESCRIPTIONS = {
    "tuner": "the default path: rounds of T/9, T/3 and T steps, the first one of 24 trials, as `study new`, "
    "`study promote` and `study run` make them. What is left of the budget buys trials of the last round, as "
    "raising `search.trials` does.",
    "two-rounds": "the same with rounds of T/3 and T, the first one of 16 trials.",
    "tenth-of-16": "the same with rounds of T/10 and T, the first one of 16 trials.",
    **{
        name: " ".join((method.__doc__ or "").split())
        for name, method in METHODS.items()
        if not isinstance(method, partial)
    },
}
BUDGETS = (10, 17)
"""Full runs."""
TOLERANCE = 0.001
"""How much worse than another, relative to the loss, counts as no worse."""
RESAMPLES = 10_000


class Result(NamedTuple):
    """What one method came to."""

    surface: str
    budget: int
    method: str
    seed: int
    figure: float
    """Noise-free loss at full length of the configuration named best."""
    spent: int
    """Steps."""
    num_full: int
    """Runs that came to full length."""


class Job(NamedTuple):
    """One contest to run."""

    surface: str
    budget: int
    method: str
    seed: int


def run_job(job: Job) -> Result:
    """Run one method until its budget is spent."""
    surface = SURFACES[job.surface]
    ledger = contest.Contest(surface, job.seed, job.budget)
    with contextlib.suppress(ReplayOver):
        METHODS[job.method](ledger)
    num_full = sum(run.horizon == surface.full_steps for run in ledger.ended)
    return Result(*job, ledger.figure(), ledger.spent, num_full)


def main() -> int:
    arguments = _arguments()
    begun = time.monotonic()
    jobs = [
        Job(surface, budget, method, seed)
        for seed in range(arguments.seeds)
        for surface in arguments.surfaces
        for budget in BUDGETS
        for method in arguments.methods
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        results = pool.map(run_job, jobs, chunksize=4)
    text = markdown(results, command=_command(arguments), minutes=(time.monotonic() - begun) / 60)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)
    print(text)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=30, help="contests of a method on a surface")
    parser.add_argument("--surfaces", type=_names(SURFACES), default=list(SURFACES))
    parser.add_argument("--methods", type=_names(METHODS), default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--output", type=Path, help="the Markdown, which is printed anyway")
    return parser.parse_args()


def _names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expects names of {', '.join(known)}")
        return names

    return chosen


def _command(arguments: argparse.Namespace) -> str:
    chosen = "".join(
        f" --{name} {','.join(getattr(arguments, name))}"
        for name, known in (("surfaces", SURFACES), ("methods", METHODS))
        if getattr(arguments, name) != list(known)
    )
    return f"python benchmarks/surfaces.py --seeds {arguments.seeds}{chosen}"


def markdown(results: Sequence[Result], *, command: str, minutes: float) -> str:
    """The page: a table for each surface and budget, then the methods."""
    lines = [
        "# Made-up surfaces of LoRA: the loss of what is named best, at equal steps",
        "",
        "Noise-free loss after T steps of the configuration that a method names best, once it has spent",
        "10 or 17 times T steps; restarts and comparison runs are charged. Means over seeds. Differences",
        "are paired and relative to tuner's loss, with 95% bootstrap intervals over seeds: above 0, tuner",
        "is better. The horizons of tuner's rounds are given, as by `promote --max-train-steps`. Defaults",
        "were chosen on A, and are judged on B.",
        "",
    ]
    for surface in dict.fromkeys(result.surface for result in results):
        for budget in dict.fromkeys(result.budget for result in results):
            here = [r for r in results if (r.surface, r.budget) == (surface, budget)]
            lines += [f"## Surface {surface}, {budget} full runs", "", *_table(here), ""]
    methods = dict.fromkeys(result.method for result in results)
    lines += ["## The methods", "", *(f"- **{name}**: {DESCRIPTIONS[name]}" for name in methods), ""]
    lines += [
        f"Best known losses: {_best_known(results)}.",
        "",
        f"`{command}`, {_machine()}, {minutes:.0f} minutes.",
        "",
    ]
    return "\n".join(lines)


def _table(results: Sequence[Result]) -> list[str]:
    by_method: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        by_method.setdefault(result.method, []).append(result)
    lines = [
        f"| method | seeds | loss | above {REFERENCE}'s | steps spent | full runs |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in by_method.items():
        mean = float(np.mean([result.figure for result in found]))
        spent = float(np.mean([result.spent for result in found]))
        full = float(np.mean([result.num_full for result in found]))
        above = "" if name == REFERENCE else _above(by_method.get(REFERENCE, []), found)
        lines.append(f"| {name} | {len(found)} | {mean:.4f} | {above} | {spent:.0f} | {full:.1f} |")
    return lines


def _above(reference: Sequence[Result], found: Sequence[Result]) -> str:
    if len(reference) != len(found):
        return "-"
    mean, low, high = paired_excess([r.figure for r in found], [r.figure for r in reference])
    verdict = "" if mean >= 0 else ", no worse" if mean >= -TOLERANCE else ", **worse**"
    return f"{mean:+.2%} ({low:+.2%} to {high:+.2%}){verdict}"


def paired_excess(losses: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """How far losses lie above the reference's, relative to these: mean, and 95% of the bootstrap by seed."""
    excess = np.array(losses) / np.array(reference) - 1
    drawn = np.random.default_rng(0).integers(len(excess), size=(RESAMPLES, len(excess)))
    low, high = np.percentile(excess[drawn].mean(axis=1), [2.5, 97.5])
    return float(excess.mean()), float(low), float(high)


def _best_known(results: Sequence[Result]) -> str:
    """The lowest noise-free losses of 20,000 random points, for the scale."""
    found = []
    for name in dict.fromkeys(result.surface for result in results):
        random = np.random.default_rng(0)
        points = (random_point(distributions(SURFACES[name].space()), random) for _ in range(20_000))
        losses = [contest.true_loss(SURFACES[name], point) for point in points]
        found.append(f"{name} {np.nanmin(losses):.4f}")
    return ", ".join(found) + " (of 20,000 random points)"


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
