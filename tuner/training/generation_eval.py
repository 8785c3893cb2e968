"""Score the answers of a trial's best adapter, once, when the trial has reached its horizon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tuner.adapters import Pack, PackedRows
from tuner.adapters.decoding import Decoding, batches
from tuner.adapters.generation import TextGenerator
from tuner.adapters.pack import MasterTensors
from tuner.data import EvalPrompt, Metric, load_metric, try_metric
from tuner.playbook.scores import answer_score
from tuner.records import AnswerScore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.adapters import Base
    from tuner.config import AnswersSpec


@dataclass(frozen=True)
class GenerationEval:
    """The prompts and the metric by which every trial of the round is scored."""

    eval_prompts: Sequence[EvalPrompt]
    generator: TextGenerator
    metric: Metric
    max_new_tokens: int
    is_objective: bool

    @torch.no_grad()
    def score(
        self,
        pack: Pack,
        slot: int,
        best: MasterTensors,
        *,
        step: int,
        stopping: Callable[[], bool],
    ) -> AnswerScore | None:
        """Return the score of the weights `best`, those of `step`, loaded in place of the slot's own.

        None if `stopping` returns True on the way. The batches follow from the prompts alone, so the slot,
        its neighbours and a restart of the worker do not change the score. Raises MetricError for a faulty
        metric, TunerError if one answer alone does not fit into memory.
        """
        device = pack.base.device  # weights from a checkpoint are still on the CPU
        pack.load({slot: {name: tuple(part.to(device) for part in parts) for name, parts in best.items()}})
        scores = [0.0] * len(self.eval_prompts)
        for batch in self._batches():
            if stopping():
                return None
            with pack.holding(PackedRows((slot,))):
                said = self.generator.answers(
                    pack.base.model,
                    [self.eval_prompts[at].prompt for at in batch],
                    Decoding(self.max_new_tokens),
                )
            for at, generated in zip(batch, said, strict=True):
                asked = self.eval_prompts[at]
                scores[at] = self.metric(generated.text, asked.reference, place=asked.prompt.place)
        return answer_score(scores, step=step, metric=self.metric.name, is_objective=self.is_objective)

    def _batches(self) -> list[list[int]]:
        prompts = [eval_prompt.prompt for eval_prompt in self.eval_prompts]
        return batches(
            [len(prompt.ids) for prompt in prompts],
            [self.generator.new_tokens(prompt, self.max_new_tokens) for prompt in prompts],
            budget_tokens=self.generator.budget_tokens,
            most_rows=None,
        )


def load_generation_eval(
    spec: AnswersSpec, eval_prompts: Sequence[EvalPrompt], base: Base, tokenizer: PreTrainedTokenizerBase
) -> GenerationEval:
    """Load the metric and try it on the first row. Raises MetricError when the metric cannot be used."""
    metric = load_metric(spec.metric)
    try_metric(metric, eval_prompts[0])
    return GenerationEval(
        eval_prompts=tuple(eval_prompts),
        generator=TextGenerator(base, tokenizer, limited_by="evaluation.answers.max_new_tokens"),
        metric=metric,
        max_new_tokens=spec.max_new_tokens,
        is_objective=spec.objective,
    )
