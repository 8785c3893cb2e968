"""`trial generate`: parse its options, and print answers or write them to a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tuner.api.generate import Model, Speaker, answered, batched, speaker
from tuner.cli import printing
from tuner.cli.printing import warn_of_code
from tuner.errors import InputError, Interrupted
from tuner.report.format import count
from tuner.study.folder import StudyFolder
from tuner.study.lookup import find_trial

if TYPE_CHECKING:
    from tuner.inference import Answer, AnswerFile, Decoding

_SECONDS_BETWEEN_LINES = 5.0
"""Between progress lines when standard error is a file or a pipe."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Options of the command: one prompt or a file of prompts, and where the answers go."""

    prompt: str | None
    context: str
    system: str
    """For the prompt, or for rows without a system message."""
    input: Path | None
    output: Path | None
    models: tuple[Model, ...]
    """Models that answer."""
    stream: bool
    batch_size: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.input is None):
            raise InputError("pass exactly one of --prompt and --input")
        if self.prompt is not None and not self.prompt.strip():
            raise InputError('--prompt is empty; pass a text, such as --prompt "Add 2 and 3."')
        for_one = {"--context": bool(self.context), "--stream": self.stream}
        for_many = {"--output": self.output is not None, "--batch-size": self.batch_size is not None}
        for option, given in (for_one if self.prompt is None else for_many).items():
            if given:
                goes_with = "--prompt" if self.prompt is None else "--input"
                raise InputError(f"{option} requires {goes_with}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise InputError(
                "--top-k and --top-p require sampling: pass a --temperature above 0, such as 0.7"
            )
        if self.output is not None and self.output.resolve() == (self.input or Path()).resolve():
            raise InputError(f"--output {self.output}: is the file of prompts; choose another")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: expects a probability above 0, at most 1")

    @property
    def decoding(self) -> Decoding:
        """The same for the model."""
        from tuner.inference import Decoding

        top_k, top_p = self.top_k or 0, 1.0 if self.top_p is None else self.top_p
        return Decoding(self.max_new_tokens, self.temperature, top_k, top_p, self.seed)


def generate_answers(folder: StudyFolder, name: str, asked: Asked) -> None:
    """Generate the answers. Raises InputError before anything is generated, Interrupted after Ctrl-C."""
    trial, _ = find_trial(folder, name)
    found = speaker(folder, trial, asked.models)
    warn_of_code(found.spec.model)
    if asked.input is None:
        _answer_one(found, asked)
    else:
        _answer_file(found, asked, asked.input)


def _answer_one(found: Speaker, asked: Asked) -> None:
    prompt = found.prompt(asked.prompt or "", context=asked.context, system=asked.system)
    prompt = replace(prompt, place="--prompt")
    answerer = found.load(asked.models)
    for model in asked.models:
        if len(asked.models) > 1:
            typer.echo(f"--- {found.name if model == 'adapter' else 'base'}")
        say = _say if asked.stream else None
        [generated] = answerer.answers([prompt], asked.decoding, of_base=model == "base", say=say)
        typer.echo("" if asked.stream else generated.text)


def _say(text: str) -> None:
    typer.echo(text, nl=False)


# --- a file of prompts ----------------------------------------------------------------------------


def _answer_file(found: Speaker, asked: Asked, path: Path) -> None:
    prompts = found.prompts(path, system=asked.system)
    made_from = {prompt.row: found.made_from(prompt, asked.models, asked.decoding) for prompt in prompts}
    output = _output(asked, made_from)
    missing = [prompt for prompt in prompts if prompt.row not in output.rows]
    if len(missing) < len(prompts):
        typer.echo(f"{asked.output} has {len(prompts) - len(missing)} of {len(prompts)} answers", err=True)
    if not missing:
        return
    answerer = found.load(asked.models)
    batches = batched(answerer, missing, max_new_tokens=asked.max_new_tokens, most_rows=asked.batch_size)
    begun, tokens = time.monotonic(), 0
    try:
        with output, _progress(len(prompts), len(prompts) - len(missing)) as advance:
            for batch in batches:
                answers, num_tokens = answered(answerer, batch, asked.models, asked.decoding, made_from)
                output.append(answers)
                advance(len(batch))
                tokens += num_tokens
    except KeyboardInterrupt:
        if asked.output is None:
            raise
        done = f"{len(output.rows)} of {len(prompts)} answers are in {asked.output}"
        raise Interrupted(f"stopped; {done}; resume with: {printing.typed}") from None
    seconds = max(1e-9, time.monotonic() - begun)
    typer.echo(
        f"{count(len(missing), 'answer')} in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s; "
        f"{len(batches[0])} rows per batch for the longest prompts",
        err=True,
    )


class _Printed:
    """Write answers to standard output, in the order of the rows."""

    def __init__(self, rows: Iterable[int]) -> None:
        self.rows: frozenset[int] = frozenset()
        """Rows that already have an answer."""
        self._waiting: dict[int, Answer] = {}
        self._order = iter(rows)
        self._next = next(self._order, None)

    def __enter__(self) -> _Printed:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def append(self, answers: Sequence[Answer]) -> None:
        """Print each answer once all earlier rows have theirs."""
        self._waiting |= {answer.row: answer for answer in answers}
        while self._next in self._waiting:
            typer.echo(self._waiting.pop(self._next).line(), nl=False)
            self._next = next(self._order, None)


def _output(asked: Asked, made_from: dict[int, str]) -> AnswerFile | _Printed:
    """Return where answers go. Raises InputError for a file that holds something else."""
    if asked.output is None:
        return _Printed(made_from)
    from tuner.inference import AnswerFile

    return AnswerFile(asked.output, made_from)


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of new answers; shows a bar or occasional lines on stderr."""
    console = printing.error_output()
    if console.is_terminal:
        columns = (TextColumn("answered"), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=total, completed=done)
            yield lambda number: progress.advance(task, number)
        return
    said_at = time.monotonic()

    def advance(number: int) -> None:
        nonlocal done, said_at
        done += number
        if time.monotonic() - said_at >= _SECONDS_BETWEEN_LINES:
            said_at = time.monotonic()
            typer.echo(f"answered {done} of {total}", err=True)

    yield advance
