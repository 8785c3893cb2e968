"""A trial's best adapter answers once, at its horizon: the same in any slot, and again after a death."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests import tiny
from tests.training.driving import assignment, curve, ended, run_loop, worker_state
from tuner.adapters import Base
from tuner.adapters.generation import Decoding, TextGenerator
from tuner.data import AnswerMetric, EvalPrompt, Prompt
from tuner.errors import MetricError
from tuner.inference import Answerer
from tuner.playbook import best_evaluation
from tuner.records import Answered, AnswerScore, CheckpointKind, Event, Saved
from tuner.training.worker_state import GenerationEval

NEW_TOKENS = 6
EVAL_PROMPTS = tuple(
    EvalPrompt(
        Prompt(row, f"eval.jsonl:{row}", "", tuple(range(row, row + 3 + row % 4))), f"reference {row}", 2
    )
    for row in range(5, 11)
)
TRIALS = [
    tiny.hyperparameters(learning_rate=0.02, lora_r=4, training_seed=1),
    tiny.hyperparameters(learning_rate=3e-3, lora_r=2, training_seed=2, lora_dropout=0.2),
]


def length(answer: str, _: str) -> float:
    """Of an answer: what changes with a token."""
    return len(answer) + sum(map(ord, answer)) / 1e6


def generation_eval(base: Base, compare: Callable[[str, str], float] = length) -> GenerationEval:
    tokenizer = AutoTokenizer.from_pretrained(base.model.name_or_path)
    generator = TextGenerator(base, tokenizer, limited_by="max_new_tokens")
    return GenerationEval(
        EVAL_PROMPTS, generator, AnswerMetric("length", compare), NEW_TOKENS, is_objective=True
    )


def scores(events: Iterable[Event]) -> dict[int, AnswerScore]:
    return {event.trial: event.score for event in events if isinstance(event, Answered)}


def last_saved(events: Iterable[Event], trial: int) -> Saved:
    kinds = [e for e in events if isinstance(e, Saved) and e.trial == trial]
    return [e for e in kinds if e.checkpoint.kind == CheckpointKind.LAST][-1]


def test_the_best_adapters_answers_whatever_the_slot(models: tiny.Models, tmp_path: Path) -> None:
    """And what PEFT says with what was saved as `best`, which is not the last step's."""
    base, found = models.base("llama"), []
    for slots in (1, 2):
        folder = tmp_path / str(slots)
        assigned = [assignment(folder, n, hyperparameters=trial) for n, trial in enumerate(TRIALS)]
        with worker_state(base, TRIALS, slots=slots) as state:
            state.generation_eval = generation_eval(base)
            events = run_loop(state, assigned)
        found.append(scores(events))
        for trial in range(2):
            mine = [event for event in events if getattr(event, "trial", None) == trial]
            assert [type(event).__name__ for event in mine[-2:]] == ["Answered", "Ended"]
    alone, packed = found
    steps = [score.step for _, score in sorted(alone.items())]
    best = [best_evaluation(curve(events, trial)) for trial in range(2)]
    assert steps == [evaluation.step for evaluation in best if evaluation is not None]
    assert min(steps) < 10
    assert packed == alone
    tokenizer = AutoTokenizer.from_pretrained(models.path("llama"))
    for one in assigned:
        answerer = Answerer(
            tiny.model_spec(models.path("llama")), tokenizer, adapter=Path(one.directory) / "best"
        )
        said = [answerer.answers([q.prompt], Decoding(NEW_TOKENS))[0].text for q in EVAL_PROMPTS]
        expected = sum(length(text, "") for text in said) / len(said)
        assert alone[one.trial].mean == pytest.approx(expected)
    assert alone[0] != replace(alone[1], step=alone[0].step)


def test_a_trial_that_died_while_it_answered_answers_again_and_a_branch_never_does(
    models: tiny.Models, tmp_path: Path
) -> None:
    base = models.base("llama")
    with worker_state(base, TRIALS[:1]) as state:
        first = run_loop(state, [assignment(tmp_path, hyperparameters=TRIALS[0])])
        saved = last_saved(first, 0).checkpoint
        again = assignment(
            tmp_path,
            hyperparameters=TRIALS[0],
            attempt=2,
            resume_from=str(tmp_path / saved.path),
            resume_sha256=saved.sha256,
        )
        state.generation_eval = generation_eval(base)
        [(_, score)] = scores(run_loop(state, [again])).items()
        whole = run_loop(state, [assignment(tmp_path / "whole", hyperparameters=TRIALS[0])])
        compared = assignment(tmp_path / "branch", hyperparameters=TRIALS[0], is_comparison=True)
        branch = run_loop(state, [compared])
    assert saved.step == 10
    assert score == scores(whole)[0]
    assert (ended(branch, 0).outcome, scores(branch)) == ("complete", {})


def test_whoever_is_to_stop_while_a_trial_answers_saves_it(models: tiny.Models, tmp_path: Path) -> None:
    """Between two batches; it has not gone on beyond its horizon then, and has no score."""
    base = models.base("llama")
    asked: list[str] = []

    def compare(answer: str, reference: str) -> float:
        asked.append(reference)
        return 0.0

    class Stopping(GenerationEval):
        def score(self, *args: object, **more: object) -> AnswerScore | None:
            more["stopping"] = lambda: len(asked) >= 2
            return super().score(*args, **more)  # type: ignore[arg-type]

    with worker_state(base, TRIALS[:1]) as state:
        whole = generation_eval(base, compare)
        state.generation_eval = Stopping(
            EVAL_PROMPTS, whole.generator, whole.metric, NEW_TOKENS, is_objective=False
        )
        state.generation_eval.generator.budget_tokens = 1
        events = run_loop(state, [assignment(tmp_path, hyperparameters=TRIALS[0])])
    assert len(asked) == 2
    assert (ended(events).outcome, ended(events).step, scores(events)) == ("stopped", 10, {})
    assert last_saved(events, 0).checkpoint.step == 10


def test_a_metric_at_fault_ends_the_work_with_every_trial_saved(models: tiny.Models, tmp_path: Path) -> None:
    base = models.base("llama")
    events: list[Event] = []
    assigned = [
        assignment(tmp_path, 0, hyperparameters=TRIALS[0], max_train_steps=3),
        assignment(tmp_path, 1, hyperparameters=TRIALS[1]),
    ]
    with worker_state(base, TRIALS, slots=2) as state:
        state.generation_eval = generation_eval(base, lambda answer, reference: float("nan"))
        with pytest.raises(
            MetricError, match=r"reference 'reference \d+' \(eval.jsonl:\d+\): it returned nan"
        ):
            run_loop(state, assigned, heard=events)
    assert [(ended(events, trial).outcome, ended(events, trial).step) for trial in (0, 1)] == [
        ("stopped", 3),
        ("stopped", 3),
    ]
    assert [last_saved(events, trial).checkpoint.step for trial in (0, 1)] == [3, 3]
