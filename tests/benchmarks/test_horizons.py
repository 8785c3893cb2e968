"""Recorded runs become rounds with the right answers, and what is said of them is counted right."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.methods.table import seed_of
from tuner.playbook import Diagnosis

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LLAMA_RUNS = Path(__file__).parents[3] / "shared" / "data" / "horizons" / "llama_runs.json.gz"
EVERY = 100


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def at_constant_rate(step: int) -> float:
    """Loss of a run that does not decay."""
    return 2.0 + 4.0 * (step + 100) ** -0.3


def entry(
    schedule: str, horizon: int, *, share: float = 0.0, offset: float = 0.0, **other: Any
) -> dict[str, Any]:
    """An object of the file. A decayed run ends 5% below the stable phase, and `offset` above all that."""
    begins = round(horizon * (1 - share))
    first = other.pop("first_step", 0)
    curve = []
    for step in range(first, horizon + 1, EVERY):
        lowered = 0.05 * (
            max(0, step - begins) / max(1, horizon - begins) if schedule == "linear" else step / horizon
        )
        factor = 1.0 if schedule == "constant" else 1.0 - lowered
        curve.append([step, at_constant_rate(step) * factor + offset])
    return {
        "data": "made-up",
        "layers": 2,
        "width": 8,
        "learning_rate": 0.001,
        "schedule": schedule,
        "decay_share": None if schedule == "cosine" else share,
        "max_train_steps": horizon,
        "decay_begins": None if schedule == "cosine" else begins,
        "warmup_steps": 0,
        "batch_size": 10,
        "weight_decay": 0.1,
        "seed": 0,
        "data_seed": "1",
        "first_step": first,
        "curve": curve,
    } | other


def loss(made: dict[str, Any]) -> float:
    return min(loss for _, loss in made["curve"])


def cases_of(*entries: dict[str, Any]) -> list[Any]:
    from longer.cases import cases
    from longer.runs import assemble_runs

    return list(cases(assemble_runs(entries).runs))


# --- runs -----------------------------------------------------------------------------------------


def test_a_branched_run_begins_with_the_constant_run_that_it_left() -> None:
    from longer.runs import assemble_runs

    others = [entry("constant", 4000, offset=offset) for offset in (0.02, 0.0, -0.02)]
    branched = entry("linear", 2000, share=0.2, first_step=1600)
    run = assemble_runs([*others, branched]).runs[-1]
    assert [step for step, _ in run.curve] == list(range(0, 2001, EVERY))
    assert dict(run.curve) == {
        step: pytest.approx(at_constant_rate(step)) for step in range(0, 1600, EVERY)
    } | dict(branched["curve"])
    assert (run.decay_steps, run.share) == (400, 0.2)


@pytest.mark.parametrize(
    "others", [[], [entry("constant", 1000)], [entry("constant", 4000, seed=1)], [entry("cosine", 4000)]]
)
def test_a_branched_run_without_its_stable_phase_is_left_out_and_named(others: list[dict[str, Any]]) -> None:
    from longer.runs import assemble_runs

    found = assemble_runs([*others, entry("linear", 2000, share=0.2, first_step=1600)])
    assert len(found.runs) == len(others)
    assert len(found.left_out) == 1
    assert "1600" in found.left_out[0]


def test_a_step_that_an_interrupted_run_evaluated_again_counts_once() -> None:
    from longer.runs import assemble_runs

    made = entry("cosine", 1000)
    again = made | {"curve": [*made["curve"][:3], [200, 9.0], *made["curve"][3:]]}
    curve = assemble_runs([again]).runs[0].curve
    assert [step for step, _ in curve] == list(range(0, 1001, EVERY))
    assert dict(curve)[200] == 9.0


@pytest.mark.parametrize("text", [b"", b"[1]", b"{}x", b'[{"schedule": "cosine"}]'])
def test_a_file_of_something_else_is_named(tmp_path: Path, text: bytes) -> None:
    from longer.runs import UnreadableRuns, load_runs

    path = tmp_path / "runs.json.gz"
    path.write_bytes(gzip.compress(text) if text else b"no gzip")
    with pytest.raises(UnreadableRuns, match=r"runs\.json\.gz"):
        load_runs(path)


# --- pairs ----------------------------------------------------------------------------------------

OTHER = {
    "data": "other",
    "layers": 3,
    "width": 16,
    "learning_rate": 0.002,
    "warmup_steps": 10,
    "batch_size": 20,
    "weight_decay": 0.0,
    "seed": 1,
    "data_seed": "2",
}


@pytest.mark.parametrize("name", [None, *OTHER])
def test_runs_of_another_family_are_no_answer(name: str | None) -> None:
    changed = {} if name is None else {name: OTHER[name]}
    found = cases_of(entry("cosine", 1000), entry("cosine", 2000, **changed))
    assert len(found) == (1 if name is None else 0)


@pytest.mark.parametrize(("longer", "answers"), [(1200, 0), (1300, 1), (2000, 1), (3400, 1), (3600, 0)])
def test_horizons_stand_at_1_3_to_3_4(longer: int, answers: int) -> None:
    assert len(cases_of(entry("cosine", 1000), entry("cosine", longer))) == answers


@given(st.integers(300, 9000), st.integers(10, 90), st.floats(1.3, 3.4))
def test_equal_shares_are_equal_to_the_rounding_of_steps(horizon: int, percent: int, ratio: float) -> None:
    from longer.runs import Family, Run, is_longer_partner

    def run(steps: int, share: float) -> Any:
        return Run(
            Family("d", 1, 1, 1e-3, 0, 1, 0.0, 0, "1"), "linear", steps, round(steps * share), ((0, 1.0),)
        )

    longer = math.ceil(horizon * ratio) - (ratio > 3.3)
    assert is_longer_partner(run(longer, percent / 100), run(horizon, percent / 100))
    assert not is_longer_partner(run(longer, percent / 100 + 0.02), run(horizon, percent / 100))
    assert not is_longer_partner(run(horizon, percent / 100), run(longer, percent / 100))


# --- rounds and answers ---------------------------------------------------------------------------


def test_a_pair_is_a_round_and_its_answer() -> None:
    short, long = entry("linear", 1000, share=0.2), entry("linear", 2000, share=0.2)
    (case,) = cases_of(long, short)
    assert (case.kind, case.beside, case.shape, case.data) == (
        "one trial",
        "",
        "linear, up to 40%",
        "made-up",
    )
    (trial,) = case.results.trials
    assert (case.results.max_train_steps, case.results.evaluate_every) == (1000, EVERY)
    assert [[e.step, e.eval_loss] for e in trial.evaluations] == short["curve"]
    assert trial.hyperparameters["decay_steps"] == 200
    (answer,) = case.answers
    assert answer.ratio == 2.0
    assert answer.drop == pytest.approx(1 - loss(long) / loss(short))


def test_repeats_of_a_longer_run_are_one_answer() -> None:
    short, *long = entry("cosine", 1000), *(entry("cosine", 2000, offset=o) for o in (-0.1, 0.0, 0.3))
    case = next(case for case in cases_of(short, *long) if case.kind == "one trial")
    (answer,) = case.answers
    assert answer.drop == pytest.approx(1 - sum(map(loss, long)) / 3 / loss(short))


def test_a_constant_run_is_its_own_longer_partner() -> None:
    made = entry("constant", 8000)
    found = cases_of(made)
    assert {case.kind for case in found} == {"one trial"}
    assert [case.results.max_train_steps for case in found] == [1000, 1400, 2000, 2800, 4000, 5700]
    for case in found:
        horizon, (trial,) = case.results.max_train_steps, case.results.trials
        assert trial.evaluations[-1].step == horizon
        for answer in case.answers:
            assert answer.drop == pytest.approx(
                1 - at_constant_rate(round(horizon * answer.ratio)) / at_constant_rate(horizon)
            )
    assert [len(case.answers) for case in found] == [3, 3, 3, 3, 2, 1]


def test_constant_runs_of_one_family_do_not_answer_for_each_other() -> None:
    offsets = (0.0, 0.5)
    found = [
        case
        for case in cases_of(*(entry("constant", 4000, offset=offset) for offset in offsets))
        if case.kind == "one trial" and case.results.max_train_steps == 2000
    ]
    for case, offset in zip(found, offsets, strict=True):
        drop = 1 - (at_constant_rate(4000) + offset) / (at_constant_rate(2000) + offset)
        assert case.answers[-1].ratio == 2.0
        assert case.answers[-1].drop == pytest.approx(drop)


def test_a_shorter_run_is_a_comparison_run_or_an_earlier_round() -> None:
    from tuner.playbook.gain import same_configuration

    found = [case for case in cases_of(*(entry("cosine", h) for h in (1000, 2000, 4000))) if case.beside]
    assert [case.beside for case in found] == ["a comparison run", "an earlier round"]
    compared, after = found
    for case in found:
        assert case.results.max_train_steps == 2000
        assert [answer.ratio for answer in case.answers] == [2.0]
    (branch,) = compared.results.branches
    assert (branch.trial, branch.max_train_steps, branch.evaluations[-1].step) == (0, 1000, 1000)
    assert not compared.earlier
    assert not after.results.branches
    (earlier,) = after.earlier
    assert (earlier.max_train_steps, earlier.workload) == (1000, after.results.workload)
    assert same_configuration(earlier.trials[0], after.results.trials[0])


def test_both_are_an_earlier_round_below_the_comparison_run() -> None:
    found = cases_of(*(entry("cosine", h) for h in (1000, 2000, 4000, 8000)))
    (case,) = [case for case in found if case.beside == "both"]
    horizons = (case.earlier[0].max_train_steps, case.results.branches[0].max_train_steps)
    assert (*horizons, case.results.max_train_steps) == (1000, 2000, 4000)


def test_several_trials_are_answered_for_the_best() -> None:
    from tuner.playbook.gain import same_configuration

    rates = {0.001: 0.1, 0.002: 0.0, 0.004: 0.2}
    made = [
        entry("cosine", horizon, learning_rate=rate, offset=offset)
        for horizon in (1000, 2000, 4000)
        for rate, offset in rates.items()
    ]
    found = [case for case in cases_of(*made) if case.kind == "several trials"]
    assert [(case.results.max_train_steps, case.beside) for case in found] == [
        (1000, ""),
        (2000, ""),
        (2000, "a comparison run"),
        (2000, "an earlier round"),
    ]
    for case in found:
        assert [t.hyperparameters["learning_rate"] for t in case.results.trials] == list(rates)
    assert found[1].answers[0].drop == pytest.approx(1 - loss(made[7]) / loss(made[4]))
    assert found[2].results.branches[0].trial == 1
    assert same_configuration(found[3].earlier[0].trials[0], found[3].results.trials[1])


def test_repeats_in_one_round_have_seeds_of_their_own() -> None:
    from tuner.playbook.gain import same_configuration

    repeated = [entry("cosine", 2000, offset=o) for o in (0.1, 0.0, 0.2)]
    found = cases_of(entry("cosine", 1000), *repeated, entry("cosine", 4000))
    alone, compared, after = (case for case in found if case.kind == "several trials")
    assert [seed_of(trial.hyperparameters) for trial in alone.results.trials] == [0, 1, 2]
    assert compared.results.branches[0].trial == 1
    assert same_configuration(after.earlier[0].trials[0], after.results.trials[1])


def test_at_most_eight_runs_are_a_round() -> None:
    made = [
        entry("cosine", horizon, learning_rate=0.001 * n) for horizon in (1000, 2000) for n in range(1, 12)
    ]
    (case,) = [case for case in cases_of(*made) if case.kind == "several trials"]
    assert len(case.results.trials) == 8


def test_schedules_mix_in_a_round_and_a_constant_run_is_cut_for_it() -> None:
    decayed = [entry("linear", h, share=0.2) for h in (1000, 2000)]
    found = cases_of(*decayed, entry("cosine", 1000, offset=1.0), entry("constant", 4000))
    (case,) = [
        case for case in found if case.kind == "mixed schedules" and case.results.max_train_steps == 1000
    ]
    assert {t.hyperparameters["schedule"] for t in case.results.trials} == {"linear", "cosine", "constant"}
    assert {t.evaluations[-1].step for t in case.results.trials} == {1000}
    assert case.shape == "linear, up to 40%"
    assert case.answers[0].drop == pytest.approx(1 - loss(decayed[1]) / loss(decayed[0]))


# --- what is said ---------------------------------------------------------------------------------


def outcome(
    diagnosis: Diagnosis, suggested: int | None, drops: list[float], predicted: list[float] | None
) -> Any:
    from longer.cases import Answer, Case
    from longer.outcomes import Outcome

    case = cases_of(entry("cosine", 1000), entry("cosine", 2000))[0]
    answers = tuple(Answer(2.0, drop, noise=0.008) for drop in drops)
    made = Case(case.kind, "", case.shape, case.data, case.results, (), answers)
    return Outcome(made, diagnosis, suggested, "somewhere", None if predicted is None else tuple(predicted))


@pytest.mark.parametrize(
    ("diagnosis", "suggested", "drops", "is_wrong"),
    [
        (Diagnosis.RIGHT, 1000, [0.05], True),
        (Diagnosis.SATURATED, 500, [0.05], True),
        (Diagnosis.SATURATED, 500, [0.0, 0.05], True),
        (Diagnosis.TOO_LONG, 100, [0.05], True),
        (Diagnosis.OVERFITTING, 400, [0.05], True),
        (Diagnosis.RIGHT, None, [0.05], True),
        (Diagnosis.SATURATED, 500, [0.009], False),
        (Diagnosis.SATURATED, 500, [0.015], False),  # below twice the noise of 0.8%
        (Diagnosis.SATURATED, 1100, [0.05], False),
        (Diagnosis.TOO_SHORT, 2000, [0.05], False),
        (Diagnosis.UNDETERMINED, 1500, [0.05], False),
        (Diagnosis.SATURATED, 500, [-0.05], False),
    ],
)
def test_a_keep_is_wrong_where_a_longer_run_gained(
    diagnosis: Diagnosis, suggested: int | None, drops: list[float], is_wrong: bool
) -> None:
    assert outcome(diagnosis, suggested, drops, None).is_wrong_keep is is_wrong


def test_predictions_are_counted_for_each_answer_and_those_not_given_apart() -> None:
    from longer.outcomes import tally

    counted = tally(
        [
            outcome(Diagnosis.TOO_SHORT, 2000, [0.03, 0.02], [0.045, 0.031]),
            outcome(Diagnosis.TOO_SHORT, 2000, [0.03], [0.0201]),
            outcome(Diagnosis.TOO_SHORT, 2000, [0.03], [0.0199]),
            outcome(Diagnosis.TOO_SHORT, 2000, [-0.01], [0.001]),
            outcome(Diagnosis.UNDETERMINED, 1500, [0.03, 0.04], None),
        ]
    )
    assert (counted.rounds, counted.asked, counted.given, counted.within) == (5, 7, 5, 2)
    assert counted.median == pytest.approx(1.5)


def test_a_curve_of_equal_drops_of_log_loss_is_predicted() -> None:
    """Each doubling brings 0.8 of what the one before did."""
    from longer.outcomes import judge

    def series(step: int) -> float:
        doublings = math.log2(max(step, EVERY) / EVERY)
        return math.exp(1.5 - 0.1 * (1 - 0.8**doublings) / 0.2)

    made = entry("constant", 12_800)
    made["curve"] = [[step, series(step)] for step, _ in made["curve"]]
    for case in cases_of(made):
        said = judge(case)
        assert said.predicted is not None
        for predicted, answer in zip(said.predicted, case.answers, strict=True):
            assert predicted == pytest.approx(answer.drop, rel=0.1)
        assert not said.is_wrong_keep


# --- the script -----------------------------------------------------------------------------------


def run_script(*arguments: str | Path, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "horizons.py"), *map(str, arguments)],
        cwd=directory,
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )


def test_the_script_writes_the_page(tmp_path: Path) -> None:
    made = [entry("constant", 8000), *(entry("cosine", h) for h in (1000, 2000, 4000))]
    made.append(entry("linear", 2000, share=0.2, first_step=1600, seed=5))
    with gzip.open(tmp_path / "runs.json.gz", "wt") as file:
        json.dump(made, file)
    done = run_script("runs.json.gz", "--output", "out/page.md", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "page.md").read_text()
    assert page.strip() == done.stdout.strip()
    assert "4 runs, 1 left out; 14 rounds" in page
    assert "| one trial: constant | 6 | 15 | 15 |" in page
    assert "| one trial with a comparison run: cosine | 1 | 1 | 1 |" in page
    assert "seed=5" in page


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    done = run_script("nothing.json.gz", directory=tmp_path)
    assert done.returncode == 2
    assert "nothing.json.gz" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not LLAMA_RUNS.exists(), reason=f"needs {LLAMA_RUNS}")
def test_the_llama_runs_hold_every_kind_of_round() -> None:
    from longer.cases import cases
    from longer.runs import load_runs

    found = load_runs(LLAMA_RUNS)
    assert (len(found.runs), found.left_out) == (75, ())
    for run in found.runs:
        steps = [step for step, _ in run.curve]
        assert steps[0] == 0
        assert run.max_train_steps - steps[-1] <= 200
        assert max(later - step for step, later in itertools.pairwise(steps)) <= 400
    made = list(cases(found.runs))
    shapes = {case.shape for case in made}
    assert shapes == {"constant", "cosine", "linear, up to 40%", "linear, above 40%"}
    assert {case.beside for case in made} == {"", "a comparison run", "an earlier round", "both"}
    assert {case.data for case in made} == {"slimpajama", "openwebtext2"}
    assert all(-0.01 < answer.drop < 0.1 for case in made for answer in case.answers)


@pytest.mark.skipif(not LLAMA_RUNS.exists(), reason=f"needs {LLAMA_RUNS}")
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.acceptance)])
def test_predictions_hold_on_the_llama_runs_and_no_horizon_is_kept_wrongly(every: int) -> None:
    from longer.cases import cases
    from longer.outcomes import judge, tally
    from longer.runs import load_runs

    outcomes = [judge(case) for case in list(cases(load_runs(LLAMA_RUNS).runs))[::every]]
    counted = tally(outcomes)
    assert counted.given > 300 / every
    assert counted.within >= 0.8 * counted.given
    assert not any(outcome.is_wrong_keep for outcome in outcomes)
