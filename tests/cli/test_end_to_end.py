"""A whole study by the command line: round 1, promotion, a round 2 that goes on, the adapter in use."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import optuna
import pytest
from optuna_dashboard import get_note

from tests.studies import QUICKSTART, trials_of, tuner, tuner_process, write_round
from tuner.study.sampling import optuna_storage

TRIAL_KEYS = [
    "number",
    "round",
    "state",
    "reason",
    "hyperparameters",
    "seed",
    "best_step",
    "best_eval_loss",
    "settled_step",
    "metric",
    "direction",
    "best_value",
    "adapter",
    "answers",
    "test",
    "continues",
    "executed_steps",
    "executed_steps_exact",
    "attempts",
    "evaluations",
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, run to their ends."""
    directory = tmp_path_factory.mktemp("study")
    write_round(directory, trials=3, steps=10, decay_steps=4)
    for command in (
        ("study", "run", "round1.yaml"),
        ("study", "promote", "--to", "round2", "--max-train-steps", "20"),
        ("study", "run", "round2.yaml"),
    ):
        done = tuner(*command, directory=directory)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    return directory


@pytest.mark.slow
class TestStudy:
    def test_status_counts_every_trial(self, study: Path) -> None:
        done = tuner("study", "status", "--json", directory=study)
        document = json.loads(done.stdout)
        assert document["study"] == "tiny"
        assert [r["round"] for r in document["rounds"]] == ["round1", "round2"]
        for status in document["rounds"]:
            assert list(status) == [
                "round", "max_train_steps", "state", "trials", "metric", "direction", "best", "running",
                "branches_left",
                "seconds_left", "overfitting", "throughput", "throughput_by_node", "node_changes",
            ]  # fmt: skip
            executed = sum(t["executed_steps"] for t in trials_of(study) if t["round"] == status["round"])
            measured = status["throughput"]
            steps = measured["trial_steps_per_second"] * measured["training_seconds"]
            # Comparison runs are work, but no trial's.
            assert executed - 1e-6 <= steps <= executed + status["max_train_steps"] / 2
            assert 0.0 < measured["padding_share"] < 1.0
            assert 0.0 < measured["evaluation_share"] < 1.0
            assert measured["packing_factor"] >= 1.0
            assert measured["peak_memory_bytes"] > 1_000_000
            assert status["state"] == "complete"
            assert status["trials"]["waiting"] == status["trials"]["running"] == 0
            assert Path(status["best"]["adapter"]).is_dir()
        assert done.stderr == ""

    def test_trials_have_the_documented_keys(self, study: Path) -> None:
        trials = trials_of(study)
        assert len(trials) >= 6
        assert all(list(trial) == TRIAL_KEYS for trial in trials)
        one = json.loads(tuner("trial", "show", "round1/1", "--json", directory=study).stdout)
        assert one == next(t for t in trials if (t["round"], t["number"]) == ("round1", 1))

    def test_the_untouched_base_is_measured_once_and_the_same_for_all(self, study: Path) -> None:
        at_start = {trial["evaluations"][0]["eval_loss"] for trial in trials_of(study)}
        assert len(at_start) == 1

    def test_promoted_trials_go_on_from_their_trunk(self, study: Path) -> None:
        trials = trials_of(study)
        first = {t["number"]: t for t in trials if t["round"] == "round1"}
        promoted = [t for t in trials if t["round"] == "round2" and t["continues"]]
        assert promoted
        for trial in promoted:
            name, _, step = trial["continues"].partition("@")
            assert int(step) == 6  # 10 steps less 4 of decay
            assert trial["executed_steps"] == 20 - 6
            source = first[int(name.partition("/")[2])]
            before = [e for e in source["evaluations"] if e["step"] <= 6]
            assert trial["evaluations"][: len(before)] == before

    def test_a_promoted_trial_equals_a_fresh_run_of_the_longer_horizon(
        self, study: Path, tmp_path: Path
    ) -> None:
        promoted = next(t for t in trials_of(study) if t["round"] == "round2" and t["continues"])
        values = promoted["hyperparameters"]
        write_round(
            tmp_path,
            trials=1,
            steps=20,
            decay_steps=values["decay_steps"],
            learning_rate=repr(values["learning_rate"]),
            lora_r=values["lora_r"],
        )
        done = tuner("study", "run", "round1.yaml", directory=tmp_path)
        assert done.returncode == 0, done.stderr
        (fresh,) = trials_of(tmp_path)
        assert fresh["executed_steps"] == 20
        assert fresh["hyperparameters"] == values
        assert fresh["evaluations"] == promoted["evaluations"]

    def test_plain_peft_loads_the_adapter_and_finds_the_recorded_loss(self, study: Path) -> None:
        trial = json.loads(tuner("trial", "show", "best", "--json", directory=study).stdout)
        assert plain_peft_loss(Path(trial["adapter"]), study) == pytest.approx(
            trial["best_eval_loss"], abs=1e-4
        )

    def test_what_is_exported_has_the_loss_of_its_trial(self, study: Path, tmp_path: Path) -> None:
        trial = json.loads(tuner("trial", "show", "best", "--json", directory=study).stdout)
        for name, options in (("adapter", ()), ("merged", ("--merge", "--dtype", "float32"))):
            done = tuner("trial", "export", "best", "--to", str(tmp_path / name), *options, directory=study)
            assert done.returncode == 0, done.stderr
        found = [plain_peft_loss(tmp_path / "adapter", study), plain_loss(tmp_path / "merged", study)]
        assert found == pytest.approx([trial["best_eval_loss"]] * 2, abs=1e-4)

    def test_only_safetensors_and_json_are_kept(self, study: Path) -> None:
        kept = {path.suffix for path in (study / "runs").rglob("*") if path.is_file()}
        assert kept <= {".safetensors", ".json", ".md", ".log", ".lock"}

    def test_both_migrations_live_in_one_database(self, study: Path) -> None:
        with sqlite3.connect(study / "tuner.db") as database:
            tables = {
                name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            }
        assert {"alembic_version", "tuner_alembic_version", "tuner_trials", "trials"} <= tables

    def test_the_dashboard_has_best_steps_a_note_and_a_plot(self, study: Path) -> None:
        storage = optuna_storage(f"sqlite:///{study / 'tuner.db'}")
        shown = optuna.load_study(study_name="tiny/round1", storage=storage)
        complete = [t for t in shown.trials if t.state == optuna.trial.TrialState.COMPLETE]
        for trial in complete:
            assert 0 <= trial.user_attrs["best_step_fraction"] <= 1
            assert len(trial.intermediate_values) <= 20
        assert min(t.value for t in complete) == shown.best_value
        note = get_note(shown)
        assert "steps next" in note
        assert "Preliminary" not in note, "its comparison run has ended"
        with sqlite3.connect(study / "tuner.db") as database:
            rows = database.execute("SELECT key FROM study_system_attributes").fetchall()
        assert any("tuner-best-steps" in key for (key,) in rows)

    def test_a_promoted_trial_is_reproduced_from_its_trunk(self, study: Path) -> None:
        promoted = next(t for t in trials_of(study) if t["round"] == "round2" and t["continues"])
        name = f"round2/{promoted['number']}"
        done = tuner("trial", "reproduce", name, "--json", directory=study)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert list(document) == [
            "study", "trial", "agreement", "tolerance", "from_step", "to_step", "first_difference",
            "largest_difference", "state", "reason", "evaluations", "environment", "remarks",
        ]  # fmt: skip
        assert (document["agreement"], document["from_step"], document["environment"]) == ("equal", 6, [])
        assert [e["recorded"] for e in document["evaluations"]] == [
            e["eval_loss"] for e in promoted["evaluations"] if e["step"] > 6
        ]

    def test_generate_answers(self, study: Path) -> None:
        done = tuner_process(
            "trial", "generate", "best", "--prompt", "Name a river.", "--max-new-tokens", "8", directory=study
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert done.stderr == 'next: tuner trial generate best --prompt "..." --compare\n'

    def test_check_of_a_complete_round_names_what_follows(self, study: Path) -> None:
        followed = tuner("study", "check", "round1.yaml", directory=study)
        assert followed.stderr.splitlines()[-1] == "next: tuner study status"
        latest = tuner("study", "check", "round2.yaml", directory=study)
        assert latest.stderr.splitlines()[-1] == "next: tuner study promote --to round3"

    def test_report_writes_one_page(self, study: Path) -> None:
        done = tuner("study", "report", "round1", directory=study)
        assert done.returncode == 0, done.stderr
        page = (study / "report-round1.html").read_text()
        assert "tiny" in page
        assert "tuner study" in page
        assert all("Throughput" in text and "trial-steps/s" in text for text in (page, done.stdout))

    def test_a_running_study_cannot_be_run_twice(self, study: Path) -> None:
        from tuner.store import hold_study

        with hold_study(study, f"sqlite:///{study / 'tuner.db'}", "tiny"):
            done = tuner("study", "run", "round2.yaml", directory=study)
        assert done.returncode == 2
        assert "tiny" in done.stderr

    def test_a_begun_round_refuses_other_changes(self, study: Path) -> None:
        path = study / "round2.yaml"
        before = path.read_text()
        path.write_text(before.replace("every_steps: 2", "every_steps: 5"))
        try:
            done = tuner("study", "run", "round2.yaml", directory=study)
        finally:
            path.write_text(before)
        assert done.returncode == 2
        assert "round2.yaml" in done.stderr
        assert "every_steps" in done.stderr

    def test_promote_does_not_overwrite(self, study: Path) -> None:
        done = tuner("study", "promote", "--to", "round2", "--from", "round1", directory=study)
        assert done.returncode == 2
        assert "round2" in done.stderr
        (study / "other.yaml").write_text("mine: true\n")
        done = tuner("study", "promote", "--to", "other", "--max-train-steps", "30", directory=study)
        assert done.returncode == 2
        assert (study / "other.yaml").read_text() == "mine: true\n"

    def test_promote_says_why_in_json(self, study: Path) -> None:
        command = ("study", "promote", "--to", "round3", "--max-train-steps", "30", "--json")
        done = tuner(*command, directory=study)
        document = json.loads(done.stdout)
        (study / "round3.yaml").unlink()
        assert {
            "study", "from", "to", "file", "max_train_steps", "diagnosis", "evidence", "hyperparameters",
            "trials", "continues", "findings",
        } <= set(document)  # fmt: skip
        assert document["max_train_steps"] == {"from": 20, "to": 30}
        assert all(set(c) == {"from", "to", "tier", "reason"} for c in document["hyperparameters"].values())
        assert done.stderr == ""

    def test_clean_frees_what_nothing_goes_on_from(self, study: Path) -> None:
        shown = tuner("study", "clean", directory=study)
        assert "can be freed" in shown.stdout
        assert list((study / "runs").rglob("last/step-*"))
        assert tuner("study", "clean", "--yes", directory=study).returncode == 0
        assert not list((study / "runs").rglob("last/step-*"))
        assert all(Path(t["adapter"]).is_dir() for t in trials_of(study) if t["state"] == "complete")


def plain_peft_loss(adapter: Path, study: Path) -> float:
    """The evaluation loss by transformers and PEFT alone."""
    return plain_loss(QUICKSTART / "base", study, adapter=adapter)


def plain_loss(model_path: Path, study: Path, *, adapter: Path | None = None) -> float:
    """The same of a model with or without an adapter, one example at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tuner.config import load_round
    from tuner.data import prepare

    spec = load_round(study / "round1.yaml").spec.absolute(study)
    examples = prepare(spec, AutoTokenizer.from_pretrained(QUICKSTART / "base"), None).evaluation
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor(example.input_ids)[None].long()
        labels = torch.where(torch.tensor(example.is_target)[None], ids, -100)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        total += torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
        ).item()
        count += int(example.is_target.sum())
    return total / count
