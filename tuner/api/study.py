"""A study, its rounds and its trials, for scripts and notebooks."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuner.api.advice import Advice
from tuner.api.auto import Automatic
from tuner.api.run import Gpus, Where, has_begun, rerun_worker, run_here
from tuner.api.score import prepared_quietly
from tuner.config import RoundFile, RoundSpec
from tuner.errors import InputError, Interrupted
from tuner.playbook import best_evaluation, settled_step
from tuner.playbook.reproduction import Agreement
from tuner.playbook.restarts import Enough
from tuner.playbook.selection import ranked
from tuner.playbook.sweep import FirstHorizon
from tuner.records import Evaluation, Hyperparameters, TrialState
from tuner.records import Trial as RecordedTrial
from tuner.report import View, round_markdown, status_document, write_html
from tuner.report.live import ProgressBar, Silence
from tuner.report.reproduction import reproduction_document
from tuner.study.folder import StudyFolder, open_folder
from tuner.study.lookup import begun_round, find_trial, opened, reports_on, statuses, trials_of
from tuner.study.promotion import Overrides, promote_held
from tuner.study.reproduction import planned_rerun, reproduce
from tuner.study.results import reading_of

if TYPE_CHECKING:
    import pandas as pd
    from peft import PeftModel

Count = int | Literal["auto"]


class Study:
    """The rounds of a folder, and what their trials came to.

    Everything is read from the study's database when it is asked for, so that a study that runs elsewhere
    is seen as it stands.
    """

    def __init__(self, directory: str | os.PathLike[str] = ".") -> None:
        """Open the study of a folder that holds round files.

        Raises InputError when there is none.
        """
        self._directory = Path(directory)
        self._folder()

    @classmethod
    def new(
        cls,
        directory: str | os.PathLike[str],
        *,
        model: str,
        data: str,
        eval_data: str | None = None,
        format: str | None = None,
        template: str | None = None,
    ) -> Study:
        """Write a commented round1.yaml into a new folder, and open the study.

        Args:
            directory: The folder, which is made where it is missing.
            model: Directory or Hub id of the base.
            data: File or Hub id of the training rows.
            eval_data: Evaluation rows; None holds out some of the training rows.
            format: How a row is read; None recognises it by its columns.
            template: A known recipe to begin with: `alpaca-qlora`.

        Raises:
            InputError: where the file exists, or `check` would refuse it.
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
            prepare=lambda spec, cache, tokenizer: prepare(spec, tokenizer, cache),
            telling=lambda: nullcontext(_unsaid),
        )
        return cls(directory)

    def _folder(self) -> StudyFolder:
        return open_folder(self._directory)

    def __repr__(self) -> str:
        begun = ", ".join(each.name for each in self.rounds) or "no round has begun"
        return f"Study({str(self._directory)!r}): {begun}"

    @property
    def name(self) -> str:
        """What the round files call the study."""
        return self._folder().name

    @property
    def directory(self) -> Path:
        """The study's folder, absolute."""
        return self._folder().directory

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The rounds that have begun, in the order of their beginning."""
        folder = self._folder()
        with opened(folder) as store:
            return tuple(Round(folder, record.name) for record in store.rounds())

    def round(self, name: str | None = None) -> Round:
        """Return a round by name, or the latest. Raises InputError when it has not begun."""
        folder = self._folder()
        with opened(folder) as store:
            record = folder.latest(store) if name is None else begun_round(store, name)
        return Round(folder, record.name)

    def trial(self, name: str | int) -> Trial:
        """Return the trial that `round1/7`, `7` (of the latest round) or `best` means.

        Raises InputError when there is none.
        """
        folder = self._folder()
        found, _ = find_trial(folder, str(name))
        return Trial(folder, found)

    @property
    def best(self) -> Trial:
        """The best complete trial of the latest round that has one. Raises InputError before there is one."""
        return self.trial("best")

    def status(self) -> dict[str, Any]:
        """Return where every round stands, as `tuner study status --json` prints it."""
        folder = self._folder()
        with opened(folder) as store:
            return status_document(folder.name, statuses(folder, store))

    def check(self, round_file: str | os.PathLike[str], *, probe: bool = False) -> dict[str, Any]:
        """Look at a round file, its data and its model, and return what `tuner study check --json` prints.

        `ok`, `errors` with line, key and message, the `plan` and `remarks`. Trains nothing, records nothing.
        `probe` loads the base and times a few steps.
        """
        from tuner.api.check import check_document_of
        from tuner.data import prepare

        return check_document_of(
            self._path(round_file),
            prepare=lambda spec, cache, tokenizer: prepare(spec, tokenizer, cache),
            probe=probe,
        )

    # --- what changes it --------------------------------------------------------------------------

    def run(
        self,
        round_file: str | os.PathLike[str],
        *,
        slots: Count | None = None,
        workers: Count = "auto",
        engine: str | None = None,
        seconds: float | None = None,
        progress: bool = True,
    ) -> Round:
        """Run a round, or go on with it: the same call.

        Args:
            round_file: A file of the study's folder, or a path.
            slots: Trials trained together; None is what the file says.
            workers: Processes that train; `auto` is one for each GPU.
            engine: Where; None is what the file says. `simulated` rehearses with made-up losses.
            seconds: Stop after this long, with all progress saved; the same call goes on.
            progress: Whether to show a bar.

        Raises:
            InputError: when file, model, data or database cannot be used; nothing was changed.
            Interrupted: after Ctrl-C or a notebook's stop button; all progress is saved. Also where the time
                is over before base and data are loaded for the first time.
            TunerError: when the round cannot be completed.
        """
        where = Where(slots, workers, engine)
        file = where.file(self._path(round_file))
        with _interruptible(seconds) as stopping, stopping.returning_at_the_end(lambda: has_begun(file)):
            run_here(file, where, open_view=_view(progress), stopping=stopping)
        return Study(file.directory).round(file.spec.round)

    def auto(
        self,
        round_file: str | os.PathLike[str],
        *,
        passes: int = 1,
        slots: Count | None = None,
        workers: Count = "auto",
        engine: str | None = None,
        seconds: float | None = None,
        progress: bool = True,
    ) -> Round:
        """Run a round, promote it and run the next, until longer rounds teach nothing more.

        The arguments are those of `run`; `passes` is how often the first horizon is begun with. Returns the
        last round, whose `ended_because` says why there is no further one. Raises what `run` does.
        """
        where = Where(slots, workers, engine)
        with _interruptible(seconds) as stopping:
            rounds = Automatic(
                first=where.file(self._path(round_file)),
                run=lambda file: run_here(
                    file, where, open_view=_view(progress), stopping=stopping, passes=passes
                ),
                promoted=lambda document: None,
                stopping=stopping,
                passes=passes,
                has_deadline=seconds is not None,
            )
            enough: Enough | None = None
            with stopping.returning_at_the_end(lambda: rounds.last is not None):
                enough = rounds.run_until_enough()
        assert rounds.last is not None
        reason = None if enough is None else enough.reason
        return Round(open_folder(rounds.last.directory), rounds.last.spec.round, reason)

    def sweep(
        self,
        round_file: str | os.PathLike[str],
        *,
        epochs: float | None = None,
        slots: Count | None = None,
        workers: Count = "auto",
        engine: str | None = None,
        progress: bool = True,
    ) -> int | None:
        """Find a first `max_train_steps`, write it into the round file, and return it.

        Rounds `sweep-N` try learning rates without dropout and weight decay, N doubling up to
        `run.production_steps`. `epochs` sets that instead; the other arguments are those of `run`. None where
        the training rows cannot be fitted within the longest run: the file then has a tenth of it. Raises
        what `run` does, and TunerError when the sweep gives no answer.
        """
        from tuner.api.sweep import refuse_epochs, sweep_round

        where = Where(slots, workers, engine)
        file = where.file(self._path(round_file))
        refuse_epochs(epochs, is_rehearsal=where.engine_of(file) == "simulated")
        with _interruptible(None) as stopping:
            answer = sweep_round(
                file,
                epochs=epochs,
                run=lambda found: run_here(found, where, open_view=_view(progress), stopping=stopping),
                prepare=prepared_quietly,
                tell=_unsaid,
            )
        return answer.max_train_steps if isinstance(answer, FirstHorizon) else None

    def promote(
        self,
        to: str,
        *,
        from_round: str | None = None,
        max_train_steps: int | None = None,
        top: int | None = None,
        decay: Literal["share", "steps"] = "share",
        add: Sequence[str] = (),
        force: bool = False,
    ) -> Promotion:
        """Read a round, write the next round's file, and return both.

        Args:
            to: Name of the next round, and of its file.
            from_round: The round to promote; None is the latest.
            max_train_steps: Its horizon; None is the suggested one.
            top: Number of best trials to carry over.
            decay: What to keep of a linear decay: its share of the run, or its length in steps.
            add: Hyperparameters to search in addition, such as `lora_dropout=0,0.05`.
            force: Whether to overwrite a file that says something else.

        Raises:
            InputError: when the file exists or an argument cannot be used.
            TunerError: when the round suggests no horizon and none is given.
        """
        overrides = Overrides(max_train_steps, top, decay, tuple(add))
        done = promote_held(self._folder(), to=to, from_round=from_round, overrides=overrides, force=force)
        return Promotion(done.path, done.document)

    def _path(self, round_file: str | os.PathLike[str]) -> Path:
        """A file of the study's folder, or a path as the working directory sees it."""
        path = Path(round_file)
        inside = self._directory / path
        return inside if inside.exists() or not path.exists() else path

    def clean(self, *, delete: bool = False) -> int:
        """Return the bytes of checkpoints that nothing goes on from any more; with `delete`, free them.

        Raises StorageError while a round of the study runs.
        """
        from tuner.api.clean import clean_study

        return clean_study(self._folder(), delete=delete, tell=_unsaid)

    # --- tables -----------------------------------------------------------------------------------

    def trials_dataframe(self) -> pd.DataFrame:
        """Return a row for each trial of all rounds.

        Columns: round, number, state, reason, best_step, best_eval_loss, settled_step, executed_steps,
        continues, adapter, and `params_NAME` for each hyperparameter.
        """
        return _table([_trial_row(trial) for trial in self._trials()], _TRIAL_COLUMNS)

    def evaluations_dataframe(self) -> pd.DataFrame:
        """Return a row for each evaluation of all trials of all rounds.

        Columns: round, number, step, eval_loss, train_loss, learning_rate, token_accuracy.
        """
        rows = [row for trial in self._trials() for row in _evaluation_rows(trial)]
        return _table(rows, _EVALUATION_COLUMNS)

    def _trials(self) -> list[Trial]:
        return [trial for each in self.rounds for trial in each.trials]


