"""`study promote` on the facts of a round: what the next file says, and that it says what is so."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.playbook.rows import exact
from tests.studies import round_file, silent_view
from tuner.cli.output import promotion_text
from tuner.config import RoundFile, load_round, read_round
from tuner.data import TABLE_VERSION
from tuner.engines import SimulatedWorker
from tuner.errors import CheckpointError, InputError, TunerError
from tuner.records import (
    Assignment,
    Evaluation,
    Fixed,
    Hyperparameters,
    Started,
    complete_hyperparameters,
)
from tuner.report import open_view
from tuner.study.continuation import Continuations
from tuner.study.dashboard import lineage
from tuner.study.folder import open_folder
from tuner.study.plan import RoundPlan
from tuner.study.promotion import Overrides, PromotedRound, promote, recordable, write_round_file
from tuner.study.run import run_round

RATES = "[1e-3, 2e-3, 3e-3, 5e-3, 8e-3, 1e-2]"


def falling(hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
    """A loss that is far from its end, lowest for a rate of 5e-3."""
    distance = abs(math.log10(float(hyperparameters["learning_rate"]) / 5e-3))  # type: ignore[arg-type]
    return exact(step, 4.0 - math.log1p(step * (1.2 - 0.1 * distance)), train_loss=1.0 if step else None)


def faster_with_the_rate(hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
    """A loss that falls faster the higher the rate is, without end."""
    rate = float(hyperparameters["learning_rate"])  # type: ignore[arg-type]
    return exact(step, 4.0 - math.log1p(step * (1 + 10 * rate)), train_loss=1.0 if step else None)


def rising(hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
    """The untouched model stays the best."""
    return Evaluation(step, 2.0 + step / 100, train_loss=1.0 if step else None)


def run(
    file: RoundFile,
    curve: Callable[[Hyperparameters, int, int], Evaluation] = falling,
    worker: type[SimulatedWorker] = SimulatedWorker,
    view: Any = None,
) -> None:
    run_round(
        file,
        make_worker=lambda plan, base: worker(curve, slots=3),
        view=view or silent_view(),
        stopping=lambda: False,
    )


def first_round(directory: Path, **changes: Any) -> RoundFile:
    return round_file(
        directory,
        **{
            "learning_rate": RATES,
            "lora_r": "2",
            "trials": 6,
            "sampler": "grid",
            "run": "run: {production_steps: 40}",
            **changes,
        },
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round of 6 trials of 8 steps, 3 of them decaying."""
    directory = tmp_path_factory.mktemp("study")
    run(first_round(directory))
    return directory


def promoted(
    directory: Path, *, to: str = "round2", source: str | None = "round1", **overrides: Any
) -> PromotedRound:
    folder = open_folder(directory)
    store = folder.open()
    try:
        return promote(
            folder,
            store,
            to=to,
            from_round=source,
            overrides=Overrides(**overrides),
            force=True,
            clock=lambda: 0.0,
        )
    finally:
        store.close()


def comment(done: PromotedRound, key: str) -> str:
    """What the written file says beside a key."""
    (line,) = [line for line in done.path.read_text().splitlines() if line.strip().startswith(f"{key}:")]
    return line.partition("#")[2].strip()


def test_each_changed_line_says_why(study: Path) -> None:
    done = promoted(study)
    assert load_round(done.path).spec.max_train_steps == 24
    assert comment(done, "max_train_steps") == "8 in round1"
    assert comment(done, "trials") == "3 enqueued, the rest new: fewer, longer runs"
    assert comment(done, "decay_steps") == "rescaled: the same share of the run as before, 38%"
    assert "--" not in done.path.read_text()
    assert "3 of round2's 5 trials are carried over; all 3 resume from a checkpoint." in promotion_text(
        done.document
    )


def test_higher_rates_come_first_and_nothing_else_changes(tmp_path: Path) -> None:
    file = first_round(tmp_path)
    run(file, faster_with_the_rate)
    done = promoted(tmp_path)
    before, after = (text.splitlines() for text in (file.text, done.path.read_text()))
    keys = {line.partition(":")[0].strip() for line in after if line not in before}
    entries = {key for key in keys if key.startswith("-")}
    assert keys - entries == {"round", "learning_rate", "trials", "sampler", "enqueue"}
    assert load_round(done.path).spec.space()["learning_rate"].contains(0.1)
    assert "10 times" in comment(done, "learning_rate")
    assert all(entry.from_step == 8 for entry in done.next_round.enqueue), "complete facts"
    run(load_round(done.path), faster_with_the_rate)
    third = promoted(tmp_path, to="round3", source=None)
    assert third.next_round.max_train_steps == 8
    assert load_round(third.path).spec.space()["learning_rate"].contains(1.0)
    run(load_round(third.path), faster_with_the_rate)
    fourth = promoted(tmp_path, to="round4", source=None)
    assert fourth.next_round.max_train_steps > 8, "twice at most"


