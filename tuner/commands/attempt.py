"""One attempt of a trial: start its command, hear what it reports, keep its checkpoints, judge its end."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tuner.commands import outcome, process_tree
from tuner.commands.fallback import Fallback, files_below
from tuner.commands.kept import Keeper, Kept, copy_to_resume, is_whole, read_kept, resolved
from tuner.commands.launch import Launch, Place, prepared
from tuner.commands.reported import Line, MetricsFile, SavedByCommand, not_finite
from tuner.config import CommandSpec, RoundSpec
from tuner.errors import CheckpointError, InputError
from tuner.methods.tools import tool
from tuner.playbook import best_evaluation
from tuner.records import (
    Assignment,
    Checkpoint,
    CheckpointKind,
    Ended,
    Evaluated,
    Evaluation,
    Event,
    Objective,
    Outcome,
    Progressed,
    Saved,
    Started,
)

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
FALLBACK_SECONDS = 2.0
"""Between two looks at the logs of the command's tool, while nothing is reported."""
_FULL_BYTES = 256 * 1024
"""With less free, a failed command may have failed for it."""
_LOG_TAIL_BYTES = 64 * 1024


class Unusable(InputError):
    """A command that every trial would fail with; the round stops."""


@dataclass
class Round:
    """What the attempts of one worker process share."""

    spec: RoundSpec
    """The round's file with absolute paths."""
    directory: Path
    """The round file's folder, in which commands run."""
    objective: Objective
    environment: dict[str, str]
    """As in `Attempt.environment`."""
    base: Evaluation | None = None
    """Evaluation at step 0, once a trial has made it."""
    has_reported: bool = False
    """Whether any trial has reported an evaluation after step 0."""
    has_completed: bool = False
    """Whether any trial has reached its horizon."""

    @property
    def command(self) -> CommandSpec:
        """Return the file's command."""
        assert self.spec.command is not None
        return self.spec.command

    @property
    def is_trainers(self) -> bool:
        """Return whether the command trains with Hugging Face's Trainer."""
        return tool(self.command.tool).has_hook

    @property
    def resumes(self) -> bool:
        """Return whether the command can resume from a checkpoint."""
        return self.is_trainers or bool(self.command.resume)

    @property
    def shares_the_base(self) -> bool:
        """Return whether all trials have the same evaluation at step 0.

        Of a Trainer's, unless a setting of the tool's own is searched, which may change what is evaluated.
        """
        free = [name for name in self.spec.hyperparameters if name.startswith("extra.")]
        fixed = all(not isinstance(self.spec.hyperparameters[name], (list, dict)) for name in free)
        return self.is_trainers and fixed


