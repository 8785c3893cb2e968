"""What `study clean` frees: the `last` checkpoints of trials that have ended."""

from __future__ import annotations

import typer

from tuner.records import CheckpointKind
from tuner.report.format import size
from tuner.store import hold_study
from tuner.store.facts import CheckpointsRemoved
from tuner.study.folder import StudyFolder


def clean_study(folder: StudyFolder, *, delete: bool) -> None:
    """Print what can be freed, and free it with `delete`. Adapters and trunks stay."""
    if not folder.has_begun:
        typer.echo("nothing to free: no round has begun")
        return
    freed = 0
    with hold_study(folder.directory, folder.storage, folder.name):
        store = folder.open()
        try:
            for record in store.rounds():
                place = folder.checkpoints(record.name)
                for trial in store.trials(record.name):
                    surplus = [c for c in trial.checkpoints if c.kind == CheckpointKind.LAST]
                    if not trial.state.is_final or not surplus:
                        continue
                    num_bytes = sum(c.size_bytes for c in surplus)
                    freed += num_bytes
                    typer.echo(f"{record.name}/{trial.number}: {size(num_bytes)} (ended)")
                    if delete:
                        paths = tuple(c.path for c in surplus)
                        place.delete(paths)
                        store.record(CheckpointsRemoved(record.name, trial.number, paths))
        finally:
            store.close()
    typer.echo("only a round of the same horizon would go on from these; adapters and trunks stay")
    typer.echo(f"{'freed' if delete else 'can be freed'}: {size(freed)}")
