"""Which checkpoints are no longer needed, and why: because of a trial's rank, or of later rounds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from tuner.playbook.promotion import TOP, incumbents
from tuner.playbook.restarts import num_carried
from tuner.records import Checkpoint, CheckpointKind, Promotion, RoundRecord, Trial


@dataclass(frozen=True, slots=True)
class Unneeded:
    """Checkpoints of a trial that has ended."""

    trial: Trial
    checkpoints: tuple[Checkpoint, ...]
    reason: str

    @property
    def paths(self) -> tuple[str, ...]:
        """As in `Checkpoint.path`."""
        return tuple(checkpoint.path for checkpoint in self.checkpoints)

    @property
    def num_bytes(self) -> int:
        """Their size on disk."""
        return sum(checkpoint.size_bytes for checkpoint in self.checkpoints)


def not_retained(
    trials: Sequence[Trial],
    *,
    keep_best_trials: int | None,
    carried: int = TOP,
    promised: Collection[int] = (),
) -> Iterator[Unneeded]:
    """Return the checkpoints that `checkpoints.keep_best_trials` does not keep; None keeps all.

    It keeps the adapters of the best trials, and the checkpoints that longer rounds continue from: resumable
    ones of the best `carried` trials and of the `promised` ones, which a plan names. A trial that has fallen
    behind never comes back, since an ended trial does not change; so nothing is deleted too early.
    """
    if keep_best_trials is None:
        return
    order = [trial.number for trial in incumbents(trials, max(keep_best_trials, carried))]
    best, resumable = order[:keep_best_trials], {*order, *promised}
    for trial in trials:
        if not trial.state.is_final or trial.number in best:
            continue
        given_up = tuple(
            c for c in trial.checkpoints if c.kind == CheckpointKind.BEST or trial.number not in resumable
        )
        if given_up:
            yield Unneeded(trial, given_up, f"not among the best {keep_best_trials}")


def num_kept(num_trials: int, keep_best_trials: int | None) -> int:
    """Return how many trials of a round keep a resumable checkpoint once all have ended."""
    return num_trials if keep_best_trials is None else min(num_trials, max(keep_best_trials, TOP))


def num_carried_over(num_trials: int, *, passes: int, promotions: Sequence[Promotion]) -> int:
    """Return how many of a round's best trials longer rounds may continue: three for `study promote`.

    With `study auto --passes`, each pass takes a third of a round's number, of the trials that the passes
    before have left. `passes`, or the plan of an earlier promotion, sets the number of passes.
    """
    planned = max([passes, *(int(promotion.plan.get("passes", 1)) for promotion in promotions)])
    return TOP if planned == 1 else max(TOP, planned * num_carried(num_trials))


def promised_trials(promotions: Sequence[Promotion], round_name: str) -> set[int]:
    """Return the trials of a round that the plans of later rounds continue."""
    named = [str(entry["trial"]) for plan in promotions for entry in plan.plan.get("continues", ())]
    places = [name.rpartition("/") for name in named]
    return {int(number) for name, _, number in places if name == round_name}


def unneeded(
    record: RoundRecord,
    trials: Sequence[Trial],
    *,
    later: Sequence[RoundRecord],
    promotions: Sequence[Promotion],
    keep_best_trials: int | None,
    is_rehearsal: bool,
) -> Iterator[Unneeded]:
    """Return what `study clean` can free in a round; `later` are the rounds that started after it.

    Nothing of a trial that has not ended; of a rehearsal, and of a sweep whose result is in use, everything
    of the others; else the `last` checkpoints, and those that the retention rule does not keep.
    """
    whole = (
        "a dry run: nothing was trained"
        if is_rehearsal
        else "a sweep whose result is in use"
        if record.is_sweep and any(not other.is_sweep for other in later)
        else None
    )
    ended = [trial for trial in trials if trial.state.is_final and trial.checkpoints]
    if whole is not None:
        yield from (Unneeded(trial, trial.checkpoints, whole) for trial in ended)
        return
    limit = None if record.is_sweep else keep_best_trials
    kept = not_retained(
        trials,
        keep_best_trials=limit,
        carried=num_carried_over(len(trials), passes=1, promotions=promotions),
        promised=promised_trials(promotions, record.name),
    )
    behind = {unneeded.trial.number: unneeded for unneeded in kept}
    for trial in ended:
        found = behind.get(trial.number)
        last = {c for c in trial.checkpoints if c.kind == CheckpointKind.LAST}
        freed = last | set(found.checkpoints if found else ())
        if freed:
            ordered = tuple(c for c in trial.checkpoints if c in freed)
            yield Unneeded(trial, ordered, found.reason if found else "ended")
