"""`study clean`: free checkpoints of finished trials, by the rules of `study/disk.py`."""

from __future__ import annotations

from tuner.api.run import Tell
from tuner.errors import InputError
from tuner.records import CheckpointsRemoved
from tuner.report.format import size
from tuner.store import hold_study
from tuner.study.disk import unneeded
from tuner.study.folder import DRY_RUN, FORMER_DRY_RUN, StudyFolder, open_folder, opened


def clean_study(folder: StudyFolder, *, delete: bool, tell: Tell) -> int:
    """Report what can be freed, also in the study's dry run, and free it with `delete`.

    Returns the total number of bytes.
    """
    dry_runs = _dry_runs(folder)
    if not folder.has_begun and not dry_runs:
        tell("nothing to free: no round has started")
        return 0
    freed = _clean(folder, delete=delete, tell=tell) if folder.has_begun else 0
    for each in dry_runs:
        freed += _clean(each, delete=delete, tell=tell, prefix=f"{each.directory.name}/")
    if freed:
        tell(
            "of a trial listed as (ended), only the last checkpoint is deleted: its best adapter and "
            "its stable checkpoints are kept"
        )
    tell(f"{'freed' if delete else 'can be freed'}: {size(freed)}")
    return freed


def _dry_runs(folder: StudyFolder) -> list[StudyFolder]:
    """Return the study's dry runs that have a round that has started."""
    found = []
    for name in (DRY_RUN, FORMER_DRY_RUN):
        try:
            found.append(open_folder(folder.directory / name))
        except InputError:
            continue
    return [each for each in found if each.has_begun]


def _clean(folder: StudyFolder, *, delete: bool, tell: Tell, prefix: str = "") -> int:
    """Return the bytes of one study that were, or would be, freed."""
    freed = 0
    with hold_study(folder.directory, folder.storage, folder.name), opened(folder) as store:
        rounds = store.rounds()
        for at, record in enumerate(rounds):
            place, file = folder.checkpoints(record.name), folder.file(record.name)
            found = unneeded(
                record,
                store.trials(record.name),
                later=rounds[at + 1 :],
                promotions=store.promotions(),
                keep_best_trials=file.spec.checkpoints.most_kept_trials if file else None,
                is_dry_run=folder.is_dry_run,
            )
            for each in found:
                number = each.trial.number
                freed += each.num_bytes
                tell(f"{prefix}{record.name}/{number}: {size(each.num_bytes)} ({each.reason})")
                if delete:
                    store.record(CheckpointsRemoved(record.name, number, each.paths))
            if delete:
                for trial in store.trials(record.name):
                    if trial.state.is_final:
                        place.clean_up(trial)
    return freed
