"""What all trials of a round share in one worker, and what its work is measured by."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tuner.adapters import Adapter, Base, Pack, PackedRows, initial_adapter
from tuner.adapters.device_pack import MasterTensors
from tuner.adapters.eva import with_eva
from tuner.adapters.generation import Decoding, TextGenerator, batches
from tuner.adapters.initial import lora_config
from tuner.data import AnswerMetric, EvalPrompt, Examples, load_metric, try_metric
from tuner.methods.metrics import Metric
from tuner.methods.metrics.eval_loss import EVAL_LOSS
from tuner.playbook.results import answer_score
from tuner.records import (
    LOSS,
    AnswerScore,
    Assignment,
    Beat,
    Evaluation,
    Event,
    Hyperparameters,
    Objective,
    Throughput,
)
from tuner.training.disk_room import DiskRoom
from tuner.training.trial_run import TrialRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.adapters import Base
    from tuner.config import AnswersSpec


@dataclass(frozen=True)
class Kept:
    """What a worker keeps of a round for the next one: the base model is loaded and measured once."""

    model: tuple[object, ...]
    """What the base model and its tokenizer were loaded for and from."""
    tokenizer: PreTrainedTokenizerBase
    base: Base
    measured: tuple[object, ...]
    """What the base model's evaluation was measured with."""
    evaluation: Evaluation


@dataclass(frozen=True)
class GenerationEval:
    """The prompts and the metric by which every trial of the round is scored."""

    eval_prompts: Sequence[EvalPrompt]
    generator: TextGenerator
    metric: AnswerMetric
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
        places = pack.places  # weights from a checkpoint are still on the CPU
        there = {name: tuple(part.to(places[name]) for part in parts) for name, parts in best.items()}
        pack.load({slot: there})
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


def tried_metric(spec: AnswersSpec, eval_prompts: Sequence[EvalPrompt]) -> AnswerMetric:
    """Load the metric and try it on the first row. Raises MetricError when the metric cannot be used."""
    metric = load_metric(spec.metric)
    try_metric(metric, eval_prompts[0])
    return metric


def generation_eval(
    spec: AnswersSpec,
    metric: AnswerMetric,
    eval_prompts: Sequence[EvalPrompt],
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
) -> GenerationEval:
    """Return what scores the answers of the base model's adapters."""
    return GenerationEval(
        eval_prompts=tuple(eval_prompts),
        generator=TextGenerator(base, tokenizer, limited_by="evaluation.answers.max_new_tokens"),
        metric=metric,
        max_new_tokens=spec.max_new_tokens,
        is_objective=spec.objective,
    )


Kind = Literal["training", "evaluating", "saving"]


