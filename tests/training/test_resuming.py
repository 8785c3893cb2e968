"""A trial that was stopped and went on is the trial that never stopped, digit for digit."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests import tiny
from tests.training.driving import assignment, curve, ended, run_loop, started, worker_state
from tuner.adapters import Base
from tuner.playbook import can_continue
from tuner.playbook.schedule import trunk_end
from tuner.records import Assignment, CheckpointKind, Event, Saved, Value
from tuner.training.checkpoints import read_snapshot

MICRO_TOKENS = 40
"""Two or three micro-batches an update: a stop may fall between them."""

TRIALS = {
    "adamw": tiny.hyperparameters(lora_dropout=0.2, warmup_steps=2, schedule="linear", decay_steps=4),
    "adamw_8bit": tiny.hyperparameters(
        optimizer="adamw_8bit",
        learning_rate=1e-3,
        lora_r=32,
        lora_dropout=0.2,
        warmup_steps=2,
        schedule="linear",
        decay_steps=4,
    ),
    "dora": tiny.hyperparameters(
        use_dora=True, lora_dropout=0.2, warmup_steps=2, schedule="linear", decay_steps=4, loraplus_ratio=2.0
    ),
}
"""Rank 32 on the wide model has quantised moments and unquantised ones."""


def base_for(models: tiny.Models, optimizer: str) -> Base:
    return models.base("llama", **tiny.WIDE) if optimizer == "adamw_8bit" else models.base("llama")


def run(base: Base, assigned: Assignment, *, stop_at_micro_step: int | None = None) -> list[Event]:
    """One attempt in a worker of its own."""
    with worker_state(base, [assigned.hyperparameters], micro_tokens=MICRO_TOKENS) as state:
        return run_loop(state, [assigned], stop_at_micro_step=stop_at_micro_step)


def resumed_from(
    events: Sequence[Event], before: Assignment, kind: CheckpointKind, **more: object
) -> Assignment:
    """The next attempt, going on from the newest checkpoint of a kind."""
    saved = [e.checkpoint for e in events if isinstance(e, Saved) and e.checkpoint.kind == kind][-1]
    path = Path(before.directory).parent / saved.path
    changes = {"attempt": before.attempt + 1, "resume_from": str(path), "resume_sha256": saved.sha256}
    return replace(before, **changes | more)  # type: ignore[arg-type]


def best_weights(assigned: Assignment) -> dict[str, torch.Tensor]:
    return load_file(Path(assigned.directory) / "best" / "adapter_model.safetensors")


def assert_equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class TestAnyStop:
    @pytest.mark.parametrize("optimizer", TRIALS)
    def test_is_the_undisturbed_run(
        self, models: tiny.Models, tmp_path_factory: pytest.TempPathFactory, optimizer: str
    ) -> None:
        base, trial = base_for(models, optimizer), TRIALS[optimizer]
        undisturbed = assignment(tmp_path_factory.mktemp("undisturbed"), hyperparameters=trial)
        expected = run(base, undisturbed)
        assert min(curve(expected), key=lambda evaluation: evaluation.eval_loss).step > 0

        @given(ticks=st.lists(st.integers(0, 25), min_size=1, max_size=3))
        @settings(
            max_examples=6,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def stopped_again_and_again(ticks: list[int]) -> None:
            assigned = replace(undisturbed, directory=str(tmp_path_factory.mktemp("stopped") / "trial-0000"))
            executed = 0
            for micro_step in [*ticks, None]:
                events = run(base, assigned, stop_at_micro_step=micro_step)
                executed += ended(events).step - started(events).step
                if ended(events).outcome == "complete":
                    break
                assert ended(events).outcome == "stopped"
                assigned = resumed_from(events, assigned, CheckpointKind.LAST)
            assert curve(events) == curve(expected)
            assert executed == undisturbed.max_train_steps
            assert_equal_weights(best_weights(assigned), best_weights(undisturbed))

        stopped_again_and_again()

    def test_kept_checkpoint_holds_the_same_moments(self, models: tiny.Models, tmp_path: Path) -> None:
        """Not only the curve: the state at the end is equal, too."""
        trial = TRIALS["adamw"]
        undisturbed = assignment(tmp_path / "a", hyperparameters=trial)
        events = run(models.base("llama"), undisturbed)
        assigned = assignment(tmp_path / "b", hyperparameters=trial)
        stopped = run(models.base("llama"), assigned, stop_at_micro_step=9)
        assert 0 < ended(stopped).step < 10
        going_on = resumed_from(stopped, assigned, CheckpointKind.LAST)
        after = run(models.base("llama"), going_on)
        ends = [
            Path(resumed_from(e, a, CheckpointKind.LAST).resume_from or "")
            for e, a in ((events, undisturbed), (after, going_on))
        ]
        one, other = (read_snapshot(path, sha256=None) for path in ends)
        assert one.step == other.step == 10
        assert one.counters == other.counters
        assert_equal_weights(dict(one.optimizer), dict(other.optimizer))


def test_best_adapter_before_the_stop_is_kept(models: tiny.Models, tmp_path: Path) -> None:
    """Of a trial that gets no better after the stop: its best adapter comes out of the checkpoint."""
    trial = tiny.hyperparameters(training_seed=1, lora_dropout=0.2)
    undisturbed = assignment(tmp_path / "a", hyperparameters=trial, evaluate_every=2)
    expected = run(models.base("llama"), undisturbed)
    best = min(curve(expected), key=lambda evaluation: evaluation.eval_loss)
    assigned = replace(undisturbed, directory=str(tmp_path / "b" / "trial-0000"))
    for micro_step in range(12, 30):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        stopped = run(models.base("llama"), assigned, stop_at_micro_step=micro_step)
        if ended(stopped).step > best.step:
            break
    going_on = resumed_from(stopped, assigned, CheckpointKind.LAST)
    shutil.rmtree(tmp_path / "b" / "trial-0000" / "best-steps")
    assert curve(run(models.base("llama"), going_on)) == curve(expected)
    assert best.step < ended(stopped).step < 10
    assert_equal_weights(best_weights(going_on), best_weights(undisturbed))


def test_bad_updates_count_across_a_stop(models: tiny.Models, tmp_path: Path) -> None:
    wild = tiny.hyperparameters(learning_rate=1e30)
    ends = []
    with worker_state(models.base("llama"), [wild]) as state:
        for name, micro_step in (("a", None), ("b", 3)):
            assigned = assignment(tmp_path / name, hyperparameters=wild, evaluate_every=5)
            events = run_loop(state, [assigned], stop_at_micro_step=micro_step)
            if ended(events).outcome == "stopped":
                assert ended(events).step == 3
                going_on = resumed_from(events, assigned, CheckpointKind.LAST)
                events = run_loop(state, [replace(going_on, attempt=1)])
            ends.append(ended(events))
    assert ends[0] == ends[1]
    assert (ends[0].outcome, ends[0].step) == ("infeasible", 4)


class TestTrunk:
    SHORT, LONG = 8, 15
    TRIAL = tiny.hyperparameters(lora_dropout=0.2, schedule="linear", warmup_steps=2, decay_steps=3)

    @pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
    @pytest.mark.parametrize("every", [5, 2])
    def test_longer_horizon_is_the_fresh_run(
        self, models: tiny.Models, tmp_path: Path, optimizer: str, every: int
    ) -> None:
        """With `every` 5 the trunk ends at an evaluation, with 2 between two of them."""
        base = base_for(models, optimizer)
        trial = TRIALS[optimizer] | {"decay_steps": 3}
        longer = trial | {"decay_steps": 6}
        more = {"evaluate_every": every, "trunk_steps": (5,)}
        short = assignment(tmp_path / "1", hyperparameters=trial, max_train_steps=self.SHORT, **more)
        events = run(base, short)
        assert [
            e.checkpoint.step for e in events if isinstance(e, Saved) and e.checkpoint.kind == "trunk"
        ] == [5]
        fresh = assignment(
            tmp_path / "2", hyperparameters=longer, max_train_steps=self.LONG, evaluate_every=every
        )
        expected = run(base, fresh)
        promoted = resumed_from(
            events,
            short,
            CheckpointKind.TRUNK,
            hyperparameters=longer,
            max_train_steps=self.LONG,
            directory=str(tmp_path / "3" / "trial-0000"),
            trunk_steps=(),
        )
        going_on = run(base, promoted)
        assert curve(going_on) == curve(expected)
        assert (started(going_on).step, ended(going_on).step) == (5, self.LONG)
        assert_equal_weights(best_weights(promoted), best_weights(fresh))

    @pytest.mark.parametrize(
        ("chosen", "longer", "stable"),
        [
            ({"schedule": "inverse_sqrt"}, {}, 8),
            ({"schedule": "linear", "decay_steps": 3, "decay_shape": "sqrt"}, {"decay_steps": 6}, 5),
            ({"schedule": "linear", "decay_steps": 3}, {"decay_steps": 6, "decay_shape": "cosine"}, 5),
        ],
    )
    def test_each_stable_phase_continues_into_the_fresh_longer_run(
        self,
        models: tiny.Models,
        tmp_path: Path,
        chosen: dict[str, Value],
        longer: dict[str, Value],
        stable: int,
    ) -> None:
        trial = tiny.hyperparameters(warmup_steps=2, lora_dropout=0.2, **chosen)
        assert trunk_end(trial, self.SHORT) == stable
        assert can_continue(trial, self.SHORT, trial | longer, self.LONG, stable) is None
        short = assignment(
            tmp_path / "1",
            hyperparameters=trial,
            max_train_steps=self.SHORT,
            evaluate_every=2,
            trunk_steps=(stable,),
        )
        more = {"hyperparameters": trial | longer, "max_train_steps": self.LONG, "trunk_steps": ()}
        fresh = replace(short, directory=str(tmp_path / "2" / "trial-0000"), **more)
        where = {"directory": str(tmp_path / "3" / "trial-0000")}
        promoted = resumed_from(
            run(models.base("llama"), short), short, CheckpointKind.TRUNK, **where, **more
        )
        going_on = run(models.base("llama"), promoted)
        assert curve(going_on) == curve(run(models.base("llama"), fresh))
        assert (started(going_on).step, ended(going_on).step) == (stable, self.LONG)
        assert_equal_weights(best_weights(promoted), best_weights(fresh))

    def test_evaluations_of_the_shorter_round_alone_are_left_out(
        self, models: tiny.Models, tmp_path: Path
    ) -> None:
        """A trunk at the shorter round's end, which lies between two evaluations of the longer one."""
        trial = tiny.hyperparameters()
        short = assignment(
            tmp_path / "1", hyperparameters=trial, max_train_steps=6, evaluate_every=4, trunk_steps=(6,)
        )
        events = run(models.base("llama"), short)
        fresh = assignment(tmp_path / "2", hyperparameters=trial, max_train_steps=9, evaluate_every=4)
        promoted = resumed_from(
            events,
            short,
            CheckpointKind.TRUNK,
            max_train_steps=9,
            directory=str(tmp_path / "3" / "trial-0000"),
            trunk_steps=(),
        )
        going_on = run(models.base("llama"), promoted)
        assert [evaluation.step for evaluation in curve(events)] == [0, 4, 6]
        assert curve(going_on) == curve(run(models.base("llama"), fresh))


class TestFaultyCheckpoints:
    @pytest.mark.parametrize("change", ["append", "remove", "rename"])
    def test_attempt_fails_and_says_why(self, models: tiny.Models, tmp_path: Path, change: str) -> None:
        first = assignment(tmp_path)
        events = run(models.base("llama"), first, stop_at_micro_step=5)
        again = resumed_from(events, first, CheckpointKind.LAST)
        file = Path(again.resume_from or "") / "optimizer.safetensors"
        match change:
            case "append":
                file.write_bytes(file.read_bytes() + b"\0")
            case "remove":
                file.unlink()
            case "rename":
                file.rename(file.with_name("optimiser.safetensors"))
        end = ended(run(models.base("llama"), again))
        assert end.outcome == "failed"
        assert "changed or damaged" in str(end.reason)

    def test_checkpoint_is_gone(self, models: tiny.Models, tmp_path: Path) -> None:
        assigned = assignment(tmp_path, resume_from=str(tmp_path / "gone"), resume_sha256="0" * 64)
        end = ended(run(models.base("llama"), assigned))
        assert (end.outcome, end.reason) == (
            "failed",
            f"{tmp_path / 'gone'}: the recorded checkpoint is missing",
        )
