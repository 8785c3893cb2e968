"""Passes over the frozen base model: updates and evaluations of many trials, in as few as memory allows."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.adapters import PackedRows
from tuner.adapters.device_io import one_out_of_memory, read, send
from tuner.adapters.evaluation import Scores, grid, join, scores_of
from tuner.adapters.frozen_linear import row_keys
from tuner.adapters.placement import on
from tuner.methods.metrics import ExampleScores, values
from tuner.records import LOSS, Evaluation
from tuner.training.device_updates import decided, sent_rows
from tuner.training.trial_run import MicroBatch, TrialRun
from tuner.training.worker_state import WorkerState

_log = logging.getLogger(__name__)


def micro_step(state: WorkerState, runs: Mapping[int, TrialRun]) -> None:
    """Run one micro-step of every trial; those whose update is complete then step."""
    for run in runs.values():
        if not run.micro_batches:
            run.begin_update(
                state.train.num_tokens,
                state.train.num_targets,
                micro_tokens=state.micro_tokens,
                joined=state.joins_rows,
            )
    forward_backward(state, runs, {slot: run.micro_batches.popleft() for slot, run in runs.items()})
    whole = {s: run for s, run in runs.items() if not run.micro_batches and run.reason_infeasible is None}
    if not whole:
        return
    _update_on_device({s: run for s, run in whole.items() if run.optimizer.decides_on_device})
    waits = {s: run for s, run in whole.items() if not run.optimizer.decides_on_device}
    if waits:
        _update_by_host(waits, [*runs.values()])
    state.pack.load({slot: run.optimizer.weights for slot, run in whole.items()})
    state.meter.trial_steps += len(whole)
    if _is_read_due(state, runs.values()):
        read_updates(runs.values())
        state.read_at = time.monotonic()


def read_updates(runs: Iterable[TrialRun]) -> None:
    """Read what the device decided of the trials' updates, in one read; nothing if all is known."""
    if not (unread := [(run, run.unread_tally) for run in runs if run.unread_tally is not None]):
        return
    for (run, _), tally in zip(unread, read([tally for _, tally in unread]), strict=True):
        run.read_tally(tally)


def _is_read_due(state: WorkerState, runs: Iterable[TrialRun]) -> bool:
    """Return whether what the device decided matters now: to an evaluation, a checkpoint, or who watches.

    Watching reads at most once a step of the slowest trial.
    """
    training = [run for run in runs if run.reason_infeasible is None]
    unread = [run for run in training if run.unread_tally is not None]
    if any(run.is_due or run.is_at_trunk or run.is_at_horizon for run in unread):
        return True
    return len(unread) == len(training) and time.monotonic() - state.read_at >= state.read_every_seconds


def _update_by_host(whole: Mapping[int, TrialRun], runs: Sequence[TrialRun]) -> None:
    """Read the gradients' norms and all that is unread at once, then step the optimizers."""
    norms = torch.stack([run.optimizer.gradient_norm() for run in whole.values()])
    unread = [(run, run.unread_tally) for run in runs if run.unread_tally is not None]
    found = read(
        [
            norms,
            *(torch.stack(run.unread_losses) for run in whole.values() if run.unread_losses),
            *(tally for _, tally in unread),
        ]
    )
    values = iter(found[1:])
    for run in whole.values():
        if run.unread_losses:
            run.read_losses(next(values))
    for (run, _), tally in zip(unread, values, strict=True):
        run.read_tally(tally)
    for run, norm in zip(whole.values(), found[0], strict=True):
        with _room_for_moments(run):
            run.finish_update(norm)


def _update_on_device(whole: Mapping[int, TrialRun]) -> None:
    """Step the optimizers as the device decides, without waiting for it."""
    if not (runs := [*whole.values()]):
        return
    norms = torch.stack([run.optimizer.gradient_norm() for run in runs])
    nll = torch.stack([torch.stack(run.unread_losses).double().sum() for run in runs])
    (sent,) = send([sent_rows([run.host_side() for run in runs])], norms.device)
    made = decided(norms, nll, sent, [run.unread_tally for run in runs])
    for number, run in enumerate(runs):
        with _room_for_moments(run):
            run.take_update(made, number)


