"""Which checkpoints nothing needs any more, and why: by a trial's rank, or by what came after its round."""

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
        """What they take on disk."""
        return sum(checkpoint.size_bytes for checkpoint in self.checkpoints)


def outranked(
    trials: Sequence[Trial],
    *,
    keep_best_trials: int | None,
    carried: int = TOP,
    promised: Collection[int] = (),
) -> Iterator[Unneeded]:
    """What `checkpoints.keep_best_trials` gives up of a round as it stands; None is all, so nothing.

    The adapters of the best trials stay, and what longer rounds go on from: resumable checkpoints of the best
    `carried`, and of the `promised` ones, which a plan names. Who has fallen behind never comes back, since a
    trial that has ended changes no more; so nothing is given up too early.
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
    """Trials of a round that keep a resumable checkpoint once all have ended."""
    return num_trials if keep_best_trials is None else min(num_trials, max(keep_best_trials, TOP))


def num_carried_over(num_trials: int, *, passes: int, promotions: Sequence[Promotion]) -> int:
    """The best trials of a round that longer rounds may go on with: three by `study promote`.

    Of `study auto --passes` each pass takes a third of a round's number, of what the passes before have left
    behind. How many passes there are to be, `passes` says, or the plan of an earlier promotion.
    """
    planned = max([passes, *(int(promotion.plan.get("passes", 1)) for promotion in promotions)])
    return TOP if planned == 1 else max(TOP, planned * num_carried(num_trials))


def promised_trials(promotions: Sequence[Promotion], round_name: str) -> set[int]:
    """Trials of a round that the plans of later rounds go on from."""
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
    """What `study clean` can free of a round; `later` are the rounds that began after it.

    Nothing of a trial that has not ended; of a rehearsal, and of a sweep whose answer is in use, all that
    the others have; else the `last` checkpoints, and what is outranked.
    """
    whole = (
        "a rehearsal: nothing was trained"
        if is_rehearsal
        else "a sweep whose answer is in use"
        if record.is_sweep and any(not other.is_sweep for other in later)
        else None
    )
    ended = [trial for trial in trials if trial.state.is_final and trial.checkpoints]
    if whole is not None:
        yield from (Unneeded(trial, trial.checkpoints, whole) for trial in ended)
        return
    limit = None if record.is_sweep else keep_best_trials
    kept = outranked(
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