@dataclass
class Attempt:
    """An attempt that runs."""

    round: Round
    assignment: Assignment
    say: Callable[[Event], None]
    on_start: Callable[[str], None]
    """Called with the token of the command's processes before they start."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """The trial's curve: what is inherited and what is reported."""
    kept_best: tuple[int, Path] | None = None
    """The best step that has a kept checkpoint, and its folder."""
    reported: list[SavedByCommand] = field(default_factory=list)
    """Checkpoints that are not looked at yet, or not whole: other processes may still write to them."""
    saved: dict[int, Path] = field(default_factory=dict)
    """Checkpoints of the command that are still in its output folder, by step."""
    from_step: int = 0
    step: int = 0
    """The last step heard of."""
    kept_step: int = 0
    """The step to resume from if the attempt ended now."""
    _last_said: float = 0.0
    _looked_at: float = 0.0

    def run(self, stopping: Callable[[], bool]) -> None:
        """Run the command to its end, or until `stopping`.

        Raises Unusable, without an `Ended`, for a command that no trial can use.
        """
        place = Place(Path(self.assignment.directory) / f"attempt-{self.assignment.attempt}")
        token = process_tree.new_token()
        try:
            self._run(place, token, stopping)
        except CheckpointError as error:
            _log.error("%s", error)
            self.end("failed", str(error))
        except InputError as error:
            process_tree.end(token)
            raise Unusable(f"trial {self.assignment.trial}: {error}") from error
        except OSError as error:  # such as a full disk: the machine's fault
            process_tree.end(token)
            self.end("failed", f"{error.strerror}: {error.filename}" if error.strerror else str(error))
        finally:
            self._clear(place)

    def _run(self, place: Place, token: str, stopping: Callable[[], bool]) -> None:
        kept = self._kept()
        copy = self._copy(kept, place)
        self._inherit(kept)
        if self.from_step >= self.assignment.max_train_steps:
            self.end("complete")
            return
        place.token.write_text(token)
        self.on_start(token)
        launch = prepared(
            self.round.command,
            self.assignment,
            place,
            gpus=self.round.spec.run.gpus_per_worker,
            token=token,
            resume_from=copy,
            evaluate_at_start=self._wants_base(),
        )
        self._follow(place, launch, token, stopping)

    # --- before the command starts ------------------------------------------------------------------

    def _kept(self) -> Kept | None:
        wish = self.assignment.resume_from
        return None if wish is None else read_kept(Path(wish), sha256=self.assignment.resume_sha256)

    def _copy(self, kept: Kept | None, place: Place) -> Path | None:
        shutil.rmtree(place.folder, ignore_errors=True)
        place.folder.mkdir(parents=True)
        if kept is None or kept.step >= self.assignment.max_train_steps:
            return None
        return copy_to_resume(
            kept,
            place.folder / "resume",
            is_trainers=self.round.is_trainers,
            every=self.assignment.evaluate_every,
        )

    def _inherit(self, kept: Kept | None) -> None:
        """Report the start, and what the checkpoint brings along: the best adapter, then the curve."""
        if kept is not None:
            self.from_step = self.step = self.kept_step = kept.step
        self.say(
            Started(*self._name, self.from_step, self.round.environment, horizon=self.assignment.horizon)
        )
        if kept is not None:
            self.evaluations += kept.evaluations
            if kept.best is not None and kept.best_step is not None:
                self._keep_best(kept.best, kept.best_step)
        elif self.round.base is not None and self.round.shares_the_base:
            self.evaluations.append(self.round.base)
        for evaluation in self.evaluations:
            self.say(Evaluated(*self._name, evaluation, horizon=self.assignment.horizon))

    def _wants_base(self) -> bool:
        return self.from_step == 0 and not self.evaluations

    # --- while it runs ------------------------------------------------------------------------------

    def _follow(self, place: Place, launch: Launch, token: str, stopping: Callable[[], bool]) -> None:
        report = MetricsFile(place.metrics, self.round.objective)
        gpus = self.round.spec.run.gpus_per_worker
        fallback = Fallback(place.output, self.round.objective, self.from_step, gpus)
        kills = process_tree.out_of_memory_kills()
        try:
            popen = process_tree.start(
                launch.command, directory=self.round.directory, environment=launch.environment, log=place.log
            )
        except OSError as error:
            raise Unusable(f"command.run: {launch.command[0]} cannot be started: {error.strerror}") from error
        heard_at, heard = time.monotonic(), (0, 0, self.step)
        limit = 60.0 * self.round.command.silence_minutes
        while True:
            code = popen.poll()  # before its lines are read, so that none is missed
            reason = self._hear(self._lines(report, fallback, is_over=code is not None), place)
            if reason is not None:
                process_tree.end(token, popen)
                self.end("infeasible", reason)
                return
            if code is not None:
                break
            if stopping():
                process_tree.end(token, popen)
                self._hear(self._lines(report, fallback, is_over=True), place)
                self.end("stopped")
                return
            now = (_size(place.metrics), _size(place.log), self.step)
            if now != heard:
                heard_at, heard = time.monotonic(), now
            elif time.monotonic() - heard_at > limit:
                process_tree.end(token, popen)
                self.end(
                    "failed", f"no metric and no line of its log for {limit / 60:.0f} minutes{_quote(place)}"
                )
                return
            time.sleep(POLL_SECONDS)
        process_tree.end(token, popen)  # what it left behind
        if report.is_empty and fallback.source is not None:
            _log.warning("the command reported nothing; its evaluations come from %s", fallback.source)
        self._judge(popen, report, place, kills, unread=fallback.unread)

    def _lines(self, report: MetricsFile, fallback: Fallback, *, is_over: bool) -> Iterator[Line]:
        """Yield what is new in the report; while there is none, what is new in the logs of the tool."""
        yield from report.new_lines()
        now = time.monotonic()
        if report.is_empty and (is_over or now - self._looked_at > FALLBACK_SECONDS):
            self._looked_at = now
            left = list(fallback.new_lines())
            yield from report.new_lines()  # the command may have begun to report meanwhile
            if report.is_empty:
                yield from map(report.curve.line, left)

    def _hear(self, lines: Iterator[Line], place: Place) -> str | None:
        """Record new lines; return why the trial is infeasible, if it is.

        Raises InputError for what no trial may do.
        """
        for line in lines:
            if line.began_at is not None:
                self._refuse_another_start(line.began_at)
            if line.infeasible is not None:
                return line.infeasible
            if line.step is None:
                continue
            if line.step > self.assignment.max_train_steps:
                raise Unusable(outcome.over_the_horizon(line.step, self.assignment.max_train_steps))
            if line.evaluation is not None and (reason := self._evaluated(line.evaluation)) is not None:
                return reason
            self._progressed(line)
            if line.checkpoint is not None:
                self.reported.append(line.checkpoint)
        self.reported = [saved for saved in self.reported if not self._saved(saved, place)]
        return None

    def _refuse_another_start(self, step: int) -> None:
        self._refuse_restart(step)
        if step > self.from_step:
            raise Unusable(outcome.began_elsewhere(step, self.from_step))

    def _refuse_restart(self, step: int) -> None:
        if step < self.from_step:
            raise Unusable(outcome.restarted(step, self.from_step))

    def _progressed(self, line: Line) -> None:
        assert line.step is not None
        self.step = max(self.step, line.step)
        if line.evaluation is None and (now := time.monotonic()) - self._last_said > 1.0:
            self._last_said = now
            self.say(Progressed(*self._name, line.step, line.train_loss, horizon=self.assignment.horizon))

    def _evaluated(self, made: Evaluation) -> str | None:
        """Record an evaluation; return why the trial is infeasible, if it is."""
        if made.step <= self.from_step and self.from_step:
            self._refuse_restart(made.step)
            return None  # once more at the step it resumed from: the first one counts
        if any(known.step == made.step for known in self.evaluations):
            return None
        if self.round.objective.metric not in (*made.metrics, "eval_loss"):
            raise Unusable(
                f"the command's evaluation at step {made.step} has "
                f"{', '.join(sorted([*made.metrics, 'eval_loss']))}, but not objective.metric "
                f"{self.round.objective.metric}: write one of these names, or report both in one line"
            )
        self.round.has_reported = self.round.has_reported or made.step > 0
        self.evaluations.append(made)
        self.evaluations.sort(key=lambda each: each.step)
        if made.step == 0 and self.round.base is None:
            self.round.base = made
        self.step = max(self.step, made.step)
        if self.saved.get(made.step) is not None:
            self._keep(made.step)
        self.say(Evaluated(*self._name, made, horizon=self.assignment.horizon))
        return not_finite(made)

    # --- checkpoints --------------------------------------------------------------------------------

    def _saved(self, saved: SavedByCommand, place: Place) -> bool:
        """Keep what is needed of a reported checkpoint, and delete the one before from the output.

        False if it is not whole yet.
        """
        path = resolved(saved, output=place.output, directory=self.round.directory)
        if not is_whole(path, saved, is_trainers=self.round.is_trainers):
            return False
        self.saved[saved.step] = path
        if self._keep(saved.step):
            for step in [step for step in self.saved if step < saved.step]:
                _remove(self.saved.pop(step), unless=path)
        return True

    def _keep(self, step: int) -> bool:
        """Keep the command's checkpoint of a step for what it is needed; False if it is gone already."""
        source = self.saved[step]
        try:
            # Later evaluations may be known already: a fast command reports several at once.
            best = best_evaluation([each for each in self.evaluations if each.step <= step])
            if best is not None and best.step == step and (self.kept_best or (None,))[0] != step:
                self._keep_best(source, step)
            if self.round.resumes and step > self.kept_step:
                if step in self.assignment.trunk_steps:
                    self._keep_resumable(source, step, CheckpointKind.TRUNK)
                self._keep_resumable(source, step, CheckpointKind.LAST)
                self.kept_step = step
        except CheckpointError as error:
            _log.warning("%s; it is not kept", error)
            del self.saved[step]
            return False
        return True

    def _keep_best(self, source: Path, step: int) -> None:
        checkpoint = self._keeper.keep_best(source, step)
        self.kept_best = step, self._keeper.trial.parent / checkpoint.path
        self._say_saved(checkpoint)

    def _keep_resumable(self, source: Path, step: int, kind: CheckpointKind) -> None:
        self._say_saved(
            self._keeper.keep_resumable(
                source, step, kind=kind, evaluations=self.evaluations, best=self.kept_best
            )
        )

    @property
    def _keeper(self) -> Keeper:
        return Keeper(Path(self.assignment.directory), self.assignment.attempt)

    def _say_saved(self, checkpoint: Checkpoint) -> None:
        self.say(Saved(*self._name, checkpoint, horizon=self.assignment.horizon))

    def _clear(self, place: Place) -> None:
        """Delete the checkpoints left in the output, and the copy that the command resumed from."""
        for saved in self.reported:
            _log.warning("%s is not whole and is not kept", saved.path)
        for path in self.saved.values():
            _remove(path, unless=None)
        shutil.rmtree(place.folder / "resume", ignore_errors=True)

    # --- its end ------------------------------------------------------------------------------------

    def _judge(
        self,
        popen: subprocess.Popen[bytes],
        report: MetricsFile,
        place: Place,
        kills: int | None,
        *,
        unread: str | None,
    ) -> None:
        now = process_tree.out_of_memory_kills()
        last = max((e.step for e in self.evaluations if e.step > self.from_step), default=None)
        if last is None and not self.from_step:
            last = max((e.step for e in self.evaluations if e is not self.round.base), default=None)
        verdict = outcome.judged(
            outcome.Ending(
                code=popen.returncode,
                last_step=last,
                names=tuple(sorted(report.curve.names)),
                log=tail(place.log),
                killed_for_memory=kills is not None and now is not None and now > kills,
                reported_before=self.round.has_reported,
                completed_before=self.round.has_completed,
                disk_is_full=shutil.disk_usage(place.folder).free < _FULL_BYTES,
                unread=unread,
            ),
            max_train_steps=self.assignment.max_train_steps,
            metric=self.round.objective.metric,
        )
        if verdict.outcome == "unusable":
            raise Unusable(verdict.reason)
        if verdict.outcome == "complete":
            self.round.has_completed = True
        self.end(verdict.outcome, verdict.reason or None)

    def end(self, came_to: Outcome, reason: str | None = None) -> None:
        """Report the attempt's end."""
        self.say(Ended(*self._name, self.step, came_to, reason, horizon=self.assignment.horizon))

    @property
    def _name(self) -> tuple[str, int, int]:
        return self.assignment.round, self.assignment.trial, self.assignment.attempt


def tail(log: Path) -> str:
    """Return the end of a log; empty if there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def _quote(place: Place) -> str:
    return outcome.quoted(tail(place.log))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _remove(path: Path, *, unless: Path | None) -> None:
    """Delete a checkpoint of the command; one that was written over at the same place stays."""
    if path == unless:
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def tokens_of(round_folder: Path) -> list[str]:
    """Return the whole tokens of all attempts that began in a round's folder; a full disk cuts one short."""
    found = []
    for path in files_below(round_folder, "attempt-*/token"):
        with contextlib.suppress(OSError):  # other workers of the round delete theirs
            found.append(path.read_text(errors="replace"))
    return [token for token in found if process_tree.is_token(token)]