@dataclass(frozen=True)
class Promotion:
    """A round file that was written for a next round.

    `path` is the file, `document` what `tuner study promote --json` prints.
    """

    path: Path
    document: Mapping[str, Any]


@dataclass(frozen=True)
class Reproduction:
    """What running a trial again came to.

    `agrees` says whether the curves agree, `document` is what `tuner trial reproduce --json` prints.
    """

    agrees: bool
    document: Mapping[str, Any]


class Round:
    """One round of a study: trials that train for the same number of steps."""

    def __init__(self, folder: StudyFolder, name: str, ended_because: str | None = None) -> None:
        self._study = folder
        self.name = name
        self.ended_because = ended_because
        """Why `Study.auto` ran no further round after it; None for any other."""

    def __repr__(self) -> str:
        return f"Round({self.name!r}): {len(self.trials)} trials of {self.max_train_steps} steps"

    @property
    def max_train_steps(self) -> int:
        """The horizon of its trials."""
        with opened(self._study) as store:
            return begun_round(store, self.name).max_train_steps

    @property
    def state(self) -> str:
        """`running`, `open` (trials are missing and nobody runs them) or `complete`."""
        with opened(self._study) as store:
            return next(s.state for s in statuses(self._study, store) if s.round == self.name)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Its trials by number."""
        with opened(self._study) as store:
            return tuple(Trial(self._study, each) for each in trials_of(self._study, store, self.name))

    @property
    def best(self) -> Trial | None:
        """The best complete trial by the round's objective; None before there is one."""
        with opened(self._study) as store:
            order = ranked(store.trials(self.name))
        return Trial(self._study, order[0][0]) if order else None

    @property
    def advice(self) -> Advice:
        """What the round says of its horizon, and how long to train next."""
        with opened(self._study) as store:
            record = begun_round(store, self.name)
            _, reading = reading_of(store, record)
        return Advice(reading, record.max_train_steps)

    def report(
        self, html: str | os.PathLike[str] | None = None, *, markdown: str | os.PathLike[str] | None = None
    ) -> str:
        """Return the report as Markdown; write it as a self-contained page and as Markdown where asked.

        Raises InputError where a file cannot be written.
        """
        *earlier, report = reports_on(self._study, Path(self.name))
        text = round_markdown(report)
        try:
            if html is not None:
                write_html(Path(html), report, earlier=earlier)
            if markdown is not None:
                Path(markdown).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be written: {error.strerror}") from error
        return text


