"""A study for scripts and notebooks: check, run, promote and inspect its rounds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuner.api.arguments import naming_arguments
from tuner.api.auto import Automatic, restarts_of
from tuner.api.round import Round, evaluations_dataframe, trials_dataframe
from tuner.api.run import (
    Where,
    has_begun,
    interruptible,
    keeping_workers,
    prepared_quietly,
    run_here,
    unsaid,
    view_of,
)
from tuner.api.trial import Trial
from tuner.config import load_round
from tuner.errors import InputError
from tuner.playbook.restarts import Enough
from tuner.playbook.sweep import FirstHorizon
from tuner.report import status_document
from tuner.report.documents import RoundStatus
from tuner.store import Store
from tuner.study.dashboard import command_after
from tuner.study.folder import StudyFolder, open_folder, opened
from tuner.study.lookup import begun_round, find_trial, statuses
from tuner.study.promotion import Overrides, promote_held

if TYPE_CHECKING:
    import pandas as pd

Count = int | Literal["auto"]


class Study:
    """The rounds of a folder, and the results of their trials.

    Every access reads the study's database, so a study that runs in another process is up to date.
    """

    def __init__(self, directory: str | os.PathLike[str] = ".") -> None:
        """Open the study of a folder that holds round files.

        Raises InputError if there is none.
        """
        self._directory = Path(directory)
        self._folder()

    @classmethod
    @naming_arguments
    def new(
        cls,
        directory: str | os.PathLike[str],
        *,
        model: str,
        data: str,
        eval_data: str | None = None,
        format: str | None = None,
        template: str | None = None,
        settings: Sequence[str] = (),
    ) -> Study:
        """Write a commented round1.yaml into a new folder, and open the study.

        Args:
            directory: The folder, created if missing.
            model: Directory or Hub id of the base model.
            data: File or Hub id of the training rows.
            eval_data: Evaluation rows; None holds out some of the training rows.
            format: Format of the rows; None detects it from the columns.
            template: A known recipe to start from: `alpaca-qlora`.
            settings: Values to write into the file, such as `hyperparameters.lora_r=16,32`.

        Raises:
            InputError: if the file exists, or would not pass `check`.
        """
        from tuner.api.new import write_first_round
        from tuner.data import prepare

        write_first_round(
            Path(directory),
            model=model,
            data=data,
            eval_data=eval_data,
            format=format,
            template=template,
            settings=settings,
            prepare=lambda spec, cache, tokenizer: prepare(spec, tokenizer, cache),
            telling=lambda: nullcontext(unsaid),
        )
        return cls(directory)

    @classmethod
    @naming_arguments
    def from_runs(
        cls,
        directory: str | os.PathLike[str],
        runs: Sequence[str | os.PathLike[str]],
        *,
        round: str = "imported",
        metric: str = "eval_loss",
        direction: str | None = None,
        max_train_steps: int | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        command: str | None = None,
        tool: str = "none",
        config: str | None = None,
    ) -> Study:
        """Make a round of finished runs that tuner did not start, and open the study.

        Args:
            directory: The study's folder, created if missing. The runs' own folders are only read.
            runs: Folders of Hugging Face's Trainer, or folders of such folders; JSON lines; CSV files.
            round: Name of the new round.
            metric: The metric that ranks the runs.
            direction: `minimize` or `maximize`; required unless the metric is the loss.
            max_train_steps: The horizon; None takes that of most runs. Runs with another are left out.
            hyperparameters: Values that the files do not contain, the same for all runs, such as `schedule`.
            command: The command that trains a trial, for longer rounds.
            tool: Its `command.tool`.
            config: Its `command.config`.

        Raises:
            InputError: if a run cannot be read, or the round exists; nothing is changed.
        """
        from tuner.api.new import import_finished

        import_finished(
            Path(directory),
            [Path(run) for run in runs],
            round=round,
            metric=metric,
            direction=direction,
            max_train_steps=max_train_steps,
            hyperparameters=hyperparameters or {},
            command=command,
            tool=tool,
            config=config,
        )
        return cls(directory)

    def _folder(self) -> StudyFolder:
        return open_folder(self._directory)

    def __repr__(self) -> str:
        begun = ", ".join(each.name for each in self.rounds) or "no round has started"
        return f"Study({str(self._directory)!r}): {begun}"

    @property
    def name(self) -> str:
        """The study's name in the round files."""
        return self._folder().name

    @property
    def directory(self) -> Path:
        """The study's folder, an absolute path."""
        return self._folder().directory

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The rounds that have started, in that order."""
        folder = self._folder()
        with opened(folder) as store:
            return tuple(Round(folder, record.name) for record in store.rounds())

    def round(self, name: str | None = None) -> Round:
        """Return a round by name, or the latest. Raises InputError if it has not started."""
        folder = self._folder()
        with opened(folder) as store:
            record = folder.latest(store) if name is None else begun_round(store, name)
        return Round(folder, record.name)

    def trial(self, name: str | int) -> Trial:
        """Return the trial that `round1/7`, `7` (of the latest round) or `best` means.

        Raises InputError if there is none.
        """
        folder = self._folder()
        found, _ = find_trial(folder, str(name))
        return Trial(folder, found)

    @property
    def best(self) -> Trial:
        """The best complete trial of the latest round that has one. Raises InputError if there is none."""
        return self.trial("best")

    def status(self) -> dict[str, Any]:
        """Return the state of every round, as `tuner study status --json` prints it."""
        folder = self._folder()
        return status_document(folder.name, standing(folder)[0])

    @naming_arguments
    def check(
        self,
        round_file: str | os.PathLike[str],
        *,
        probe: bool = False,
        engine: str | None = None,
        ray_address: str | None = None,
    ) -> dict[str, Any]:
        """Check a round file, its data and its model, as `tuner study check --json` does.

        Returns a document with `ok`, `errors` with line, key and message, the `plan` and `remarks`. Trains
        and records nothing. `probe` loads the base model in a worker of the engine and times a few steps.
        `engine` and `ray_address` are as in `run`.
        """
        from tuner.api.check import check_document_of
        from tuner.data import prepare

        return check_document_of(
            self._path(round_file),
            prepare=lambda spec, cache, tokenizer: prepare(spec, tokenizer, cache),
            probe=probe,
            where=Where(engine=engine, ray_address=ray_address),
        )

    # --- what changes it --------------------------------------------------------------------------

    @naming_arguments
    def run(
        self,
        round_file: str | os.PathLike[str],
        *,
        slots: Count | None = None,
        workers: Count = "auto",
        engine: str | None = None,
        ray_address: str | None = None,
        seconds: float | None = None,
        progress: bool = True,
    ) -> Round:
        """Start or resume a round.

        Args:
            round_file: A file of the study's folder, or a path.
            slots: Trials trained together; None uses the file's value.
            workers: Number of worker processes; `auto` uses every GPU.
            engine: Where to run; None uses the file's value. `simulated` is a dry run with synthetic losses.
            ray_address: Cluster of the engine `ray`; None uses the file's value, or RAY_ADDRESS.
            seconds: Stop after this long, with all progress saved; the same call resumes.
            progress: Whether to show a bar.

        Raises:
            InputError: if the file, model, data or database cannot be used; nothing is changed.
            Interrupted: after Ctrl-C or a notebook's stop button, with all progress saved; or if time runs
                out before the base model and data are first loaded.
            TunerError: if the round cannot be completed.
        """
        where = Where(slots, workers, engine, ray_address)
        file = where.file(self._path(round_file))
        with interruptible(seconds) as stopping, stopping.returning_at_the_end(lambda: has_begun(file)):
            run_here(file, where, open_view=view_of(progress), stopping=stopping)
        return Study(file.directory).round(file.spec.round)

    @naming_arguments
    def auto(
        self,
        round_file: str | os.PathLike[str],
        *,
        restarts: int | None = None,
        passes: int | None = None,
        slots: Count | None = None,
        workers: Count = "auto",
        engine: str | None = None,
        ray_address: str | None = None,
        seconds: float | None = None,
        progress: bool = True,
    ) -> Round:
        """Run a round, promote it and run the next, until longer rounds bring no more gain.

        The arguments are those of `run`; `restarts` is how often to restart from the shortest horizon,
        reusing all earlier results (default 0). `passes=N`, its former spelling, means `restarts=N - 1`.
        Returns the last round; its `ended_because` gives the reason for the end. Unless interrupted, scores
        the best trial on `data.test`, once. Raises what `run` does.
        """
        number, hint = restarts_of(restarts, passes, spelt=("restarts=", "passes="))
        if hint is not None:
            warnings.warn(hint, DeprecationWarning, stacklevel=2)
        where = Where(slots, workers, engine, ray_address)
        with interruptible(seconds) as stopping, keeping_workers() as engine_named:
            rounds = Automatic(
                first=where.file(self._path(round_file)),
                run=lambda file: run_here(
                    file,
                    where,
                    open_view=view_of(progress),
                    stopping=stopping,
                    restarts=number,
                    engine_named=engine_named,
                ),
                promoted=lambda document: None,
                stopping=stopping,
                restarts=number,
                has_deadline=seconds is not None,
            )
            enough: Enough | None = None
            with stopping.returning_at_the_end(lambda: rounds.last is not None):
                enough = rounds.run_until_enough()
        assert rounds.last is not None
        reason = None if enough is None else enough.reason
        if enough is not None and (remark := rounds.score_the_best(enough, prepared_quietly, unsaid)):
            warnings.warn(remark, stacklevel=2)
        return Round(open_folder(rounds.last.directory), rounds.last.spec.round, reason)

    @naming_arguments
    def sweep(
        self,
        round_file: str | os.PathLike[str],
        *,
        epochs: float | None = None,
        slots: Count | None = None,
        workers: Count = "auto",
        engine: str | None = None,
        ray_address: str | None = None,
        progress: bool = True,
    ) -> int | None:
        """Find a first `max_train_steps`, write it into the round file, and return it.

        Rounds `sweep-N` try learning rates without dropout and weight decay, with N doubling up to
        `run.production_steps`, or up to `epochs`; the other arguments are those of `run`. Returns None if
        the longest run does not fit the training rows: the file then gets a tenth of that length. Raises what
        `run` does, and TunerError if the sweep gives no result.
        """
        from tuner.api.auto import refuse_epochs, sweep_round

        where = Where(slots, workers, engine, ray_address)
        path = self._path(round_file)
        refuse_epochs(epochs, is_dry_run=where.engine_of(load_round(path)) == "simulated")
        file = where.file(path)
        with interruptible(None) as stopping, keeping_workers() as engine_named:
            answer = sweep_round(
                file,
                epochs=epochs,
                run=lambda found: run_here(
                    found,
                    where,
                    open_view=view_of(progress),
                    stopping=stopping,
                    engine_named=engine_named,
                ),
                prepare=prepared_quietly,
                tell=unsaid,
                stopping=stopping,
            )
        return answer.max_train_steps if isinstance(answer, FirstHorizon) else None

    @naming_arguments
    def promote(
        self,
        to: str,
        *,
        from_round: str | None = None,
        max_train_steps: int | None = None,
        top: int | None = None,
        decay: Literal["share", "steps"] = "share",
        add: Sequence[str] = (),
        settings: Sequence[str] = (),
        force: bool = False,
    ) -> Promotion:
        """Read a round, write the next round's file, and return both.

        Args:
            to: Name of the next round, and of its file.
            from_round: The round to promote; None promotes the latest.
            max_train_steps: Horizon of the next round; None uses the suggested one.
            top: Number of best trials to carry over.
            decay: What to keep of a linear decay: its share of the run or its length in steps.
            add: Hyperparameters to search in addition, such as `lora_dropout=0,0.05`.
            settings: Values to write into the file, such as `hyperparameters.lora_r=16,32`.
            force: Whether to overwrite a different file.

        Raises:
            InputError: if the file exists or an argument cannot be used.
            TunerError: if the round suggests no horizon and none is given.
        """
        if isinstance(add, str):
            raise InputError(f"add={add!r}: expects a list of texts; pass [{add!r}]")
        overrides = Overrides(max_train_steps, top, decay, tuple(add), tuple(settings))
        done = promote_held(self._folder(), to=to, from_round=from_round, overrides=overrides, force=force)
        return Promotion(done.path, done.document)

    def _path(self, round_file: str | os.PathLike[str]) -> Path:
        """Resolve a file of the study's folder, or a path relative to the working directory."""
        path = Path(round_file)
        inside = self._directory / path
        return inside if inside.exists() or not path.exists() else path

    @naming_arguments
    def clean(self, *, delete: bool = False) -> int:
        """Return the size in bytes of checkpoints that are no longer needed; with `delete`, delete them.

        Raises StorageError while a round of the study runs.
        """
        from tuner.api.clean import clean_study

        return clean_study(self._folder(), delete=delete, tell=unsaid)

    # --- tables -----------------------------------------------------------------------------------

    def trials_dataframe(self) -> pd.DataFrame:
        """Return a row for each trial of all rounds.

        Columns: round, number, state, reason, best_step, best_eval_loss, settled_step, executed_steps,
        continues, adapter, best_value, and `params_NAME` for each hyperparameter.
        """
        return trials_dataframe(self._trials())

    def evaluations_dataframe(self) -> pd.DataFrame:
        """Return a row for each evaluation of all trials of all rounds.

        Columns: round, number, step, eval_loss, train_loss, learning_rate, token_accuracy, and one for each
        further metric that was measured.
        """
        return evaluations_dataframe(self._trials())

    def _trials(self) -> list[Trial]:
        return [trial for each in self.rounds for trial in each.trials]


@dataclass(frozen=True)
class Promotion:
    """A round file written for the next round.

    `path` is the file, `document` the output of `tuner study promote --json`.
    """

    path: Path
    document: Mapping[str, Any]


def standing(folder: StudyFolder) -> tuple[list[RoundStatus], str]:
    """Return the state of each round of a study, and the next command.

    While a process runs the study, it is a command that only reads.
    """
    with opened(folder) as store:
        found = statuses(folder, store)
        if any(status.state == "running" for status in found):
            return found, "tuner trial list"
        unfinished = next((s for s in found if s.state != "complete"), None)
        if unfinished is not None:
            return found, _going_on(folder, store, unfinished.round)
        return found, command_after(folder, store, folder.latest(store))


def _going_on(folder: StudyFolder, store: Store, round_name: str) -> str:
    """Return the command that resumes a round; a round of a sweep resumes by sweeping its first file."""
    file = next(folder.searches(store), None)
    if file is not None and folder.is_sweep(round_name, store):
        return f"tuner study sweep {file.path.name}"
    return f"tuner study run {_file_name(folder, round_name)}"


def _file_name(folder: StudyFolder, round_name: str) -> str:
    file = folder.file(round_name)
    return file.path.name if file else f"{round_name}.yaml"
