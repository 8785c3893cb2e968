"""One trial in a worker: its rows in micro-batches, its updates, its evaluations, its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tuner.adapters import Adapter
from tuner.adapters.device_io import read
from tuner.data import batch_rows
from tuner.methods.table import seed_of
from tuner.playbook import best_evaluation
from tuner.playbook.schedule import evaluation_steps, inherited_evaluations, multiplier
from tuner.records import Assignment, Checkpoint, CheckpointKind, Evaluation
from tuner.training.checkpoints import Snapshot, Weights, publish_best, publish_snapshot
from tuner.training.device_updates import (
    BAD,
    COUNTERS,
    LOSS,
    MAX_BAD_UPDATES,
    RESTS_AT,
    SKIPPED,
    SUMMED,
    Decided,
    HostSide,
    is_bad_update,
)
from tuner.training.disk_room import DiskRoom
from tuner.training.optimizer import TrialOptimizer


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of one trial's update, with the position of each in the whole batch."""

    rows: tuple[int, ...]
    """Indices of the training examples."""
    places: tuple[int, ...]
    """Position of each row in the update's batch: the counter of its dropout."""

    def halves(self) -> tuple[MicroBatch, MicroBatch]:
        """Return the same rows in two micro-batches."""
        middle = (len(self.rows) + 1) // 2
        return (
            MicroBatch(self.rows[:middle], self.places[:middle]),
            MicroBatch(self.rows[middle:], self.places[middle:]),
        )


