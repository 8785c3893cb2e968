"""Passes over the frozen base: updates and evaluations of many trials, in as few passes as memory allows."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from tuner.adapters import PackedRows
from tuner.adapters.dropout import row_keys
from tuner.adapters.evaluation import Scores, TokenGrid, grid, scores_of
from tuner.methods.metrics import ExampleScores, values
from tuner.records import LOSS, Evaluation
from tuner.training.trial_run import MicroBatch, TrialRun
from tuner.training.worker_state import Workplace

_log = logging.getLogger(__name__)


def tick(place: Workplace, runs: Mapping[int, TrialRun]) -> None:
    """One micro-step of every trial; those whose update is whole then step."""
    for run in runs.values():
        if not run.micro_batches:
            run.begin_update(place.train.num_tokens, place.train.num_targets, micro_tokens=place.micro_tokens)
    forward_backward(place, runs, {slot: run.micro_batches.popleft() for slot, run in runs.items()})
    whole = {s: run for s, run in runs.items() if not run.micro_batches and run.reason_infeasible is None}
    if not whole:
        return
    norms = torch.stack([run.optimizer.gradient_norm() for run in whole.values()]).tolist()
    for run, norm in zip(whole.values(), norms, strict=True):
        try:
            run.finish_update(norm)
        except torch.OutOfMemoryError:  # the first update makes the optimizer's moments
            run.reason_infeasible = "out of memory: no room for its optimizer"
    place.pack.load({slot: run.optimizer.weights for slot, run in whole.items()})
    place.meter.trial_steps += len(whole)


def forward_backward(place: Workplace, runs: Mapping[int, TrialRun], tick: Mapping[int, MicroBatch]) -> None:
    """One micro-batch of each trial, in as few passes as memory allows.

    Each trial's loss is divided by the target tokens of its *whole* update; the pass back-propagates
    the sum over trials. Out of memory halves the tokens of a pass and tries the same rows again:
    gradients are collected only after a pass has succeeded. A row that does not fit alone is tried once
    more with fewer activations kept, before its trial is infeasible.
    """
    lengths = place.train.num_tokens
    waiting = _groups(tick, lengths, place.pass_tokens)
    while waiting:
        group = waiting.pop(0)
        slots = tuple(sorted(group))
        losses = _pass(place, runs, group, slots)
        if losses is not None:
            place.pack.collect({slot: runs[slot].optimizer.gradients for slot in slots})
            for slot, loss in zip(slots, losses, strict=True):
                runs[slot].add_loss(loss)
            continue
        torch.cuda.empty_cache()
        if sum(len(micro_batch.rows) for micro_batch in group.values()) > 1:
            place.pass_tokens = max(1, _grid_tokens(group.values(), lengths) // 2)
            _log.warning("out of memory: going on with %d tokens in a pass", place.pass_tokens)
            waiting = [
                part for whole in (group, *waiting) for part in _groups(whole, lengths, place.pass_tokens)
            ]
        elif place.base.keep_fewer_activations():
            _log.warning("out of memory with one row: layers run again in the backward pass from here on")
            waiting.insert(0, group)
        else:
            runs[slots[0]].reason_infeasible = "out of memory alone at micro-batch 1"


def _pass(
    place: Workplace, runs: Mapping[int, TrialRun], group: Mapping[int, MicroBatch], slots: tuple[int, ...]
) -> list[float] | None:
    """Forward and backward; each slot's sum of negative log-likelihoods, or None when out of memory.

    On its own, so that nothing of a pass that failed is still held when its rows are tried again.
    """
    place.pack.zero_gradients()
    try:
        tokens = grid(
            [[place.train[row] for row in group[slot].rows] for slot in slots], device=place.base.device
        )
        height = tokens.input_ids.shape[0] // len(slots)
        place.meter.count_pass(
            micro_steps=len(slots),
            tokens=int(sum(len(place.train[row].input_ids) for slot in slots for row in group[slot].rows)),
            padded_tokens=tokens.input_ids.numel(),
        )
        share = torch.tensor(
            [1.0 / max(1, runs[slot].targets_per_update) for slot in slots], device=place.base.device
        )
        with place.pack.holding(_packed(runs, group, slots, tokens)):
            nll = place.base.token_nll(tokens.input_ids, tokens.rows, tokens.columns)
            torch.autograd.backward((nll * share[tokens.rows // height]).sum())
        return tokens.sum_by_row(nll).view(len(slots), -1).sum(dim=1).tolist()
    except torch.OutOfMemoryError:
        return None


def evaluate(place: Workplace, due: Mapping[int, TrialRun]) -> dict[int, Evaluation]:
    """Evaluate the trials that are due, all in the same passes; one without memory for that is infeasible."""
    base = place.base_evaluation
    known = {slot for slot, run in due.items() if run.step == 0 and base is not None}
    measured = _scores_as_room_allows(place, tuple(sorted(due.keys() - known)))
    made = {}
    for slot, run in due.items():
        try:
            if slot in known and base is not None:
                made[slot] = run.evaluation(base)
            elif (scores := measured[slot]) is not None:
                made[slot] = run.evaluation(measured_evaluation(place, scores))
            else:
                run.reason_infeasible = "out of memory evaluating one example alone"
        except torch.OutOfMemoryError:
            run.reason_infeasible = "out of memory: no room for its best weights"
    return made


def measured_evaluation(place: Workplace, scores: Scores) -> Evaluation:
    """What scores of the evaluation examples come to, the round's objective among it.

    Raises MetricError for a metric of the user's that is at fault.
    """
    tokens, objective = place.evaluation.num_targets.tolist(), place.objective
    examples = ExampleScores(*(np.asarray(each) for each in (scores.nll, tokens, scores.correct)))
    return Evaluation(
        0,
        math.fsum(scores.nll) / sum(tokens),
        example_nll=scores.nll,
        example_tokens=tuple(tokens),
        correct_tokens=sum(scores.correct),
        metrics=values(objective.metric, place.metric, examples),
        objective=None if objective == LOSS or objective.per == "trial" else objective,
    )


def _scores_as_room_allows(place: Workplace, slots: tuple[int, ...]) -> dict[int, Scores | None]:
    """`example_scores` by slot: together, or alone where that takes too much; None where it still does."""
    if not slots:
        return {}
    try:
        return dict(zip(slots, example_scores(place, slots), strict=True))
    except torch.OutOfMemoryError:
        if len(slots) == 1:
            return {slots[0]: None}
    # Here the failed pass and its tensors are gone, which they are not while the error is handled.
    return {slot: found for each in slots for slot, found in _scores_as_room_allows(place, (each,)).items()}


def example_scores(place: Workplace, slots: Sequence[int]) -> list[Scores]:
    """What each slot's adapter makes of the evaluation examples; without slots, what the base does."""
    scores, place.evaluation_tokens = scores_of(
        place.pack,
        place.evaluation,
        slots,
        rows=place.evaluation_rows,
        pass_tokens=place.evaluation_tokens,
    )
    return scores


