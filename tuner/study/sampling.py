"""Optuna's side of a round: what it proposes next, and what it is told of each trial.

Optuna advises and shows; it holds no fact. A proposal depends on how many there were before it, so
that a resumed round goes on where it stopped; everything told can be told again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from sqlalchemy import event

from tuner.config import SearchSpec
from tuner.methods.registry import is_built_in
from tuner.playbook import best_evaluation, settled_step
from tuner.playbook.observations import Outcome
from tuner.playbook.selection import objective_value
from tuner.records import LOSS, Evaluation, Hyperparameters, Objective, Space, Trial, TrialState, Value
from tuner.store import making_tables, normal_url, optuna_arguments
from tuner.study.optuna_rows import (
    OPEN,
    Expected,
    RowsChanged,
    difference,
    filled,
    noticing,
    set_aside,
    told,
    told_of,
)
from tuner.study.proposals import RoundSampler

MAX_REPORTS = 20
"""Evaluations of a trial that Optuna is shown: 10,000 trials with 100 each made the first `ask` take 36 s."""


@dataclass(frozen=True)
class Proposal:
    """What to try next."""

    chosen: Mapping[str, Value]
    """Values of the searched hyperparameters."""
    optuna_trial: int
    """Number of the trial made in Optuna's study."""


class RoundStudy:
    """The Optuna study of one round, `STUDY/ROUND`: what it is asked, and what it is told."""

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        name: str,
        space: Space,
        search: SearchSpec,
        *,
        max_train_steps: int,
        earlier: Sequence[Outcome] = (),
        objective: Objective = LOSS,
    ) -> None:
        """`earlier` are the outcomes of the workload's rounds before, oldest first: samplers that model learn
        from them, and they never become trials of this round's study."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search = search
        self._objective = objective
        self._storage = storage
        self._name = name
        self._max_train_steps = max_train_steps
        self.sampler = RoundSampler(
            space, search, max_train_steps=max_train_steps, earlier=earlier, objective=objective
        )
        self.study = self._opened()

    def _opened(self) -> optuna.Study:
        """Open the round's Optuna study, or create it."""
        self._ids: dict[int, int] = {}
        objective = self._objective
        study = optuna.create_study(
            storage=self._storage,
            study_name=self._name,
            direction=objective.direction.value,
            load_if_exists=True,
            sampler=self.sampler,
        )
        if is_built_in("sampler", self._search.sampler):
            # Optuna's cache reads all trials before the first answer, and these samplers look at none.
            study._storage = self._storage
        if objective != LOSS:
            name = "answer score" if objective.per == "trial" else objective.metric
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names([name])  # what the dashboard calls a trial's value
        return study

    def close(self) -> None:
        """Let go of the database."""
        if isinstance(self._storage, optuna.storages.RDBStorage):
            self._storage.remove_session()
            self._storage.engine.dispose()

    # --- asking -----------------------------------------------------------------------------------

    @property
    def num_points(self) -> float:
        """How many different proposals there are: infinite where a range of real numbers is searched."""
        return self.sampler.num_points

    def propose(
        self, ordinal: int, trials: Sequence[Trial] = (), *, again: Hyperparameters | None = None
    ) -> Proposal:
        """Ask for the round's proposal number `ordinal`, from 0; the enqueued ones come first.

        `trials` are all of the round so far, whose points are not proposed again. `again` repeats the
        hyperparameters of a failed trial instead. Makes a running trial in Optuna's study. Raises RowsChanged
        where Optuna's rows do not allow it.
        """
        self.sampler.follow(ordinal, trials, again=again)
        with noticing():
            return self._proposed()

    def _proposed(self) -> Proposal:
        asked = self._ask_new()
        params: dict[str, Any] = {}
        # Which names a trial has may depend on the values of others: those are asked in a further step.
        while left := self.sampler.active(self.sampler.decoded(params)).keys() - params.keys():
            for name, distribution in self.sampler.distributions.items():
                if name in left:
                    params[name] = _suggested(asked, name, distribution)
        return Proposal(self.sampler.decoded(params), asked.number)

    def _ask_new(self) -> optuna.Trial:
        """A trial whose values the sampler gives: Optuna hands out first what somebody has enqueued."""
        while (asked := self.study.ask()) and self.sampler.is_overruled:
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return asked

    # --- telling ----------------------------------------------------------------------------------

    def report(self, trial: Trial, evaluation: Evaluation, planned: Sequence[int]) -> None:
        """Show Optuna an evaluation of a running trial, unless it is one too many or not finite.

        The last evaluation of a step is kept, as among the facts. Nothing of a per-trial objective: Optuna
        takes the last value that was shown of a pruned trial, which is how infeasible ones are told, for the
        trial's own, and would list a loss among the scores. Raises RowsChanged as `tell` does.
        """
        assert trial.optuna_trial is not None
        if self._objective.per == "trial":
            return
        if evaluation.step not in shown_steps(planned) or not math.isfinite(evaluation.value):
            return
        with noticing():
            try:
                # A handle would read the trial first.
                self._storage.set_trial_intermediate_value(
                    self._trial_id(trial), evaluation.step, evaluation.value
                )
            except UpdateFinishedTrialError:
                frozen = self._frozen(trial)
                self._refuse_changed(trial, frozen)
                if evaluation.step not in frozen.intermediate_values:
                    raise

    def tell(self, trial: Trial, *, max_train_steps: int) -> None:
        """Tell Optuna how a trial ended. Telling it again changes nothing.

        Raises RowsChanged where somebody else has ended, changed or deleted Optuna's trial.
        """
        with noticing():
            frozen = self._frozen(trial)
            self._refuse_changed(trial, frozen)
            if frozen.state in OPEN:
                self._tell(trial, max_train_steps)

    def _refuse_changed(self, trial: Trial, frozen: optuna.trial.FrozenTrial) -> None:
        if (what := self._expected(trial).differs(told_of(frozen))) is not None:
            raise RowsChanged(what)

    def _expected(self, trial: Trial) -> Expected:
        """What Optuna has, or will have, of a trial."""
        match trial.state:
            case TrialState.COMPLETE if (value := objective_value(trial)) is not None:
                return Expected(trial, (optuna.trial.TrialState.COMPLETE, value))
            case TrialState.INFEASIBLE if self._is_penalised:
                return Expected(trial, (optuna.trial.TrialState.COMPLETE, None), is_any_value=True)
            case TrialState.FAILED:
                return Expected(trial, (optuna.trial.TrialState.FAIL, None))
            case _:
                return Expected(trial, (optuna.trial.TrialState.PRUNED, None))

    @property
    def _is_penalised(self) -> bool:
        """Whether an infeasible trial is told as `gp` itself is: a penalty and a violated constraint."""
        return self._search.sampler == "gp" and self._objective == LOSS

    def _tell(self, trial: Trial, max_train_steps: int) -> None:
        for key, value in _attributes(trial, max_train_steps).items():
            self._storage.set_trial_user_attr(self._trial_id(trial), key, value)
        handle = self._handle(trial)
        is_infeasible = trial.state == TrialState.INFEASIBLE
        if trial.state != TrialState.FAILED:
            self._set_feasible(trial, handle, not is_infeasible)
        match trial.state:
            case TrialState.COMPLETE if (value := objective_value(trial)) is not None:
                self.study.tell(handle, value)
            case TrialState.INFEASIBLE if self._is_penalised:
                self.study.tell(handle, self._penalty())
            # A complete trial has no value if its metric is infinite at every step.
            case TrialState.INFEASIBLE | TrialState.PRUNED | TrialState.COMPLETE:
                self.study.tell(handle, state=optuna.trial.TrialState.PRUNED)
            case TrialState.FAILED:
                self.study.tell(handle, state=optuna.trial.TrialState.FAIL)
            case other:
                raise ValueError(f"trial {trial.number} is {other}: only an ended trial can be told")

    def recover(self, trials: Sequence[Trial], *, max_train_steps: int) -> None:
        """After a crash: end what Optuna has and the facts do not, and tell what was not told.

        Only trials that Optuna has as open are read as a whole. Raises RowsChanged where Optuna's trials are
        not those of the facts.
        """
        known = {trial.optuna_trial: trial for trial in trials}
        with noticing():
            self.refuse_changed(trials)
            for frozen in self._storage.get_all_trials(self.study._study_id, deepcopy=False, states=OPEN):
                trial = known.get(frozen.number)
                if trial is None:
                    self._storage.set_trial_state_values(frozen._trial_id, optuna.trial.TrialState.FAIL)
                elif trial.state.is_final:
                    self._tell(trial, max_train_steps)

    def refuse_changed(self, trials: Sequence[Trial]) -> None:
        """Raise RowsChanged where Optuna's trials are not those of the facts."""
        expected = [self._expected(trial) for trial in trials if trial.optuna_trial is not None]
        with noticing():
            self._storage.get_study_name_from_id(self.study._study_id)
            what = difference(told(self._storage, self.study._study_id), expected)
        if what is not None:
            raise RowsChanged(what)

    def made_anew(self, trials: Sequence[Trial], *, at: float) -> str | None:
        """Set the Optuna study aside, dated by `at`, and make it anew from the facts, with the same numbers.

        Returns the name of the one set aside; None where it was missing.
        """
        notes = self._notes()
        aside = set_aside(self._storage, self._name, at=at)
        self.study = self._opened()
        mine = sorted((trial for trial in trials if trial.optuna_trial is not None), key=_optuna_number)
        rows = [(_optuna_number(trial), self._row(trial)) for trial in mine]
        filled(self.study, rows, system_attrs=notes)
        for trial in mine:
            if trial.state.is_final:
                self._tell(trial, self._max_train_steps)
        return aside

    def _row(self, trial: Trial) -> optuna.trial.FrozenTrial:
        """A trial as it is while it runs; it is told afterwards."""
        planned = [evaluation.step for evaluation in trial.evaluations]
        shown = shown_steps(planned) if self._objective.per != "trial" else frozenset()
        values = {e.step: e.value for e in trial.evaluations if e.step in shown and math.isfinite(e.value)}
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            **self.sampler.stored(trial.hyperparameters),
            intermediate_values=values,
        )

    def _notes(self) -> dict[int, dict[str, Any]]:
        """What an imported sampler noted on its trials, by number."""
        if is_built_in("sampler", self._search.sampler):
            return {}
        try:
            found = self._storage.get_all_trials(self.study._study_id, deepcopy=False)
        except KeyError:
            return {}
        ours = ("constraints", "fixed_params")
        return {
            trial.number: {k: v for k, v in trial.system_attrs.items() if not k.startswith(ours)}
            for trial in found
        }

    def _handle(self, trial: Trial) -> optuna.Trial:
        return optuna.Trial(self.study, self._trial_id(trial))

    def _frozen(self, trial: Trial) -> optuna.trial.FrozenTrial:
        """One trial, read alone: `get_trials` reads all that are running."""
        return self._storage.get_trial(self._trial_id(trial))

    def _trial_id(self, trial: Trial) -> int:
        number = _optuna_number(trial)
        if number not in self._ids:
            self._ids[number] = self._storage.get_trial_id_from_study_id_trial_number(
                self.study._study_id, number
            )
        return self._ids[number]

    def _set_feasible(self, trial: Trial, handle: optuna.Trial, feasible: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # set before, if the trial's end was not told then
            handle.set_constraint("feasible", 0.0 if feasible else 1.0)
        # optuna-dashboard's best trial reads this older attribute alone.
        self._storage.set_trial_system_attr(self._trial_id(trial), "constraints", [0.0 if feasible else 1.0])

    def _penalty(self) -> float:
        losses = [t.value for t in self.study.get_trials(deepcopy=False) if t.value is not None]
        return max(losses, default=10.0)


def _optuna_number(trial: Trial) -> int:
    assert trial.optuna_trial is not None
    return trial.optuna_trial


def shown_steps(planned: Sequence[int]) -> frozenset[int]:
    """At most `MAX_REPORTS` of the planned evaluation steps, evenly spread, the last one among them."""
    if len(planned) <= MAX_REPORTS:
        return frozenset(planned)
    stride = (len(planned) - 1) / (MAX_REPORTS - 1)
    return frozenset(planned[round(number * stride)] for number in range(MAX_REPORTS))


def _suggested(asked: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return asked.suggest_categorical(name, choices)
        case IntDistribution(low=low, high=high, log=log):
            return asked.suggest_int(name, low, high, log=log)
        case FloatDistribution(low=low, high=high, log=log):
            return asked.suggest_float(name, low, high, log=log)
        case _:
            raise ValueError(f"{name}: no dimension is {distribution}")


def _attributes(trial: Trial, max_train_steps: int) -> dict[str, Any]:
    best = best_evaluation(trial.evaluations)
    attributes: dict[str, Any] = {
        "trial": trial.number,
        "state": str(trial.state),
        "executed_steps": trial.executed_steps,
    }
    if best is not None:
        attributes["best_step"] = best.step
        attributes["best_step_fraction"] = round(best.step / max_train_steps, 4)
        attributes["settled_step"] = settled_step(trial.evaluations)
        attributes["best_eval_loss"] = best.eval_loss
        if best.objective is not None:
            attributes[f"best_{best.objective.metric}"] = best.value
    if trial.answer_score is not None:
        attributes["answer_score"] = trial.answer_score.mean
        attributes["answer_score_standard_error"] = trial.answer_score.standard_error
        attributes["answers"] = f"{trial.answer_score.num_examples} by {trial.answer_score.metric}"
    if trial.reason:
        attributes["reason"] = trial.reason
    if trial.continues:
        attributes["continues"] = str(trial.continues)
    return attributes


def optuna_storage(url: str) -> optuna.storages.RDBStorage:
    """Optuna's tables in the study's database, beside tuner's own."""
    url = normal_url(url)
    with making_tables(url):
        storage = optuna.storages.RDBStorage(url, engine_kwargs=optuna_arguments(url))
    if storage.engine.dialect.name == "sqlite":
        event.listen(storage.engine, "connect", _leave_waiting_to_facts)
        storage.engine.dispose()
    return storage


def _leave_waiting_to_facts(connection: Any, _: object) -> None:
    """Optuna's commits reach the disk with the next fact's: a power cut takes what is told again anyway."""
    connection.execute("PRAGMA synchronous=NORMAL")


class StudyStorage(optuna.storages.RDBStorage):
    """Optuna's tables as far as they are of one study: what the dashboard lists, finds and shows."""

    def __init__(self, url: str, study: str) -> None:
        url = normal_url(url)
        super().__init__(url, engine_kwargs=optuna_arguments(url))
        self._prefix = f"{study}/"

    def get_all_studies(self) -> list[Any]:
        """The rounds of the study."""
        return [found for found in super().get_all_studies() if found.study_name.startswith(self._prefix)]