class Trial:
    """One configuration, as it stood when it was asked for."""

    def __init__(self, folder: StudyFolder, recorded: RecordedTrial) -> None:
        self._study = folder
        self._recorded = recorded

    def __repr__(self) -> str:
        loss = "" if self.best_eval_loss is None else f", {self.best_eval_loss:.4f} at step {self.best_step}"
        return f"Trial({self.name!r}): {self.state}{loss}"

    @property
    def name(self) -> str:
        """`round1/7`."""
        return f"{self.round}/{self.number}"

    @property
    def round(self) -> str:
        """Name of its round."""
        return self._recorded.round

    @property
    def number(self) -> int:
        """Its number in the round."""
        return self._recorded.number

    @property
    def state(self) -> TrialState:
        """waiting, running, complete, pruned, infeasible or failed."""
        return self._recorded.state

    @property
    def reason(self) -> str | None:
        """Why it is infeasible, pruned or failed; or why it started over although it was to go on."""
        return self._recorded.reason

    @property
    def hyperparameters(self) -> Hyperparameters:
        """All of them, by name, the fixed ones included."""
        return dict(self._recorded.hyperparameters)

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """By step: eval_loss, train_loss, learning_rate and the losses of single examples."""
        return self._recorded.evaluations

    @property
    def best_step(self) -> int | None:
        """Step of the lowest evaluation loss; None before there is a finite one."""
        best = best_evaluation(self._recorded.evaluations)
        return None if best is None else best.step

    @property
    def best_eval_loss(self) -> float | None:
        """The evaluation loss there."""
        best = best_evaluation(self._recorded.evaluations)
        return None if best is None else best.eval_loss

    @property
    def settled_step(self) -> int | None:
        """The earliest step that is not worse than the best one beyond noise."""
        return settled_step(self._recorded.evaluations)

    @property
    def executed_steps(self) -> int:
        """Steps really run, those repeated after a crash included, those inherited not."""
        return self._recorded.executed_steps

    @property
    def continues(self) -> str | None:
        """The checkpoint it went on from, as `round1/3@36`; None where it began at step 0."""
        return None if self._recorded.continues is None else str(self._recorded.continues)

    @property
    def adapter(self) -> Path | None:
        """Directory of the adapter of its best step, which PEFT loads; None where there is none."""
        link = self._study.adapter(self._recorded)
        return None if link is None else Path(link)

    def export(
        self,
        to: str | os.PathLike[str],
        *,
        merge: bool = False,
        dtype: str | None = None,
        force: bool = False,
    ) -> Path:
        """Write the best adapter as a PEFT directory with tokenizer and model card; return the directory.

        Args:
            to: The directory, which has to be missing or empty.
            merge: Whether to write a whole model instead, the adapter added into the base's weights.
            dtype: Type of merged weights; None is bfloat16.
            force: Whether to replace an earlier export.

        Raises:
            InputError: for a trial that is not complete, or a directory that cannot be used.
        """
        from tuner.api.export import Export, export_trial, finished_trial

        wanted = Export(to=Path(to), merge=merge, dtype=dtype, force=force)
        finished = finished_trial(self._study, self.name)
        export_trial(finished, wanted, study=self._study.directory, tell=_unsaid, warn=_warn)
        return Path(to)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        system: str = "",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Return the answers of the best adapter, in the template it was trained on.

        Loads base and adapter for each call: give all prompts at once. Without a temperature the likeliest
        token is taken. Raises InputError for a trial without an adapter or a prompt that cannot be asked.
        """
        from tuner.data import load_tokenizer, render_prompt

        spec, adapter = self._trained()
        source, tokenizer = spec.data.train[0], load_tokenizer(spec.model)
        asked = [
            render_prompt(
                source.format, tokenizer, instruction=prompt, system=system, template=source.template
            )
            for prompt in ([prompts] if isinstance(prompts, str) else prompts)
        ]
        from tuner.inference import Answerer, Decoding, batches  # after what can be wrong: it loads torch

        decoding = Decoding(max_new_tokens, temperature, top_k, top_p, seed)
        answerer = Answerer(spec.model, tokenizer, adapter=adapter)
        together = batches(
            [len(prompt.ids) for prompt in asked],
            [answerer.new_tokens(prompt, max_new_tokens) for prompt in asked],
            budget_tokens=answerer.budget_tokens,
            most_rows=None,
        )
        texts: dict[int, str] = {}
        for batch in together:
            said = answerer.answers([asked[at] for at in batch], decoding)
            texts |= {at: generated.text for at, generated in zip(batch, said, strict=True)}
        return [texts[at] for at in range(len(asked))]

    def reproduce(self, *, to_step: int | None = None, progress: bool = True) -> Reproduction:
        """Run the trial again, alone, and return whether its curve agrees; the study stays as it is.

        `to_step` runs the first steps only. Raises InputError for a trial without a result, Interrupted after
        Ctrl-C.
        """
        rerun = planned_rerun(self._study, self._recorded, to_step=to_step)
        view = _shown(progress, f"{self.name} again", 1, rerun.record.max_train_steps)
        try:
            with _interruptible(None) as stopping:
                found = reproduce(rerun, make_worker=rerun_worker, view=view, stopping=stopping)
        finally:
            view.close()
        document = reproduction_document(self._study.name, found)
        return Reproduction(found.agreement != Agreement.DIFFERS, document)

    def load(self, *, device: str | None = None) -> PeftModel:
        """Return the base model with the trial's best adapter, ready to generate.

        The base is loaded as its round loads it, quantised where the file says so. `device` is one of
        torch's; None takes a GPU where there is one. Raises InputError for a trial without an adapter,
        ModelError for a base that cannot be loaded.
        """
        from tuner.inference.generation import load_adapted

        spec, adapter = self._trained()
        return load_adapted(spec.model, adapter, device=device)

    def _trained(self) -> tuple[RoundSpec, Path]:
        """The round file as it was trained, and the adapter. Raises InputError without one."""
        from tuner.data.pretrained import as_trained

        if self.adapter is None:
            raise InputError(f"{self.name} is {self.state} and has no adapter; see Study.trials_dataframe()")
        return as_trained(self._study.plan(self.round).absolute, self.adapter), self.adapter.resolve()


# --- tables ---------------------------------------------------------------------------------------

_TRIAL_COLUMNS = (
    "round", "number", "state", "reason", "best_step", "best_eval_loss", "settled_step", "executed_steps",
    "continues", "adapter",
)  # fmt: skip
_EVALUATION_COLUMNS = (
    "round", "number", "step", "eval_loss", "train_loss", "learning_rate", "token_accuracy",
)  # fmt: skip


def _trial_row(trial: Trial) -> dict[str, Any]:
    adapter = None if trial.adapter is None else str(trial.adapter)
    own = {name: getattr(trial, name) for name in _TRIAL_COLUMNS} | {
        "state": trial.state.value,
        "adapter": adapter,
    }
    return own | {f"params_{name}": value for name, value in trial.hyperparameters.items()}


def _evaluation_rows(trial: Trial) -> Iterator[dict[str, Any]]:
    for made in trial.evaluations:
        values = {name: getattr(made, name) for name in _EVALUATION_COLUMNS[2:]}
        yield {"round": trial.round, "number": trial.number, **values}


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    more = list(dict.fromkeys(name for row in rows for name in row if name not in columns))
    return pd.DataFrame(rows, columns=[*columns, *more])


# --- running --------------------------------------------------------------------------------------


def _view(progress: bool) -> Callable[[RoundFile, Gpus | None], View]:
    def view(file: RoundFile, gpus: Gpus | None) -> View:
        spec = file.spec
        return _shown(progress, f"{spec.study}/{spec.round}", spec.num_trials, spec.max_train_steps)

    return view


def _shown(progress: bool, title: str, trials_total: int, max_train_steps: int) -> View:
    if not progress:
        return Silence()
    return ProgressBar(title=title, trials_total=trials_total, max_train_steps=max_train_steps)


def _unsaid(text: str) -> None:
    """What the command line prints and a caller reads off the result."""


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


@dataclass
class _Stopping:
    """Whether to stop: an interrupt came, or the time is over."""

    deadline: float | None
    was_interrupted: bool = False

    def __call__(self) -> bool:
        return self.was_interrupted or (self.deadline is not None and time.monotonic() > self.deadline)

    @contextmanager
    def returning_at_the_end(self, has_begun: Callable[[], bool]) -> Iterator[None]:
        """The end of the time is no failure, where there is a round to return."""
        try:
            yield
        except Interrupted:
            if self.was_interrupted or not has_begun():
                raise


@contextmanager
def _interruptible(seconds: float | None) -> Iterator[_Stopping]:
    """Ctrl-C or a notebook's stop button asks to stop; a second one ends at once.

    Signals are the main thread's: on any other there is only the time.
    """
    stopping = _Stopping(None if seconds is None else time.monotonic() + seconds)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = signal.getsignal(signal.SIGINT)

    def receive(number: int, _: object) -> None:
        stopping.was_interrupted = True
        signal.signal(number, before)

    signal.signal(signal.SIGINT, receive)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGINT, before)
