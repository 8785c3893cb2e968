"""A trial for scripts and notebooks: its curve, its adapter, and running it again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.api.arguments import naming_arguments
from tuner.api.generate import batched, speaker
from tuner.api.run import Where, interruptible, restored_adapter, run_again, shown, unsaid
from tuner.playbook import best_evaluation, settled_step
from tuner.playbook.reproduction import Agreement
from tuner.playbook.selection import objective_value
from tuner.records import Evaluation, Hyperparameters, TrialState
from tuner.records import Trial as RecordedTrial
from tuner.report import View
from tuner.report.reproduction import reproduction_document
from tuner.study.folder import StudyFolder
from tuner.study.reproduction import Rerun, planned_rerun

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Reproduction:
    """Result of running a trial again.

    `agrees` is whether the curves agree, `document` the output of `tuner trial reproduce --json`.
    """

    agrees: bool
    document: Mapping[str, Any]


class Trial:
    """A trial: hyperparameters and results, as of the time it was read."""

    def __init__(self, folder: StudyFolder, recorded: RecordedTrial) -> None:
        self._study = folder
        self._recorded = recorded

    def __repr__(self) -> str:
        loss = "" if self.best_eval_loss is None else f", {self.best_eval_loss:.4f} at step {self.best_step}"
        return f"Trial({self.name!r}): {self.state}{loss}"

    @property
    def name(self) -> str:
        """`round1/7`."""
        return self._recorded.name

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
        """Why it is infeasible, pruned or failed; or why it started over instead of resuming."""
        return self._recorded.reason

    @property
    def hyperparameters(self) -> Hyperparameters:
        """All hyperparameters by name, fixed ones included."""
        return dict(self._recorded.hyperparameters)

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """By step: eval_loss, train_loss, learning_rate and the losses of single examples."""
        return self._recorded.evaluations

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation, by default by loss; None before the first evaluation."""
        best = best_evaluation(self._recorded.evaluations)
        return None if best is None else best.step

    @property
    def best_eval_loss(self) -> float | None:
        """Evaluation loss at the best step."""
        best = best_evaluation(self._recorded.evaluations)
        return None if best is None else best.eval_loss

    @property
    def best_value(self) -> float | None:
        """Value of the round's objective, as reported to Optuna; None unless the trial is complete."""
        return objective_value(self._recorded)

    @property
    def settled_step(self) -> int | None:
        """The earliest step whose loss is within noise of the best."""
        return settled_step(self._recorded.evaluations)

    @property
    def executed_steps(self) -> int:
        """Steps actually run: includes steps repeated after a crash, excludes inherited ones."""
        return self._recorded.executed_steps

    @property
    def continues(self) -> str | None:
        """The checkpoint it continues from, such as `round1/3@36`; None if it started at step 0."""
        return None if self._recorded.continues is None else str(self._recorded.continues)

    @property
    def adapter(self) -> Path | None:
        """Directory of the PEFT adapter of its best step; None if there is none."""
        link = self._study.adapter(self._recorded)
        return None if link is None else Path(link)

    @naming_arguments
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
            to: The directory, which must be missing or empty.
            merge: Whether to write a full model instead, with the adapter merged into the base model.
            dtype: Type of the merged weights; None is bfloat16.
            force: Whether to replace an earlier export.

        Raises:
            InputError: for a trial that is not complete, or a directory that cannot be used.
        """
        from tuner.api.export import Export, export_trial, finished_trial

        wanted = Export(to=Path(to), merge=merge, dtype=dtype, force=force)
        finished = finished_trial(self._study, self.name)
        export_trial(finished, wanted, study=self._study.directory, tell=unsaid, warn=_warn)
        return Path(to)

    @naming_arguments
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

        Each call loads the base model and adapter, so pass all prompts at once. Without a temperature, always
        picks the most likely token. Raises InputError for a trial without an adapter or an invalid prompt.
        """
        found = speaker(self._study, self._recorded)
        asked = [
            replace(found.prompt(prompt, system=system), row=row)
            for row, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts)
        ]
        from tuner.inference import Decoding  # loads torch: only after the cheap checks

        decoding = Decoding(max_new_tokens, temperature, top_k, top_p, seed)
        answerer = found.load()
        texts: dict[int, str] = {}
        for batch in batched(answerer, asked, max_new_tokens=max_new_tokens):
            said = answerer.answers(batch, decoding)
            texts |= {prompt.row: each.text for prompt, each in zip(batch, said, strict=True)}
        return [texts[row] for row in range(len(asked))]

    @naming_arguments
    def reproduce(
        self,
        *,
        to_step: int | None = None,
        engine: str | None = None,
        ray_address: str | None = None,
        progress: bool = True,
    ) -> Reproduction:
        """Run the trial again by itself and return whether its curve agrees; the study is not changed.

        `to_step` runs only the first steps; `engine` and `ray_address` are those of `Study.run`. Raises
        InputError for a trial without a result, Interrupted after Ctrl-C.
        """
        where = Where(engine=engine, ray_address=ray_address)
        rerun = planned_rerun(self._study, self._recorded, to_step=to_step, engine=engine)
        view = shown(progress, f"{self.name} again", 1, rerun.record.max_train_steps)
        with interruptible() as stopping:
            found = run_again(rerun, view=view, stopping=stopping, where=where)
        document = reproduction_document(self._study.name, found)
        return Reproduction(found.agreement != Agreement.DIFFERS, document)

    @naming_arguments
    def restore(
        self, *, engine: str | None = None, ray_address: str | None = None, progress: bool = True
    ) -> str:
        """Put a damaged or missing best adapter back, from a checkpoint or by training again; return how.

        `engine` and `ray_address` say where to train, None as the round does.

        Raises InputError for a trial without a recorded adapter, StorageError while a round of the study
        runs, TunerError if the trial cannot be reproduced, Interrupted after Ctrl-C.
        """

        def view(rerun: Rerun) -> View:
            return shown(progress, f"{self.name} again", 1, rerun.record.max_train_steps)

        where = Where(engine=engine, ray_address=ray_address)
        with interruptible() as stopping:
            how, _ = restored_adapter(
                self._study, self._recorded, open_view=view, stopping=stopping, where=where
            )
        return how

    @naming_arguments
    def load(self, *, device: str | None = None) -> PeftModel:
        """Return the base model with the trial's best adapter, ready to generate.

        The base model is loaded as in its round, quantised if the file says so. `device` is a torch device;
        None uses a GPU if there is one. Raises InputError for a trial without an adapter, ModelError for a
        base model that cannot be loaded.
        """
        from tuner.inference.generation import load_adapted

        found = speaker(self._study, self._recorded)
        assert found.adapter is not None
        return load_adapted(found.spec.model, found.adapter, device=device)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
