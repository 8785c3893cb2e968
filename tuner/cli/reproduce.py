"""`trial reproduce`: a trial run again, shown live, and what that comes to."""

from __future__ import annotations

import typer

from tuner.api.run import rerun_worker
from tuner.cli.printing import PROSE, error_output, next_command, output, spoken_by
from tuner.cli.run import stop_signals
from tuner.errors import Interrupted
from tuner.playbook.reproduction import Agreement
from tuner.records import searched
from tuner.report import dumps, open_view
from tuner.report.reproduction import reproduction_document, reproduction_page
from tuner.study.folder import StudyFolder
from tuner.study.lookup import find_trial
from tuner.study.reproduction import planned_rerun, reproduce


def reproduce_trial(folder: StudyFolder, name: str, *, to_step: int | None, as_json: bool) -> bool:
    """Run a trial again, live on standard error; print what it comes to, and return whether it agrees.

    Raises Interrupted, naming the command that begins again, when a signal asked to stop.
    """
    trial, _ = find_trial(folder, name)
    rerun = planned_rerun(folder, trial, to_step=to_step)
    view = open_view(
        console=error_output(),
        title=f"{folder.name}/{trial.round}, trial {trial.number} again",
        trials_total=1,
        max_train_steps=rerun.record.max_train_steps,
        searched=tuple(searched(rerun.spec.space())),
    )
    limit = "" if to_step is None else f" --to-step {to_step}"
    try:
        with (
            spoken_by(view.message),
            stop_signals("stopping (once more ends at once)") as stopping,
        ):
            found = reproduce(rerun, make_worker=rerun_worker, view=view, stopping=stopping)
    except Interrupted as stop:
        again = next_command(f"tuner trial reproduce {name}{limit}")
        raise Interrupted(f"{stop}; begin again with: {again}") from stop
    finally:
        view.close()
    if as_json:
        typer.echo(dumps(reproduction_document(folder.name, found)))
    else:
        output(piped_width=PROSE).print(reproduction_page(folder.name, found))
    return found.agreement != Agreement.DIFFERS