@contextmanager
def _room_for_moments(run: TrialRun) -> Iterator[None]:
    """Within the block a lack of memory ends the trial: the first update makes the optimizer's moments."""
    try:
        with one_out_of_memory():
            yield
    except torch.OutOfMemoryError:
        run.reason_infeasible = "out of memory: no room for its optimizer"


def forward_backward(
    state: WorkerState, runs: Mapping[int, TrialRun], micro_batches: Mapping[int, MicroBatch]
) -> None:
    """Run one micro-batch of each trial, in as few passes as memory allows.

    Each trial's loss is divided by the target tokens of its *whole* update; the pass back-propagates the sum
    over trials. Running out of memory halves the tokens of a pass and tries the same rows again: gradients
    are collected only after a pass has succeeded. A row that does not fit alone is tried once more with fewer
    activations kept, before its trial is infeasible.
    """
    waiting = _groups(micro_batches, state, state.pass_tokens)
    while waiting:
        group = waiting.pop(0)
        slots = tuple(sorted(group))
        losses = _pass(state, runs, group, slots)
        if losses is not None:
            state.pack.collect({slot: runs[slot].optimizer.gradients for slot in slots})
            for slot, loss in zip(slots, losses.unbind(), strict=True):
                runs[slot].add_loss(loss)
            continue
        torch.cuda.empty_cache()
        if sum(len(micro_batch.rows) for micro_batch in group.values()) > 1:
            state.pass_tokens = max(1, padded_tokens(group.values(), state) // 2)
            _log.warning("out of memory: continuing with %d tokens in a pass", state.pass_tokens)
            waiting = [
                part for whole in (group, *waiting) for part in _groups(whole, state, state.pass_tokens)
            ]
        elif state.base.keep_fewer_activations():
            _log.warning("out of memory with one row: from now on layers are recomputed in the backward pass")
            waiting.insert(0, group)
        else:
            runs[slots[0]].reason_infeasible = "out of memory alone at micro-batch 1"


def _pass(
    state: WorkerState, runs: Mapping[int, TrialRun], group: Mapping[int, MicroBatch], slots: tuple[int, ...]
) -> Tensor | None:
    """Run forward and backward; return each slot's summed negative log-likelihood, None if out of memory.

    The sums [slots] stay on the device. A separate function, so that a failed pass holds no memory when its
    rows are tried again.
    """
    state.pack.zero_gradients()
    height = max(len(group[slot].rows) for slot in slots)
    shares = np.array([1.0 / max(1, runs[slot].targets_per_update) for slot in slots], np.float32)
    keys = _dropout_keys(runs, group, slots, height)
    try:
        with one_out_of_memory():
            device, *others = state.pack.devices
            tokens = (join if state.joins_rows else grid)(
                [[state.train[row] for row in group[slot].rows] for slot in slots],
                device=device,
                others=others,
                more=[shares] if keys is None else [shares, keys],
            )
            state.meter.count_pass(
                micro_steps=len(slots),
                tokens=sum(int(state.train.num_tokens[list(group[slot].rows)].sum()) for slot in slots),
                padded_tokens=tokens.input_ids.numel(),
            )
            keys_there = tokens.more[1] if len(tokens.more) > 1 else None
            rows_a_slot = tokens.input_ids.shape[0] // len(slots)
            with state.pack.holding(PackedRows(slots, keys_there, tokens.joined)):
                nll = state.base.token_nll(tokens.input_ids, tokens.rows, tokens.columns)
                share, rows = (on(each, nll.device) for each in (tokens.more[0], tokens.rows))
                torch.autograd.backward((nll * share[rows // rows_a_slot]).sum())
            return tokens.sum_by_row(nll).view(len(slots), -1).sum(dim=1).to(device)
    except torch.OutOfMemoryError:
        return None


def evaluate(state: WorkerState, due: Mapping[int, TrialRun]) -> dict[int, Evaluation]:
    """Evaluate the trials that are due in shared passes; one that does not fit into memory is infeasible."""
    read_updates(due.values())
    base = state.base_evaluation
    known = {s for s, run in due.items() if run.step == 0 and base is not None and run.adapter.has_zero_b}
    measured = _scores_within_memory(state, tuple(sorted(due.keys() - known)))
    made = {}
    for slot, run in due.items():
        try:
            if slot in known and base is not None:
                made[slot] = run.evaluation(base)
            elif (scores := measured[slot]) is not None:
                made[slot] = run.evaluation(measured_evaluation(state, scores))
            else:
                run.reason_infeasible = "out of memory evaluating one example alone"
        except torch.OutOfMemoryError:
            run.reason_infeasible = "out of memory: no room for its best weights"
    return made


def measured_evaluation(state: WorkerState, scores: Scores) -> Evaluation:
    """What scores of the evaluation examples come to, the round's objective among it.

    Raises MetricError for a metric of the user's that is at fault.
    """
    tokens, objective = state.evaluation.num_targets.tolist(), state.objective
    examples = ExampleScores(*(np.asarray(each) for each in (scores.nll, tokens, scores.correct)))
    return Evaluation(
        0,
        math.fsum(scores.nll) / sum(tokens),
        example_nll=scores.nll,
        example_tokens=tuple(tokens),
        correct_tokens=sum(scores.correct),
        metrics=values(objective.metric, state.metric, examples),
        objective=None if objective == LOSS or objective.per == "trial" else objective,
    )


def _scores_within_memory(state: WorkerState, slots: tuple[int, ...]) -> dict[int, Scores | None]:
    """Return `example_scores` by slot: together, or alone if that needs too much memory; None if it still
    does.
    """
    if not slots:
        return {}
    try:
        return dict(zip(slots, example_scores(state, slots), strict=True))
    except torch.OutOfMemoryError:
        if len(slots) == 1:
            return {slots[0]: None}
    # The failed pass and its tensors are freed here, but not while the error is being handled.
    return {slot: found for each in slots for slot, found in _scores_within_memory(state, (each,)).items()}


def example_scores(state: WorkerState, slots: Sequence[int]) -> list[Scores]:
    """Score each slot's adapter on the evaluation examples; without slots, the base model."""
    scores, state.evaluation_tokens = scores_of(
        state.pack,
        state.evaluation,
        slots,
        rows=state.evaluation_rows,
        pass_tokens=state.evaluation_tokens,
    )
    return scores


def _groups(
    micro_batches: Mapping[int, MicroBatch], state: WorkerState, pass_tokens: int
) -> list[dict[int, MicroBatch]]:
    """Group micro-batches into passes of at most `pass_tokens` tokens; halve one that is too large alone."""
    pending = list(micro_batches.items())
    groups: list[dict[int, MicroBatch]] = []
    while pending:
        slot, micro_batch = pending.pop(0)
        if len(micro_batch.rows) > 1 and padded_tokens([micro_batch], state) > pass_tokens:
            pending[:0] = [(slot, half) for half in micro_batch.halves()]
        elif (
            groups
            and slot not in groups[-1]
            and padded_tokens([*groups[-1].values(), micro_batch], state) <= pass_tokens
        ):
            groups[-1][slot] = micro_batch
        else:
            groups.append({slot: micro_batch})
    return groups


def padded_tokens(micro_batches: Iterable[MicroBatch], state: WorkerState) -> int:
    """Return the tokens of a pass over these micro-batches: each padded to the largest."""
    parts, lengths = list(micro_batches), state.train.num_tokens
    if state.joins_rows:
        return len(parts) * max(int(lengths[list(part.rows)].sum()) for part in parts)
    tallest = max(len(part.rows) for part in parts)
    longest = max(int(lengths[list(part.rows)].max()) for part in parts)
    return len(parts) * tallest * longest


def _dropout_keys(
    runs: Mapping[int, TrialRun], group: Mapping[int, MicroBatch], slots: tuple[int, ...], height: int
) -> NDArray[np.int32] | None:
    """Return the keys of the rows of a grid [slots * height]; None if no trial has dropout."""
    if not any(runs[slot].adapter.config.lora_dropout for slot in slots):
        return None
    seeds, steps, rows = np.zeros((3, len(slots), height), dtype=np.int64)
    for number, slot in enumerate(slots):
        seeds[number], steps[number] = runs[slot].seed, runs[slot].step + 1
        rows[number, : len(group[slot].places)] = group[slot].places
    keys: NDArray[np.int32] = row_keys(*(torch.from_numpy(each) for each in (seeds, steps, rows))).numpy()
    return keys.reshape(-1)