class Meter:
    """Sums over everything a worker has done since it started. The time intervals do not overlap."""

    def __init__(self) -> None:
        self.session = f"{time.time_ns()}-{os.getpid()}"
        self.seconds: dict[Kind, float] = {"training": 0.0, "evaluating": 0.0, "saving": 0.0}
        self.passes = self.micro_steps = self.trial_steps = self.tokens = self.padded_tokens = 0

    @contextmanager
    def timing(self, kind: Kind) -> Iterator[None]:
        """Time a block. On a GPU the last block before another kind must end by waiting for a result."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - begun

    def count_pass(self, *, micro_steps: int, tokens: int, padded_tokens: int) -> None:
        """Count a training pass over the micro-batches of `micro_steps` trials."""
        self.passes += 1
        self.micro_steps += micro_steps
        self.tokens += tokens
        self.padded_tokens += padded_tokens

    def read(self, *devices: torch.device) -> Throughput:
        """Return the sums so far."""
        return Throughput(
            session=self.session,
            training_seconds=self.seconds["training"],
            evaluating_seconds=self.seconds["evaluating"],
            saving_seconds=self.seconds["saving"],
            passes=self.passes,
            micro_steps=self.micro_steps,
            trial_steps=self.trial_steps,
            tokens=self.tokens,
            padded_tokens=self.padded_tokens,
            peak_memory_bytes=max(peak_memory_bytes(device) for device in devices),
        )


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory: of the GPU as torch counts it, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


SIMILAR_LENGTHS = 1.6
"""Longest row over the mean: where padding each row of a trial alone costs a fourth of a pass."""

_BEATS_SECONDS = 1.0
_LEAST_PASS_SECONDS = 120.0
_PASS_FACTOR = 10.0


class Pulse:
    """The main loop's heartbeats: each says what it does now and how long it may be silent.

    A pass may take ten times the slowest one so far, and at least two minutes; what has no measured time, the
    first pass among it, as long as loading.
    """

    def __init__(
        self,
        say: Callable[[Event], None],
        *,
        loading_seconds: float = 1800.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._loading_seconds, self._clock = say, loading_seconds, clock
        self._slowest_seconds: float | None = None
        self._pass_at: float | None = None
        self._said_at = -math.inf
        self._doing = ""

    def wait(self) -> None:
        """The loop waits for its parent."""
        self._beat("waiting", None)

    def phase(self, doing: str) -> None:
        """The loop begins something without a measured time."""
        self._beat(doing, self._loading_seconds)

    def on_pass(self) -> None:
        """The loop begins a pass over the base model; the one before has ended."""
        now = self._clock()
        if self._pass_at is not None:
            self._slowest_seconds = max(self._slowest_seconds or 0.0, now - self._pass_at)
        if self._doing != "a pass" or now - self._said_at >= _BEATS_SECONDS:
            self._beat("a pass", self.pass_seconds)
        self._pass_at = now

    @property
    def pass_seconds(self) -> float:
        """Return how long a pass may take."""
        if self._slowest_seconds is None:
            return self._loading_seconds
        return max(_LEAST_PASS_SECONDS, _PASS_FACTOR * self._slowest_seconds)

    def _beat(self, doing: str, allowed_seconds: float | None) -> None:
        self._doing, self._said_at, self._pass_at = doing, self._clock(), None
        self._say(Beat(doing, allowed_seconds))


@dataclass
class WorkerState:
    """Base model, pack and data of a round, loaded once."""

    base: Base
    meta_model: PreTrainedModel
    """The base model's shapes without weights, for PEFT's initialisation."""
    pack: Pack
    train: Examples
    evaluation: Examples
    base_path: str
    revision: str | None
    """The Hub's commit of the base model, recorded in each adapter; None for a directory."""
    evaluation_rows: int
    """Evaluation examples of one trial in one pass."""
    micro_tokens: int
    """Tokens of one trial in one training pass, including padding."""
    base_evaluation: Evaluation | None = None
    """The base model's, at step 0, once measured."""
    generation_eval: GenerationEval | None = None
    """Scores the answers of complete trials; None unless the round file has `evaluation.answers`."""
    objective: Objective = LOSS
    """What the round ranks by."""
    metric: Metric = EVAL_LOSS
    """What measures that at each evaluation; of `answers`, nothing does."""
    pass_tokens: int = 1 << 40
    """Tokens of all trials in one training pass, including padding; halved after each out-of-memory."""
    evaluation_tokens: int = 1 << 40
    """The same for a pass of an evaluation."""
    read_every_seconds: float = 1.0
    """How long at least the device decides updates before the host reads what they came to."""
    read_at: float = -math.inf
    """When it last did, as of `time.monotonic`."""
    meter: Meter = field(default_factory=Meter)
    pulse: Pulse = field(default_factory=lambda: Pulse(lambda _: None))
    """The heartbeats of the main loop."""
    room: DiskRoom = field(default_factory=DiskRoom)
    """The disk of the checkpoints."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """As in `Attempt.environment`."""
    kept: Kept | None = None
    """For the next round."""
    _eva: dict[tuple[int | str, ...], Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def joins_rows(self) -> bool:
        """Return whether training passes have the examples of a trial in one row instead of padding each.

        With one slot, where rows are of similar length they are padded: it costs little, and losses stay what
        earlier versions computed, to the digit. Not with varlen's attention, which is for joined rows.
        """
        lengths = self.train.num_tokens
        differ = int(lengths.max()) > SIMILAR_LENGTHS * float(lengths.mean())
        wanted = self.pack.num_slots > 1 or differ or self.base.attention == "varlen"
        return self.base.joins_rows and wanted

    def new_adapter(self, hyperparameters: Hyperparameters, *, seed: int) -> Adapter:
        """Return a new adapter with PEFT's initialisation. Raises ModelError if it cannot be made."""
        config = lora_config(hyperparameters, base_path=self.base_path, revision=self.revision)
        start = initial_adapter(self.meta_model, config, seed=seed)
        if config.init_lora_weights == "eva":
            start = self._with_eva(start, seed=seed)
        return self.pack.with_magnitudes(start)

    def new_run(self, assignment: Assignment, start: Adapter) -> TrialRun:
        """Return a run of a trial at step 0, with its weights where the base model's layers are."""
        return TrialRun(assignment, start, device=self.base.device, places=self.pack.places)

    def _with_eva(self, start: Adapter, *, seed: int) -> Adapter:
        """Set EVA's A, which trials of one rank, seed and set of layers share."""
        key = (seed, start.config.r, *sorted(start.weights))
        if key not in self._eva:
            made = with_eva(start, self.base, self.train, seed=seed)
            self._eva[key] = {name: a for name, (a, *_) in made.weights.items()}
        weights = {
            name: (self._eva[key][name].clone(), *others) for name, (_, *others) in start.weights.items()
        }
        return Adapter(start.config, weights)
