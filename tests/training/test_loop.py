"""The loop as its parent sees it: events, losses over whole updates, wild trials, too little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import tiny
from tests.training.driving import (
    EVALUATION,
    TRAIN,
    Entry,
    assignment,
    begin,
    curve,
    drive,
    ended,
    loss_difference,
    run_loop,
    solo,
    started,
    update_difference,
    worker_state,
)
from tuner.adapters import Adapter, Base, Pack
from tuner.adapters.frozen_linear import row_keys
from tuner.data import batch_rows
from tuner.records import Ended, Evaluated, Evaluation, Measured, Progressed, Saved, Started
from tuner.training.packed_passes import example_scores, forward_backward
from tuner.training.startup import measure_base
from tuner.training.trial_run import MAX_BAD_UPDATES
from tuner.training.worker_state import WorkerState

TOLERANCE = 1e-4


class TestEvents:
    def test_of_one_trial(self, models: tiny.Models, tmp_path: Path) -> None:
        assigned = assignment(tmp_path)
        with worker_state(models.base("llama"), [assigned.hyperparameters]) as state:
            events = run_loop(state, [assigned])
        assert isinstance(events[0], Started)
        assert events[-2] == Ended("round1", 0, 1, 10, "complete")
        assert [evaluation.step for evaluation in curve(events)] == [0, 3, 6, 9, 10]
        for place_, event in enumerate(events):  # file before fact: what an evaluation leaves is on disk
            if isinstance(event, Evaluated):
                before = [e for e in events[:place_] if isinstance(e, Saved)]
                assert any(e.checkpoint.step == event.evaluation.step for e in before)

    def test_measures_what_was_run(self, models: tiny.Models, tmp_path: Path) -> None:
        """Ten updates of two trials side by side, of four rows each."""
        assigned = [assignment(tmp_path, trial) for trial in range(2)]
        with worker_state(models.base("llama"), [assigned[0].hyperparameters], slots=2) as state:
            events = run_loop(state, assigned)
        assert isinstance(events[-1], Measured)
        work = events[-1].throughput
        rows = [batch_rows(len(TRAIN), batch_size=4, seed=0, step=step) for step in range(1, 11)]
        assert work.tokens == 2 * sum(int(TRAIN.num_tokens[list(update)].sum()) for update in rows)
        assert work.padded_tokens == work.tokens  # both have the same rows
        assert work.trial_steps == work.micro_steps == 20
        assert work.passes in (10, 11)  # the second trial may join one pass later
        assert work.peak_memory_bytes > 1 << 20
        assert min(work.training_seconds, work.evaluating_seconds, work.saving_seconds) > 0
        measured = [event.throughput for event in events if isinstance(event, Measured)]
        assert [m.trial_steps for m in measured] == sorted(m.trial_steps for m in measured)

    def test_evaluation_is_sums_over_targets(self, models: tiny.Models, tmp_path: Path) -> None:
        assigned = assignment(tmp_path, max_train_steps=4)
        with worker_state(models.base("llama"), [assigned.hyperparameters]) as state:
            events = run_loop(state, [assigned])
        for evaluation in curve(events):
            assert evaluation.example_tokens == tuple(EVALUATION.num_targets)
            loss = sum(evaluation.example_nll) / sum(evaluation.example_tokens)
            assert evaluation.eval_loss == pytest.approx(loss, rel=1e-12)

    def test_train_loss_and_rate_since_the_evaluation_before(
        self, models: tiny.Models, tmp_path: Path
    ) -> None:
        trial = tiny.hyperparameters(warmup_steps=4, max_grad_norm=1e-3, batch_size=3)
        assigned = assignment(tmp_path, hyperparameters=trial)
        with worker_state(models.base("llama"), [trial]) as state:
            events = run_loop(state, [assigned])
        trained = solo(models.base("llama"), trial, max_train_steps=10)
        targets = [
            sum(TRAIN.num_targets[list(batch_rows(len(TRAIN), batch_size=3, seed=0, step=step))])
            for step in range(1, 11)
        ]
        first, *others = curve(events)
        assert (first.train_loss, first.learning_rate, first.clipped_updates) == (None, None, 0)
        begun = 0
        for evaluation in others:
            part = slice(begun, evaluation.step)
            nll = sum(loss * n for loss, n in zip(trained.losses[part], targets[part], strict=True))
            assert evaluation.train_loss == pytest.approx(nll / sum(targets[part]), rel=1e-6)
            assert evaluation.learning_rate == pytest.approx(1e-2 * min(1.0, (evaluation.step - 1) / 4))
            assert evaluation.clipped_updates == evaluation.step - begun
            begun = evaluation.step

    def test_signs_of_life_are_each_trials_own(self, models: tiny.Models, tmp_path: Path) -> None:
        trials = [tiny.hyperparameters(training_seed=seed) for seed in range(2)]
        assigned = [assignment(tmp_path, n, hyperparameters=trial) for n, trial in enumerate(trials)]
        with worker_state(models.base("llama"), trials, slots=2) as state:
            events = run_loop(state, assigned)
        for number, trial in enumerate(trials):
            said = [event for event in events if isinstance(event, Progressed) and event.trial == number]
            losses = solo(models.base("llama"), trial, max_train_steps=10).losses
            assert said
            assert all(e.train_loss == pytest.approx(losses[e.step - 1], rel=TOLERANCE) for e in said)

    def test_known_base_is_not_measured_again(self, models: tiny.Models, tmp_path: Path) -> None:
        assigned = assignment(tmp_path, max_train_steps=1)
        told = Evaluation(0, 5.0, example_nll=(5.0,) * 12, example_tokens=(1,) * 12)
        with worker_state(models.base("llama"), [assigned.hyperparameters]) as state:
            state.base_evaluation = told
            events = run_loop(state, [assigned])
        assert curve(events)[0] == told

    def test_an_adapter_whose_b_is_not_zero_has_its_own_evaluation_at_step_0(
        self, models: tiny.Models, tmp_path: Path
    ) -> None:
        """Beside one whose B is: the base model's evaluation is that one's alone."""
        told = Evaluation(0, 5.0, example_nll=(5.0,) * 12, example_tokens=(1,) * 12)
        trials = [tiny.hyperparameters(lora_init=name) for name in ("orthogonal", "gaussian")]
        assigned = [
            assignment(tmp_path, n, hyperparameters=trial, max_train_steps=1)
            for n, trial in enumerate(trials)
        ]
        with worker_state(models.base("llama"), trials, slots=2) as state:
            state.base_evaluation = told
            events = run_loop(state, assigned)
            base = measure_base(state)
        assert curve(events, 1)[0] == told
        own = curve(events, 0)[0]
        assert own.eval_loss == pytest.approx(base.eval_loss, rel=1e-5)
        assert own.example_nll != told.example_nll

    def test_slots_are_refilled(self, models: tiny.Models, tmp_path: Path) -> None:
        """Seven trials of different lengths through three slots: each curve as it is alone."""
        trials = [tiny.hyperparameters(training_seed=n, lora_r=1 + n, batch_size=1 + n % 3) for n in range(7)]
        assigned = [
            assignment(tmp_path, n, hyperparameters=trial, max_train_steps=3 + n % 4)
            for n, trial in enumerate(trials)
        ]
        with worker_state(models.base("llama"), trials, slots=3) as state:
            events = run_loop(state, assigned)
        for number, one in enumerate(assigned):
            with worker_state(models.base("llama"), [one.hyperparameters]) as state:
                alone = run_loop(state, [replace(one, directory=one.directory + "-alone")])
            assert ended(events, number).outcome == "complete"
            assert [e.step for e in curve(events, number)] == [e.step for e in curve(alone, number)]
            for together, solitary in zip(curve(events, number), curve(alone, number), strict=True):
                assert together.eval_loss == pytest.approx(solitary.eval_loss, rel=TOLERANCE)
                assert together.example_nll == pytest.approx(solitary.example_nll, rel=TOLERANCE)


class TestWildTrials:
    @pytest.mark.parametrize("targets", ["all-linear", ("q_proj",), ("v_proj",), ("down_proj",)])
    def test_infeasible_in_a_few_steps(
        self, models: tiny.Models, tmp_path: Path, targets: str | tuple[str, ...]
    ) -> None:
        """Beside sane ones, which end complete; where a norm layer hides the overflow, too."""
        wild = tiny.hyperparameters(learning_rate=1e30, target_modules=targets)
        trials = [tiny.hyperparameters(training_seed=1), wild, tiny.hyperparameters(training_seed=2)]
        assigned = [
            assignment(tmp_path, n, hyperparameters=trial, evaluate_every=5) for n, trial in enumerate(trials)
        ]
        with worker_state(models.base("llama"), trials, slots=3) as state:
            events = run_loop(state, assigned)
        assert [ended(events, n).outcome for n in range(3)] == ["complete", "infeasible", "complete"]
        assert ended(events, 1).step <= 1 + MAX_BAD_UPDATES
        assert "gradient" in str(ended(events, 1).reason)
        with worker_state(models.base("llama"), [wild]) as state:
            solitary = run_loop(state, [replace(assigned[1], directory=assigned[1].directory + "-alone")])
        assert ended(solitary, 1) == ended(events, 1)
        for number in (0, 2):
            alone = solo(models.base("llama"), trials[number], max_train_steps=10)
            last = curve(events, number)[-1].train_loss
            assert last == pytest.approx(_last_five(alone.losses, trials[number]), rel=TOLERANCE)

    def test_evaluation_that_is_not_finite(self, models: tiny.Models, tmp_path: Path) -> None:
        wild = tiny.hyperparameters(learning_rate=1e30)
        assigned = assignment(tmp_path, hyperparameters=wild, evaluate_every=2)
        with worker_state(models.base("llama"), [wild]) as state:
            events = run_loop(state, [assigned])
        assert ended(events).outcome == "infeasible"
        assert "evaluation loss is nan at step 2" in str(ended(events).reason)
        assert curve(events)[-1].step == 2

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
    def test_three_bad_updates_in_a_row_and_not_fewer(self, models: tiny.Models, bad: float) -> None:
        """A good one between them begins the count anew."""
        trial = tiny.hyperparameters()
        with worker_state(models.base("llama"), [trial]) as state:
            run = begin(state, 0, trial, max_train_steps=20)
            for norm in (bad, bad, 1.0, bad, bad):
                run.begin_update(state.train.num_tokens, state.train.num_targets, micro_tokens=1 << 20)
                run.add_loss(5.0)
                run.finish_update(norm)
                assert run.reason_infeasible is None
            run.finish_update(bad)
        assert (
            run.reason_infeasible == "gradient zero or not finite in 3 updates in a row, the last at step 6"
        )


class TestDropout:
    def test_masks_are_of_the_seed_the_step_and_the_place_in_the_batch(self, models: tiny.Models) -> None:
        """However the batch is cut, and whoever shares the pass."""
        trials = [
            tiny.hyperparameters(lora_dropout=0.5, batch_size=size, training_seed=seed)
            for size, seed in ((2, 7), (3, 4))
        ]
        keys: list[int] = []

        def look(_: Tensor) -> bool:
            packed = state.pack.rows
            assert packed is not None
            assert packed.dropout_keys is not None
            keys.extend(packed.dropout_keys.tolist())
            return True

        with worker_state(
            with_room_for(models.base("llama"), look), trials, slots=2, micro_tokens=1
        ) as state:
            drive(state, trials, [Entry(0, 1), Entry(1, 0)], max_train_steps=3)
        expected = [
            row_keys(seed, step, torch.arange(size)).tolist()
            for size, seed in ((2, 7), (3, 4))
            for step in (1, 2, 3)
        ]
        assert sorted(keys) == sorted(key for rows in expected for key in rows)
        assert len(set(keys)) == 15


class TestAccumulation:
    @given(data=st.data())
    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    def test_cutting_changes_no_gradient(self, models: tiny.Models, data: st.DataObject) -> None:
        """However an update is cut, by tokens or by rows of a pass: its loss is that of the whole batch."""
        trials = [
            tiny.hyperparameters(batch_size=data.draw(st.integers(1, 9)), lora_dropout=rate, training_seed=n)
            for n, rate in enumerate(data.draw(st.lists(st.sampled_from([0.0, 0.4]), min_size=1, max_size=3)))
        ]
        micro_tokens, pass_tokens = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 200))
        with worker_state(models.base("llama"), trials, slots=len(trials)) as state:
            whole = one_update(state, trials)
            state.micro_tokens, state.pass_tokens = micro_tokens, pass_tokens
            cut = one_update(state, trials)
        for (loss, gradient), (expected_loss, expected) in zip(cut, whole, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert float((gradient - expected).norm()) < 1e-5 * float(expected.norm())

    def test_loss_is_over_target_tokens(self, models: tiny.Models) -> None:
        """Not a mean of means: a batch of a long and a short row, by hand."""
        trial = tiny.hyperparameters(batch_size=2)
        (loss,) = solo(models.base("llama"), trial, max_train_steps=1, micro_tokens=1).losses
        chosen = [TRAIN[row] for row in batch_rows(len(TRAIN), batch_size=2, seed=0, step=1)]
        nll = []
        for example in chosen:
            ids = torch.from_numpy(example.input_ids).long()
            with torch.no_grad():
                logits = models.base("llama").model(input_ids=ids[None]).logits[0, :-1]
            of_tokens = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            nll.append(of_tokens[torch.from_numpy(example.is_target[1:])])
        assert len(nll[0]) != len(nll[1])
        assert loss == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)


@dataclass
class SmallBase(Base):
    """A base with room for so much in a pass, as a small GPU has."""

    has_room: Callable[[Tensor], bool] = lambda ids: True
    refused: int = 0
    largest_pass: int = 0

    def token_nll(self, input_ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        self._make_room(input_ids)
        return super().token_nll(input_ids, rows, columns)

    def token_scores(self, input_ids: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        self._make_room(input_ids)
        return super().token_scores(input_ids, rows, columns)

    def _make_room(self, input_ids: Tensor) -> None:
        if not self.has_room(input_ids):
            self.refused += 1
            raise torch.OutOfMemoryError("artificial limit")
        self.largest_pass = max(self.largest_pass, input_ids.shape[0])


def with_room_for(base: Base, has_room: Callable[[Tensor], bool]) -> SmallBase:
    return SmallBase(base.model, base.dtype, base.head_is_linear, has_room)


class TestOutOfMemory:
    TRIALS = tuple(
        tiny.hyperparameters(training_seed=n, batch_size=size, lora_dropout=0.2)
        for n, size in enumerate((7, 2, 4))
    )

    @pytest.mark.parametrize("tokens", [24, 40, 130])
    def test_training_is_as_with_room(self, models: tiny.Models, tokens: int) -> None:
        """The longest row has 24 tokens."""
        base = models.base("llama")
        small = with_room_for(base, lambda ids: ids.numel() <= tokens)
        entries = [Entry(n, n) for n in range(3)]
        with worker_state(small, self.TRIALS, slots=3) as state:
            tight = drive(state, self.TRIALS, entries, max_train_steps=8)
            assert state.pass_tokens <= tokens
        assert 0 < small.refused <= 6  # the limit is found once, not at every step
        for number, trial in enumerate(self.TRIALS):
            alone = solo(base, trial, max_train_steps=8)
            assert loss_difference(tight[number], alone) < TOLERANCE
            assert update_difference(tight[number], alone) < TOLERANCE

    def test_a_pass_that_fails_half_way_back_leaves_nothing(self, models: tiny.Models) -> None:
        """Memory ends in the backward pass, when the last layer has its gradients already."""
        base = models.base("llama")
        begun, refused = [], []

        def end(_: Tensor) -> None:
            refused.append(1)
            raise torch.OutOfMemoryError("artificial limit")

        def watch(_: nn.Module, __: object, output: Tensor) -> None:
            begun.append(1)
            if output.requires_grad and output[..., 0].numel() > 50 and len(refused) < 3:
                output.register_hook(end)

        hook = base.model.get_submodule("model.layers.0").register_forward_hook(watch)
        with worker_state(base, self.TRIALS, slots=3) as state:
            tight = drive(state, self.TRIALS, [Entry(n, n) for n in range(3)], max_train_steps=4)
        hook.remove()
        assert 0 < len(refused) < len(begun)
        for number, trial in enumerate(self.TRIALS):
            alone = solo(base, trial, max_train_steps=4)
            assert loss_difference(tight[number], alone) < TOLERANCE
            assert update_difference(tight[number], alone) < TOLERANCE

    def test_evaluations_that_are_due_share_a_pass(self, models: tiny.Models, tmp_path: Path) -> None:
        """Five examples of each of three trials; in training four rows of each at most."""
        trials = [tiny.hyperparameters(training_seed=n) for n in range(3)]
        assigned = [
            assignment(tmp_path, n, hyperparameters=trial, max_train_steps=2, evaluate_every=2)
            for n, trial in enumerate(trials)
        ]
        passes: list[int] = []

        def look(ids: Tensor) -> bool:
            if not torch.is_grad_enabled():
                passes.append(len(ids))
            return True

        with worker_state(with_room_for(models.base("llama"), look), trials, slots=3) as state:
            state.base_evaluation = Evaluation(0, 5.0, example_nll=(5.0,) * 12, example_tokens=(1,) * 12)
            run_loop(state, assigned)
        assert passes == [15, 15, 6] or sorted(passes) == [2, 4, 5, 5, 10, 10]  # one may come a pass later

    @pytest.mark.parametrize("rows", [1, 3])
    def test_evaluation_is_as_with_room(self, models: tiny.Models, rows: int) -> None:
        """One row an adapter, and one adapter at a time, when there is no room for more."""
        base = models.base("llama")
        small = with_room_for(base, lambda ids: ids.shape[0] <= rows)
        found = []
        for one in (base, small):
            with worker_state(one, self.TRIALS, slots=3) as state:
                drive(state, self.TRIALS, [Entry(n, n) for n in range(3)], max_train_steps=3)
                found.append(example_scores(state, (0, 2, 1)))
        assert small.largest_pass == rows
        with_room, without = ([scores.nll for scores in one] for one in found)
        assert torch.tensor(without) == pytest.approx(torch.tensor(with_room), rel=TOLERANCE)
        assert [scores.correct for scores in found[1]] == [s.correct for s in found[0]]
        assert with_room[0] != with_room[1]

    def test_an_evaluation_takes_no_more_rows_of_a_trial_than_its_own_batch_size(
        self, models: tiny.Models
    ) -> None:
        """Of 12 rows five at a time, whatever the batch size of training, and where there is room for all."""
        roomy = with_room_for(models.base("llama"), lambda _: True)
        with worker_state(roomy, self.TRIALS, slots=3) as state:
            assert state.evaluation_rows == 5
            example_scores(state, ())
            assert roomy.largest_pass == 5
            for slot in (0, 1):
                begin(state, slot, self.TRIALS[slot], max_train_steps=3)
            example_scores(state, (0, 1))
            assert roomy.largest_pass == 10

    @pytest.mark.parametrize("shape", ["llama", "gpt2"])
    def test_a_row_that_fits_when_fewer_activations_are_kept(
        self, models: tiny.Models, shape: tiny.Shape
    ) -> None:
        """The last resort before a trial is infeasible; masks and gradients stay what they are."""
        trials = [tiny.hyperparameters(trial, target_modules="all-linear") for trial in self.TRIALS]
        base = models.base(shape, initializer_range=0.21)
        alone = [solo(base, trial, max_train_steps=4) for trial in trials]
        model = base.model
        small = with_room_for(base, lambda ids: model.is_gradient_checkpointing or ids.shape[0] > 1e9)
        with worker_state(small, trials, slots=3) as state:
            tight = drive(state, trials, [Entry(n, n) for n in range(3)], max_train_steps=4)
        assert model.is_gradient_checkpointing
        for number, expected in enumerate(alone):
            assert len(tight[number].losses) == 4
            assert loss_difference(tight[number], expected) < TOLERANCE
            assert update_difference(tight[number], expected) < TOLERANCE

    def test_a_row_that_never_fits(self, models: tiny.Models, tmp_path: Path) -> None:
        """Its trial is infeasible and says why; a neighbour that does not meet the row goes on."""
        order = [batch_rows(len(TRAIN), batch_size=1, seed=seed, step=2)[0] for seed in range(20)]
        lengths = TRAIN.num_tokens[order]
        meets, other = int(lengths.argmax()), int(lengths.argmin())
        trials = [tiny.hyperparameters(batch_size=1, training_seed=seed) for seed in (meets, other)]
        limit = int(lengths.max())
        own = models.base("llama", initializer_range=0.19)  # its layers will keep fewer activations
        small = with_room_for(own, lambda ids: not torch.is_grad_enabled() or ids.shape[1] < limit)
        assigned = [
            assignment(tmp_path, n, hyperparameters=trial, max_train_steps=2)
            for n, trial in enumerate(trials)
        ]
        with worker_state(small, trials, slots=2) as state:
            events = run_loop(state, assigned)
        assert ended(events, 0) == Ended(
            "round1", 0, 1, 1, "infeasible", "out of memory alone at micro-batch 1"
        )
        assert ended(events, 1).outcome == "complete"
        assert started(events, 1).step == 0

    def test_an_evaluation_row_that_never_fits(self, models: tiny.Models, tmp_path: Path) -> None:
        """Its trials are infeasible and say why, and the worker is there for the next one."""
        trial = tiny.hyperparameters()
        told = Evaluation(0, 5.0, example_nll=(5.0,) * 12, example_tokens=(1,) * 12)
        small = with_room_for(models.base("llama"), lambda ids: torch.is_grad_enabled() or len(ids) > 10)
        assigned = [assignment(tmp_path, n, max_train_steps=2, evaluate_every=2) for n in range(3)]
        with worker_state(small, [trial], slots=2) as state:
            state.base_evaluation = told
            events = run_loop(state, assigned)
        for number in range(3):
            assert ended(events, number) == Ended(
                "round1", number, 1, 2, "infeasible", "out of memory evaluating one example alone"
            )
            assert curve(events, number) == [told]

    def test_a_trial_without_room_beside_others_begins_when_one_has_left(
        self, models: tiny.Models, tmp_path: Path
    ) -> None:
        """It is not to blame for them: its curve is the one that it has alone."""
        trials = [tiny.hyperparameters(training_seed=n) for n in range(3)]
        assigned = [
            assignment(tmp_path, n, hyperparameters=trial, max_train_steps=3 + n)
            for n, trial in enumerate(trials)
        ]
        with worker_state(models.base("llama"), trials, slots=3) as state:
            small_memory(state, most=2)
            events = run_loop(state, assigned)
        begun, left = ([e.trial for e in events if isinstance(e, kind)] for kind in (Started, Ended))
        assert (begun, left[0]) == ([0, 1, 2], 0)
        assert events.index(started(events, 2)) > events.index(ended(events, 0))
        assert {ended(events, n).outcome for n in range(3)} == {"complete"}
        with worker_state(models.base("llama"), [trials[2]]) as state:
            alone = run_loop(state, [replace(assigned[2], directory=assigned[2].directory + "-alone")])
        assert curve(events, 2)[-1].eval_loss == pytest.approx(curve(alone, 2)[-1].eval_loss, rel=TOLERANCE)

    @pytest.mark.parametrize("said", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
    def test_a_trial_without_room_alone_is_infeasible(
        self, models: tiny.Models, tmp_path: Path, said: str
    ) -> None:
        assigned = assignment(tmp_path)
        with worker_state(models.base("llama"), [assigned.hyperparameters]) as state:
            small_memory(state, most=0, error=RuntimeError(said))
            events = run_loop(state, [assigned])
        reason = "out of memory alone: no room for its adapter beside the base"
        assert ended(events) == Ended("round1", 0, 1, 0, "infeasible", reason)
        assert not any(isinstance(event, Started) for event in events)

    @pytest.mark.parametrize("stop", [1, None])
    def test_one_that_waits_for_room_can_be_stopped(
        self, models: tiny.Models, tmp_path: Path, stop: int | None
    ) -> None:
        assigned = [assignment(tmp_path, n, max_train_steps=8) for n in range(2)]
        with worker_state(models.base("llama"), [tiny.hyperparameters()], slots=2) as state:
            small_memory(state, most=1)
            events = run_loop(state, assigned, stop_at_micro_step=3, stop=stop)
        assert ended(events, 1) == Ended("round1", 1, 1, 0, "stopped")
        assert ended(events, 0).outcome == ("complete" if stop else "stopped")


def one_update(state: WorkerState, trials: Sequence[dict[str, object]]) -> list[tuple[float, Tensor]]:
    """Train loss and gradients of every trial's first update, before its optimizer steps."""
    runs = {slot: begin(state, slot, trial, max_train_steps=9) for slot, trial in enumerate(trials)}
    generator = torch.Generator().manual_seed(0)
    for slot, run in runs.items():
        for _, b in run.optimizer.weights.values():
            b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
        state.pack.load({slot: run.optimizer.weights})
        run.begin_update(state.train.num_tokens, state.train.num_targets, micro_tokens=state.micro_tokens)
    while any(run.micro_batches for run in runs.values()):
        micro_batches = {slot: run.micro_batches.popleft() for slot, run in runs.items() if run.micro_batches}
        forward_backward(state, runs, micro_batches)
    gradients = [
        torch.cat([g.clone().reshape(-1) for pair in run.optimizer.gradients.values() for g in pair])
        for run in runs.values()
    ]
    return [
        (run.finish_update(float(run.optimizer.gradient_norm())), gradient)
        for run, gradient in zip(runs.values(), gradients, strict=True)
    ]


def _last_five(losses: Sequence[float], trial: dict[str, object]) -> float:
    """Loss per target of updates 6 to 10."""
    targets = [
        int(
            TRAIN.num_targets[
                list(batch_rows(len(TRAIN), batch_size=4, seed=trial["training_seed"], step=s))
            ].sum()
        )
        for s in range(6, 11)
    ]
    return sum(loss * n for loss, n in zip(losses[5:], targets, strict=True)) / sum(targets)


OWN = torch.OutOfMemoryError("artificial limit")


def small_memory(state: WorkerState, *, most: int, error: RuntimeError = OWN) -> None:
    """Let the pack of a worker have room for so many trials, as a small GPU has."""
    taken: set[int] = set()

    class Small(Pack):
        def occupy(self, slot: int, adapter: Adapter) -> None:
            if len(taken | {slot}) > most:
                raise error
            taken.add(slot)
            super().occupy(slot, adapter)

    state.pack.__class__ = Small