def _groups(
    tick: Mapping[int, MicroBatch], lengths: np.ndarray, pass_tokens: int
) -> list[dict[int, MicroBatch]]:
    """The tick's micro-batches in passes of at most `pass_tokens` tokens; one too large alone is halved."""
    pending = list(tick.items())
    groups: list[dict[int, MicroBatch]] = []
    while pending:
        slot, micro_batch = pending.pop(0)
        if len(micro_batch.rows) > 1 and _grid_tokens([micro_batch], lengths) > pass_tokens:
            pending[:0] = [(slot, half) for half in micro_batch.halves()]
        elif (
            groups
            and slot not in groups[-1]
            and _grid_tokens([*groups[-1].values(), micro_batch], lengths) <= pass_tokens
        ):
            groups[-1][slot] = micro_batch
        else:
            groups.append({slot: micro_batch})
    return groups


def _grid_tokens(micro_batches: Iterable[MicroBatch], lengths: np.ndarray) -> int:
    """Tokens of a pass over these micro-batches, padding included: each becomes as large as the largest."""
    parts = list(micro_batches)
    tallest = max(len(part.rows) for part in parts)
    longest = max(int(lengths[list(part.rows)].max()) for part in parts)
    return len(parts) * tallest * longest


def _packed(
    runs: Mapping[int, TrialRun], group: Mapping[int, MicroBatch], slots: tuple[int, ...], tokens: TokenGrid
) -> PackedRows:
    if not any(runs[slot].adapter.config.lora_dropout for slot in slots):
        return PackedRows(slots)
    height = tokens.input_ids.shape[0] // len(slots)
    keys = torch.zeros(len(slots), height, dtype=torch.int64, device=tokens.input_ids.device)
    for number, slot in enumerate(slots):
        places = torch.tensor(group[slot].places, device=keys.device)
        keys[number, : len(places)] = row_keys(runs[slot].seed, runs[slot].step + 1, places)
    return PackedRows(slots, keys.view(-1))
