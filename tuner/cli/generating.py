"""What `trial generate` is wired to."""

from __future__ import annotations

from pathlib import Path

import typer

from tuner.cli.looking import find_trial
from tuner.data import load_tokenizer, render_prompt
from tuner.errors import InputError
from tuner.study.folder import StudyFolder


def generate_answer(
    folder: StudyFolder, name: str, *, prompt: str, context: str, max_new_tokens: int, with_adapter: bool
) -> None:
    """Print the answer of a trial, or of the base, to one prompt."""
    if folder.is_rehearsal:
        raise InputError(f"{folder.directory}: nothing is trained in a rehearsal, so no trial has an adapter")
    trial, _ = find_trial(folder, name)
    spec = folder.plan(trial.round).absolute
    adapter = folder.adapter(trial)
    if with_adapter and adapter is None:
        raise InputError(
            f"{name}: {trial.round}/{trial.number} is {trial.state} and has no adapter; see: tuner trial list"
        )
    tokenizer = load_tokenizer(spec.model)
    source = spec.data.train[0]
    ids = render_prompt(source.format, tokenizer, instruction=prompt, input=context, template=source.template)

    from tuner.inference import generate  # after what can be wrong: it loads torch

    answer = generate(
        spec.model,
        tokenizer,
        ids,
        adapter=Path(adapter) if with_adapter and adapter else None,
        max_new_tokens=max_new_tokens,
    )
    typer.echo(answer)