def cut(rows: Sequence[int], lengths: np.ndarray, *, micro_tokens: int) -> list[MicroBatch]:
    """Cut a batch into micro-batches of rows of similar length, longest first.

    A micro-batch has at most `micro_tokens` tokens, padding included, but always at least one row.
    """
    order = sorted(range(len(rows)), key=lambda place: (-int(lengths[rows[place]]), place))
    parts: list[MicroBatch] = []
    while order:
        longest = max(1, int(lengths[rows[order[0]]]))
        part = order[: max(1, micro_tokens // longest)]
        order = order[len(part) :]
        parts.append(MicroBatch(tuple(rows[place] for place in part), tuple(part)))
    return parts


def cut_joined(rows: Sequence[int], lengths: np.ndarray, *, micro_tokens: int) -> list[MicroBatch]:
    """Cut a batch into micro-batches of about as many tokens each, the one with the most first.

    They are as few as possible with at most `micro_tokens` tokens, but always at least one row, in each. The
    longest row goes first, each into the micro-batch with the fewest tokens.
    """
    of_rows = [max(1, int(lengths[row])) for row in rows]
    order = sorted(range(len(rows)), key=lambda place: (-of_rows[place], place))
    num_parts = -(-sum(of_rows) // micro_tokens)
    while True:
        parts: list[list[int]] = [[] for _ in range(min(num_parts, len(rows)))]
        tokens = [0] * len(parts)
        for place in order:
            emptiest = tokens.index(min(tokens))
            parts[emptiest].append(place)
            tokens[emptiest] += of_rows[place]
        if all(count <= micro_tokens or len(part) == 1 for count, part in zip(tokens, parts, strict=True)):
            break
        num_parts += 1
    by_tokens = sorted(range(len(parts)), key=lambda number: -tokens[number])
    return [MicroBatch(tuple(rows[place] for place in parts[n]), tuple(parts[n])) for n in by_tokens]


class TrialRun:
    """A trial between its first and last step in this worker. Its clock is its own `step`."""

    def __init__(
        self,
        assignment: Assignment,
        start: Adapter,
        *,
        device: torch.device,
        places: Mapping[str, torch.device] | None = None,
    ) -> None:
        """`places` has the device of each module, if they are on several; `device` is the first."""
        self.assignment = assignment
        self.adapter = start
        self.step = 0
        self.evaluations: list[Evaluation] = []
        self.best_weights: Weights | None = None
        self.reason_infeasible: str | None = None
        self.train_loss: float | None = None
        """Of the update at `loss_step` in this attempt, in nats per target token."""
        self.loss_step = 0
        """The last step whose loss the host has read."""
        self.unread_tally: Tensor | None = None
        """Of the updates since then, still on the device (`device_updates`)."""
        self.optimizer = TrialOptimizer(
            start.weights, assignment.hyperparameters, device=device, places=places
        )
        self.micro_batches: deque[MicroBatch] = deque()
        self.unread_losses: list[Tensor] = []
        """Of the update's micro-batches, still on the device."""
        self.room = DiskRoom()
        """Where its checkpoints go."""
        self.last_saved_step: int | None = None
        """Of the `last` checkpoint of this attempt."""
        self._update_nll = 0.0
        self._update_targets = 0
        self._counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self._sums: dict[int, tuple[float, ...]] = {}
        """Sums over the updates up to each evaluation from the one before it, by step."""
        self._evaluation_steps = frozenset(
            evaluation_steps(assignment.max_train_steps, assignment.evaluate_every)
        )

    @property
    def seed(self) -> int:
        """Return the seed of initialisation, data order and dropout."""
        return seed_of(self.assignment.hyperparameters)

    @property
    def best_step(self) -> int | None:
        """Return the step of the best evaluation so far."""
        best = best_evaluation(self.evaluations)
        return None if best is None else best.step

    @property
    def targets_per_update(self) -> int:
        """Return the target tokens of the whole update, by which its loss is divided."""
        return self._update_targets

    # --- resuming from a checkpoint ---------------------------------------------------------------

    def restore(self, snapshot: Snapshot) -> None:
        """Resume from `snapshot`, with the evaluations that are also steps of this horizon."""
        self.step = snapshot.step
        self.optimizer.load_state(snapshot.optimizer)
        self._counters.update(snapshot.counters)
        inherited = inherited_evaluations(snapshot.evaluations, snapshot.step, self._evaluation_steps)
        self.evaluations = list(inherited)
        last = self.evaluations[-1].step if self.evaluations else 0
        self._sums = {step: sums for step, sums in snapshot.sums.items() if step <= last}
        left_out = [sums for step, sums in snapshot.sums.items() if step > last]
        for number, name in enumerate(SUMMED):  # sums since these evaluations count towards the next one
            self._counters[name] = sum([*(sums[number] for sums in left_out), self._counters[name]])
        self.best_weights = _copy(snapshot.best if snapshot.best is not None else snapshot.adapter.weights)
        if self._counters["bad"] >= MAX_BAD_UPDATES:  # it was stopped before it could end
            self._end_by_bad_updates()

    def snapshot(self) -> Snapshot:
        """Return the state after the last complete update, for `restore`."""
        assert self.unread_tally is None
        return Snapshot(
            step=self.step,
            adapter=Adapter(self.adapter.config, self.optimizer.weights),
            optimizer=self.optimizer.state(),
            evaluations=tuple(self.evaluations),
            best=self.best_weights,
            counters=dict(self._counters),
            sums=dict(self._sums),
        )

    # --- an update --------------------------------------------------------------------------------

    def begin_update(
        self, lengths: np.ndarray, num_targets: np.ndarray, *, micro_tokens: int, joined: bool = False
    ) -> None:
        """Cut the next update's batch into micro-batches, of joined rows or of padded ones."""
        hyperparameters = self.assignment.hyperparameters
        rows = batch_rows(
            len(lengths),
            batch_size=int(hyperparameters["batch_size"]),  # type: ignore[arg-type]
            seed=self.seed,
            step=self.step + 1,
        )
        self.micro_batches = deque((cut_joined if joined else cut)(rows, lengths, micro_tokens=micro_tokens))
        self._update_targets = int(num_targets[list(rows)].sum())
        self._update_nll = 0.0
        self.unread_losses.clear()
        self.optimizer.zero_gradients()

    def add_loss(self, nll: float | Tensor) -> None:
        """Count a micro-batch's negative log-likelihood; a tensor is kept for `read_losses`."""
        if isinstance(nll, Tensor):
            self.unread_losses.append(nll)
        else:
            self._update_nll += nll

    def read_losses(self, values: Sequence[float]) -> None:
        """Count the values of `unread_losses`."""
        self.unread_losses.clear()
        for value in values:
            self.add_loss(value)

    def finish_update(self, norm: float) -> float:
        """Step the optimizer; returns the update's train loss, in nats per target token.

        `norm` is the gradient's, from `TrialOptimizer.gradient_norm`.
        """
        if self.unread_losses:
            self.read_losses(*read([torch.stack(self.unread_losses)]))
        rate, clipped = self.optimizer.step(self._multiplier(), norm=norm)
        self.step += 1
        counters = self._counters
        counters["nll"] += self._update_nll
        counters["targets"] += self._update_targets
        counters["clipped"] += clipped
        counters["rate"] = rate
        counters["bad"] = counters["bad"] + 1 if is_bad_update(norm, self._update_nll) else 0.0
        self.loss_step = self.step
        self.train_loss = self._update_nll / max(1, self._update_targets)
        if counters["bad"] >= MAX_BAD_UPDATES:
            self._end_by_bad_updates()
        return self.train_loss

    # --- an update that the device decides --------------------------------------------------------

    def host_side(self) -> HostSide:
        """Return what the device needs to know of the update whose micro-batches have all run."""
        return HostSide(
            step=self.step + 1,
            rate=self.optimizer.rate(self._multiplier()),
            targets=self._update_targets,
            max_norm=self.optimizer.max_norm,
            tally=(*self._counters.values(), 0.0, 0.0, 0.0),
            counts_on_host=self.optimizer.counts_on_host,
        )

    def take_update(self, decided: Decided, number: int) -> None:
        """Step the optimizer as the device decided for the trial of this number, without waiting for it."""
        self.optimizer.step_on_device(self._multiplier(), orders=decided.orders, number=number)
        self.unread_tally = decided.tallies[number]
        self.unread_losses.clear()
        self.step += 1

    def read_tally(self, tally: Sequence[float]) -> None:
        """Count the values of `unread_tally`.

        A trial that rests on the device goes back to the step at which that began. It is infeasible, or goes
        on from there.
        """
        self.unread_tally = None
        self._counters.update(zip(COUNTERS, tally, strict=False))
        self.train_loss = tally[LOSS]
        if rests_at := int(tally[RESTS_AT]):
            self.optimizer.count_back(self.step - rests_at + int(tally[SKIPPED]))
            self.step = rests_at
            self.micro_batches.clear()
            if tally[BAD] >= MAX_BAD_UPDATES:
                self._end_by_bad_updates()
        self.loss_step = self.step

    def _multiplier(self) -> float:
        return multiplier(self.step, self.assignment.hyperparameters, self.assignment.max_train_steps)

    def _end_by_bad_updates(self) -> None:
        self.reason_infeasible = (
            f"gradient zero or not finite in {MAX_BAD_UPDATES} updates in a row, the last at step {self.step}"
        )

    # --- an evaluation ----------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Return whether the trial is to be evaluated now."""
        return self.step in self._evaluation_steps and not any(e.step == self.step for e in self.evaluations)

    @property
    def is_at_horizon(self) -> bool:
        """Return whether it has run all its steps."""
        return self.step >= self.assignment.max_train_steps

    @property
    def is_at_trunk(self) -> bool:
        """Return whether to keep a checkpoint for longer rounds now."""
        return self.step in self.assignment.trunk_steps

    def evaluation(self, measured: Evaluation) -> Evaluation:
        """Record what was measured at this step, with how training went since the evaluation before."""
        assert self.unread_tally is None
        counters = self._counters
        trained = self.step > 0
        made = replace(
            measured,
            step=self.step,
            train_loss=counters["nll"] / max(1.0, counters["targets"]) if trained else None,
            learning_rate=counters["rate"] if trained else None,
            clipped_updates=int(counters["clipped"]),
        )
        self._sums[self.step] = tuple(counters[name] for name in SUMMED)
        counters.update(dict.fromkeys(SUMMED, 0.0))
        self.evaluations.append(made)
        if self.best_step == self.step:
            self.best_weights = _copy(self.optimizer.weights)
        return made

    # --- checkpoints ------------------------------------------------------------------------------

    def save_best(self) -> Checkpoint | None:
        """Publish the best step's adapter under the link `best`; None if no evaluation is finite."""
        if self.best_step is None or self.best_weights is None:
            return None
        directory, weights, step = Path(self.assignment.directory), self.best_weights, self.best_step
        return self.room.written(
            directory,
            lambda: publish_best(
                directory, self.adapter, weights, step=step, attempt=self.assignment.attempt
            ),
        )

    def save(self, kind: CheckpointKind) -> Checkpoint:
        """Publish a resumable checkpoint of this step."""
        directory, snapshot = Path(self.assignment.directory), self.snapshot()
        checkpoint = self.room.written(
            directory,
            lambda: publish_snapshot(directory, snapshot, kind=kind, attempt=self.assignment.attempt),
        )
        if kind == CheckpointKind.LAST:
            self.last_saved_step = self.step
        return checkpoint


def _copy(weights: Weights) -> dict[str, tuple[Tensor, ...]]:
    return {name: tuple(part.detach().clone() for part in parts) for name, parts in weights.items()}