def test_a_cosine_file_never_speaks_of_decay_steps(tmp_path: Path) -> None:
    file = first_round(tmp_path, schedule="cosine", steps=44, trials=3, run="")
    file.path.write_text(re.sub(r"  decay_steps: .*\n", "", file.text))
    run(load_round(file.path))
    done = promoted(tmp_path, max_train_steps=66)
    assert "decay_steps" not in done.path.read_text()
    assert "decay_steps" not in promotion_text(done.document)


def adamw_is_better(hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
    """As `falling`, and worse with any other optimizer."""
    worse = 0.0 if hyperparameters["optimizer"] == "adamw" else 0.5
    return exact(
        step, 4.0 - math.log1p(step) / 2 + (worse if step else 0.0), train_loss=1.0 if step else None
    )


def test_what_only_a_dropped_optimizer_knows_leaves_the_file(tmp_path: Path) -> None:
    file = first_round(
        tmp_path, optimizer="[adamw, lion]", learning_rate="1e-3", lora_r="[2, 4, 8, 16, 32]", trials=15
    )
    text = file.text.replace("search:\n", "  adam_beta1: 0.8\n  lion_beta1: [0.9, 0.95]\nsearch:\n")
    file.path.write_text(text)
    run(load_round(file.path), adamw_is_better)
    done = promoted(tmp_path, max_train_steps=16)
    spec = load_round(done.path).spec
    assert spec.hyperparameters["optimizer"] == "adamw"
    assert "lion_beta1" not in done.path.read_text()
    assert spec.space()["adam_beta1"] == Fixed(0.8)
    assert all("lion_beta1" not in entry for entry in spec.search.enqueue)
    assert [e.from_step for e in done.next_round.enqueue] == [5, 5, 5]


def test_a_horizon_that_the_user_did_not_set_says_why_it_is_another(study: Path) -> None:
    suggested = promoted(study, max_train_steps=24, reason="because")
    assert comment(suggested, "max_train_steps") == "8 in round1"
    bounded = promoted(study, max_train_steps=20, reason="at most 9 times the first horizon")
    assert comment(bounded, "max_train_steps") == "8 in round1: at most 9 times the first horizon"


def test_an_added_idea_is_tried_beside_the_incumbents_that_go_on(study: Path) -> None:
    done = promoted(study, add=("weight_decay=1e-3,1e-2", "lora_dropout=0:0.2"))
    spec = load_round(done.path).spec
    assert spec.space()["weight_decay"].contains(0.0)
    assert comment(done, "weight_decay").startswith("added by --add")
    assert comment(done, "lora_dropout") == "added by --add"
    assert [(e["weight_decay"], e["lora_dropout"]) for e in spec.search.enqueue] == [(0.0, 0.1)] * 3
    assert [e.from_step for e in done.next_round.enqueue] == [5, 5, 5]
    written = done.document["hyperparameters"]["weight_decay"]
    assert (written["from"], set(written["to"])) == (0, {0, 1e-3, 1e-2})


@pytest.mark.parametrize(
    "wrong",
    [
        "lora_dropout",
        "lora_dropout=",
        "=1",
        "lora_dropot=0.1",
        "lora_dropout=0.1",
        "lora_dropout=0,1.5",
        "lora_dropout=a",
        "lora_dropout=0:0.1:lin",
        "weight_decay=0:0.1:log",
        "weight_decay=0.2:0.1",
        "weight_decay=[",
        "weight_decay=1,1",
        "learning_rate=1e-3,1e-2",
        "batch_size=4,8",
        "max_train_steps=5,9",
        "optimizer=adamw:adamw_8bit",
        "warmup_steps=1.5,2",
        "decay_steps=500",
    ],
)
def test_what_cannot_be_added_is_refused_and_nothing_is_written(study: Path, wrong: str) -> None:
    with pytest.raises(InputError) as caught:
        promoted(study, to="refused", add=(wrong,))
    assert not (study / "refused.yaml").exists()
    if not wrong.startswith("decay_steps"):
        assert f"--add {wrong}: " in str(caught.value)
        assert "Example: --add lora_dropout=0,0.05" in str(caught.value)


def test_a_range_that_cannot_be_added_is_refused_in_a_sentence(study: Path) -> None:
    with pytest.raises(InputError, match="lora_dropout: a range needs low < high"):
        promoted(study, to="refused", add=("lora_dropout=0.1:0",))


def test_a_misspelt_name_that_is_added_gets_the_meant_one(study: Path) -> None:
    with pytest.raises(InputError, match=r"lora_dropot is unknown; did you mean lora_dropout\?"):
        promoted(study, to="refused", add=("lora_dropot=0.1",))


@pytest.mark.parametrize(
    "name", ["a b", "-x", "a/b", ".hidden", "", "round2\n", "a\tb", "\x1b[31m", "a" * 101]
)
def test_a_name_that_no_round_can_have_is_the_command_lines_mistake(study: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"^--to '.*': expects (letters|at most 100)"):
        promoted(study, to=name)


def test_a_name_is_added_once(study: Path) -> None:
    with pytest.raises(InputError, match="added twice"):
        promoted(study, to="refused", add=("weight_decay=0.1", "weight_decay=0.2"))


def test_the_enqueued_go_on_from_the_round(study: Path) -> None:
    spec = load_round(promoted(study).path).spec
    assert [entry["continues"] for entry in spec.search.enqueue] == ["round1/3", "round1/4", "round1/2"]


def test_defaults_that_follow_the_horizon_stay_where_they_were(tmp_path: Path) -> None:
    """Another evaluation grid would lose the enqueued trials their trunks, another warmup all comparison."""
    file = first_round(tmp_path, steps=47, trials=2, run="")
    text = re.sub(r"every_steps: 2, |  (?:warmup|decay)_steps: .*\n", "", file.text)
    file.path.write_text(text)
    before = load_round(file.path).spec
    run(load_round(file.path))
    done = promoted(tmp_path, max_train_steps=480)
    spec = load_round(done.path).spec
    assert spec.evaluation.every_steps == before.evaluation.every_steps
    assert "as in round1: trials continue from steps that both evaluate" in done.path.read_text()
    assert spec.space()["warmup_steps"] == before.space()["warmup_steps"]
    assert spec.space()["decay_steps"] == done.next_round.space["decay_steps"]
    longer = load_round(promoted(tmp_path, max_train_steps=60, decay="steps").path).spec.space()
    assert longer["decay_steps"] == before.space()["decay_steps"]


def test_a_round_that_has_begun_keeps_its_file(study: Path) -> None:
    with pytest.raises(InputError, match="round1 has started, so its file cannot change"):
        promoted(study, to="round1")


def test_what_an_option_decided_is_said_to_be_so(study: Path) -> None:
    done = promoted(study, max_train_steps=16, top=1, decay="steps")
    assert comment(done, "max_train_steps") == "8 in round1: set by --max-train-steps"
    assert comment(done, "trials") == "1 enqueued, the rest new: fewer, longer runs; --top 1"
    assert comment(done, "decay_steps").endswith("25% now: set by --decay steps")
    assert "1 of round2's 3 trials is carried over" in promotion_text(done.document)


def test_the_same_horizon_is_no_longer_run_and_what_is_complete_is_from_no_trunk(study: Path) -> None:
    done = promoted(study, max_train_steps=8)
    assert comment(done, "trials") == "3 enqueued, the rest new"
    assert "3 of round2's 5 trials are carried over, already complete." in promotion_text(done.document)
    assert "max_train_steps: 8\n" in done.path.read_text(), "the line stays as it was"
    everything = promoted(study, max_train_steps=8, top=6)
    assert comment(everything, "trials") == "all enqueued, none new; --top 6"
    assert everything.next_round.trials_total == 6, "the space has no other point"


@pytest.mark.parametrize(
    ("resumed", "enqueued", "said"),
    [
        (0, 1, "1 of round2's 5 trials is carried over; it starts over."),
        (0, 3, "3 of round2's 5 trials are carried over; they start over."),
        (1, 1, "1 of round2's 5 trials is carried over; it resumes from a checkpoint."),
        (
            1,
            2,
            "2 of round2's 5 trials are carried over; "
            "1 of them resumes from a checkpoint, the other starts over.",
        ),
        (2, 2, "2 of round2's 5 trials are carried over; both resume from a checkpoint."),
        (
            2,
            4,
            "4 of round2's 5 trials are carried over; "
            "2 of them resume from a checkpoint, the others start over.",
        ),
        (3, 3, "3 of round2's 5 trials are carried over; all 3 resume from a checkpoint."),
    ],
)
def test_how_many_resume_is_said_as_a_person_would(
    study: Path, resumed: int, enqueued: int, said: str
) -> None:
    document = {
        **promoted(study).document,
        "trials": {"enqueued": enqueued, "total": 5},
        "continues": [{"trial": f"round1/{number}", "from_step": 5} for number in range(resumed)],
    }
    assert said in promotion_text(document)


def test_a_lead_within_the_noise_is_said_with_the_seeds_to_try(tmp_path: Path) -> None:
    run(
        first_round(tmp_path, trials=2),
        lambda h, step, horizon: falling({"learning_rate": 1e-3}, step, horizon),
    )
    text = promotion_text(promoted(tmp_path).document)
    assert "info: The best two trials differ by less than the noise." in text
    assert "training_seed 1 and 2" in text


def test_a_horizon_that_cannot_be_paid_for_is_refused(study: Path) -> None:
    with pytest.raises(
        InputError, match=r"--max-train-steps 41 is above run.production_steps, 40, .* round1"
    ):
        promoted(study, to="longer", max_train_steps=41)
    assert not (study / "longer.yaml").exists()
    assert promoted(study, to="longer", max_train_steps=40).next_round.max_train_steps == 40


def test_what_may_still_change_is_read_from_the_file(tmp_path: Path) -> None:
    """A longer run may be paid for after all; nobody need run the round again to say so."""
    rates = "[3e-3, 5e-3, 8e-3]"
    file = first_round(tmp_path, run="run: {production_steps: 10}", trials=2, learning_rate=rates)
    run(file)
    assert promoted(tmp_path).next_round.max_train_steps == 10
    first_round(tmp_path, run="run: {production_steps: 100}", trials=3, learning_rate=rates)
    done = promoted(tmp_path)
    assert done.next_round.max_train_steps == 24
    assert done.document["findings"][0]["rule"] == "incomplete_round"
    folder = open_folder(tmp_path)
    store = folder.open()
    try:
        (report,) = lineage(folder, store, folder.latest(store))
    finally:
        store.close()
    assert report.reading.suggested_max_train_steps == 24
    assert not report.is_finished


def test_where_nothing_was_learned_nothing_is_written_unless_a_horizon_is_given(tmp_path: Path) -> None:
    run(first_round(tmp_path, trials=2), rising)
    with pytest.raises(TunerError, match="base model"):
        promoted(tmp_path)
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["round1.yaml"]
    assert promoted(tmp_path, max_train_steps=16).path.exists()


def test_where_no_trial_is_complete_the_next_round_explores(tmp_path: Path) -> None:
    run(first_round(tmp_path, trials=2), lambda h, step, horizon: Evaluation(step, math.nan if step else 2.0))
    with pytest.raises(TunerError, match="--max-train-steps"):
        promoted(tmp_path)
    done = promoted(tmp_path, max_train_steps=16)
    assert load_round(done.path).spec.search.sampler == "quasi-random"
    assert comment(done, "sampler").startswith("no good trials are known yet")
    assert comment(done, "enqueue") == "none: no complete trial of round1 beat the base model"
    assert comment(done, "trials") == "all new"


def test_what_is_enqueued_goes_on_only_from_the_same_work_on_the_same_grid(study: Path) -> None:
    def begun(max_train_steps: int, *, workload: str | None = None, every: int = 2, **other: Any) -> Any:
        """The step that the first enqueued trial goes on from, or why it starts afresh."""
        file = promoted(study, max_train_steps=max_train_steps)
        plan = RoundPlan(
            read_round(file.path.read_text().replace("every_steps: 2", f"every_steps: {every}"), file.path)
        )
        chosen = {k: v for k, v in plan.spec.search.enqueue[0].items() if k != "continues"}
        folder = open_folder(study)
        store = folder.open()
        try:
            same = store.rounds()[0].workload if workload is None else workload
            found, reason = Continuations(plan, store, same).find(
                0, {**complete_hyperparameters(plan.space, chosen), **other}
            )
        finally:
            store.close()
        return reason if found is None else (str(found), found.step)

    assert begun(16) == ("round1/3@5", 5)
    assert begun(8) == ("round1/3@8", 8)
    assert "model, data, evaluation set or length changed since then" in begun(16, workload="other")
    assert begun(16, lora_alpha=99).endswith("lora_alpha differs")
    assert "its best adapter up to step 5 is from step 4" in begun(16, every=3)


class Damaged(SimulatedWorker):
    """Cannot read what another round has kept."""

    def _first_step(self, assignment: Assignment) -> int:
        if "round1" in (assignment.resume_from or ""):
            raise CheckpointError("its hash is another")
        return super()._first_step(assignment)


def test_a_trunk_that_cannot_be_read_costs_its_steps_and_not_the_round(tmp_path: Path) -> None:
    run(first_round(tmp_path, trials=2))
    second = load_round(promoted(tmp_path, top=2).path)
    heard = io.StringIO()
    view = open_view(
        console=Console(file=heard, width=80),
        title="test",
        trials_total=1,
        max_train_steps=second.spec.max_train_steps,
    )
    run(second, worker=Damaged, view=view)
    store = open_folder(tmp_path).open()
    trials = store.trials("round2")
    store.close()
    carried = [trial for trial in trials if trial.continues]
    assert {str(trial.state) for trial in trials} == {"complete"}
    assert len(carried) == 2
    for trial in carried:
        assert [(a.from_step, a.outcome) for a in trial.attempts] == [(5, "failed"), (0, "complete")]
        said = f"started over instead of continuing {trial.continues}: its hash is another"
        assert trial.reason == said
        assert f"trial {trial.number}  {said}\n" in heard.getvalue(), "it is said when it begins"


def test_a_promotion_has_no_more_trials_than_points(tmp_path: Path) -> None:
    run(first_round(tmp_path, learning_rate="1e-3", lora_r="[2, 4, 8]", trials=12))
    done = promoted(tmp_path, max_train_steps=12, top=1)
    assert (done.next_round.trials_total, load_round(done.path).spec.search.trials) == (3, 3)
    assert done.document["trials"] == {"enqueued": 1, "total": 3}


def test_points_that_fewer_steps_make_one_are_enqueued_once(tmp_path: Path) -> None:
    """Decays of 2 and 3 of 8 steps are both of 2 when all is cut in the ratio 0.75."""
    run(first_round(tmp_path, learning_rate="1e-3", decay_steps="[2, 3]", trials=2))
    done = promoted(tmp_path, max_train_steps=6, decay="share")
    assert len(done.next_round.enqueue) == done.next_round.trials_total == 1
    spec = load_round(done.path).spec
    assert (len(spec.search.enqueue), spec.num_trials, spec.hyperparameters["decay_steps"]) == (1, 1, 2)


@pytest.mark.parametrize(("rows", "is_said"), [(str(TABLE_VERSION), False), ("1", True), (None, True)])
def test_rows_that_were_read_otherwise_are_spoken_of(study: Path, rows: str | None, is_said: bool) -> None:
    """By the version that trained the round; what a dry run makes up reads none."""
    folder = open_folder(study)
    store = folder.open()
    try:
        for trial in store.trials("round1"):
            environment = {"tuner": "0.0.1"} if rows is None else {"rows": rows}
            store.record(Started("round1", trial.number, trial.attempts[-1].number, 0, environment))
    finally:
        store.close()
    notes = promoted(study, to="other").document["notes"]
    assert any("read some rows differently trained round1" in note for note in notes) is is_said


@pytest.mark.parametrize("force", [True, False])
def test_a_folder_with_the_name_of_the_next_file_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "round2.yaml").mkdir()
    with pytest.raises(InputError, match=r"round2\.yaml: cannot be written: Is a directory"):
        write_round_file(tmp_path / "round2.yaml", "round: round2\n", advice="", force=force)


def test_a_next_file_that_is_not_text_is_kept(tmp_path: Path) -> None:
    (tmp_path / "round2.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="exists with other content; look at it"):
        write_round_file(tmp_path / "round2.yaml", "round: round2\n", advice="look at it")


@pytest.mark.parametrize(
    "written",
    [
        "storage: postgresql+psycopg://me:it-s@host/db",
        "storage: 'postgresql+psycopg://me:it''s@host/db'",
        'storage: "postgresql+psycopg://me:it\\u0027s@host/db"',
        "storage: sqlite:///tuner.db  # was postgresql+psycopg://me:it-s@host/db",
    ],
)
def test_a_password_is_not_recorded_however_the_file_writes_it(written: str) -> None:
    kept = recordable(f"study: s\n{written}\n")
    assert "s@host" not in kept
    assert "me:***@host/db" in kept
