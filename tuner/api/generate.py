"""What a trial's adapter answers, and its score on test rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from tuner.api.run import Prepare, Tell
from tuner.config import RoundSpec
from tuner.data import Prompt, load_tokenizer, read_prompts, render_prompt
from tuner.data.pretrained import as_trained
from tuner.errors import InputError, TunerError
from tuner.records import CheckpointKind, Trial, TrialState
from tuner.study.folder import StudyFolder, opened
from tuner.study.results import Sums, score_trial, scores_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.inference import Answer, Answerer, Decoding


Model: TypeAlias = Literal["adapter", "base"]


@dataclass(frozen=True)
class Speaker:
    """What a trial needs to answer prompts."""

    name: str
    spec: RoundSpec
    """The round file as of training, with absolute paths."""
    tokenizer: PreTrainedTokenizerBase
    adapter: Path | None

    def prompt(self, text: str, *, context: str = "", system: str = "") -> Prompt:
        """Return a prompt in the template of the first training source."""
        source = self.spec.data.train[0]
        return render_prompt(
            source.format,
            self.tokenizer,
            instruction=text,
            input=context,
            system=system,
            template=source.template,
        )

    def prompts(self, path: Path, *, system: str = "") -> list[Prompt]:
        """Return the prompts of a file's rows. Raises DataError."""
        return read_prompts(path, self.spec.data.train[0], self.tokenizer, system=system)

    def load(self, models: Sequence[Model] = ("adapter",)) -> Answerer:
        """Load the base model, with the adapter on request."""
        from tuner.inference import Answerer  # loads torch: only after the cheap checks

        return Answerer(
            self.spec.model, self.tokenizer, adapter=self.adapter if "adapter" in models else None
        )

    def made_from(self, prompt: Prompt, models: Sequence[Model], decoding: Decoding) -> str:
        """Return a hash of everything that determines an answer; the adapter counts by its step."""
        adapter = self.adapter.name if self.adapter and "adapter" in models else None
        ingredients = [self.name, adapter, models, prompt.ids, asdict(decoding)]
        return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]


def speaker(folder: StudyFolder, trial: Trial, models: Sequence[Model] = ("adapter",)) -> Speaker:
    """Return what a trial needs to answer. Raises InputError in a dry run, or without an adapter, and
    CheckpointError for one that is damaged.
    """
    name = trial.name
    if folder.is_dry_run:
        raise InputError(f"{folder.directory}: a dry run trains nothing, so no trial has an adapter")
    adapter = folder.verified_adapter(trial) if "adapter" in models else None
    if "adapter" in models and adapter is None:
        is_lost = trial.checkpoint(CheckpointKind.BEST) is not None
        if is_lost and trial.state is not TrialState.INFEASIBLE:
            place = folder.checkpoints(trial.round).trial_directory(trial.number)
            raise InputError(
                f"{name}: its adapter is not in {place}. "
                f"Put it back with: tuner trial reproduce {name} --restore"
            )
        raise InputError(f"{name} is {trial.state} and has no adapter; see: tuner trial list")
    folder.plan(trial.round).spec.require_model(f"{name} cannot be asked")
    spec = folder.as_trained(trial, folder.plan(trial.round).absolute)
    return Speaker(name, spec, load_tokenizer(spec.model), adapter.resolve() if adapter else None)


def batched(
    answerer: Answerer, prompts: Sequence[Prompt], *, max_new_tokens: int, most_rows: int | None = None
) -> list[list[Prompt]]:
    """Return the prompts in batches that fit the token budget, longest first."""
    from tuner.inference import batches

    found = batches(
        [len(prompt.ids) for prompt in prompts],
        [answerer.new_tokens(prompt, max_new_tokens) for prompt in prompts],
        budget_tokens=answerer.budget_tokens,
        most_rows=most_rows,
    )
    return [[prompts[at] for at in batch] for batch in found]


def answered(
    answerer: Answerer,
    batch: Sequence[Prompt],
    models: Sequence[Model],
    decoding: Decoding,
    made_from: Mapping[int, str],
) -> tuple[list[Answer], int]:
    """Return a batch's answers and their number of tokens."""
    from tuner.inference import Answer

    answers = [Answer(prompt.row, prompt.text, made_from=made_from[prompt.row]) for prompt in batch]
    num_tokens = 0
    for model in models:
        said = answerer.answers(batch, decoding, of_base=model == "base")
        num_tokens += sum(generated.num_tokens for generated in said)
        answers = [_with(answer, model, each.text) for answer, each in zip(answers, said, strict=True)]
    return answers, num_tokens


def _with(answer: Answer, model: Model, text: str) -> Answer:
    return replace(answer, answer=text) if model == "adapter" else replace(answer, base=text)


def scored(folder: StudyFolder, trial: Trial, *, prepare: Prepare, tell: Tell) -> Trial:
    """Return the trial with its score on `data.test`, measured if it has none yet.

    Raises what `score_trial` does.
    """

    def measure(spec: RoundSpec, cache: Path, adapter: Path) -> Sums:
        tell("scoring the best adapter on data.test")
        spec = as_trained(spec, adapter)
        if spec.model.trust_remote_code:
            tell(f"warning: {spec.model.warning_of_code}")
        rows = prepare(spec, cache).test
        from tuner.inference import score  # loads torch: only after the cheap checks

        return Sums(score(spec, rows, adapter).nll, tuple(rows.num_targets.tolist()), rows.content_hash())

    return replace(trial, final_score=score_trial(folder, trial, measure=measure, clock=time.time))


def score_at_the_end(folder: StudyFolder, trial: Trial, *, prepare: Prepare, tell: Tell) -> str | None:
    """Score a study's final trial unless its test rows were used before; return a note for the user.

    Returns None without test rows, without a trained trial, or after a successful score. A failure is
    returned, not raised: the study is complete without the score.
    """
    if folder.is_dry_run or not folder.plan(trial.round).spec.data.test:
        return None
    if trial.final_score is not None or trial.state != TrialState.COMPLETE:
        return None
    with opened(folder) as store:
        before = scores_of(store)
    name = trial.name
    if before:
        return (
            f"data.test was already scored for {before[0].name}, so {name} is not scored "
            f"automatically; `tuner trial show {name} --test` scores it, but the result is no longer unbiased"
        )
    try:
        scored(folder, trial, prepare=prepare, tell=tell)
    except TunerError as error:
        return f"data.test is not scored: {error}"
    return None
