"""`tuner trial ...`: list, show, use and share trials."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.hints import Group

app = typer.Typer(
    cls=Group, help="Trials: list, show, use, share. Start with `tuner trial list`.", no_args_is_help=True
)

TrialName = Annotated[str, typer.Argument(metavar="T", help="round1/7, 7 (in the latest round), or best.")]


class MergedDtype(StrEnum):
    """Supported types of merged weights."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class OtherTool(StrEnum):
    """Tools that `trial export --as` writes files for."""

    AXOLOTL = "axolotl"
    LLAMAFACTORY = "llamafactory"
    TRL = "trl"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


@app.command("list")
def list_trials(
    round_name: Annotated[
        str | None, typer.Option("--round", metavar="ROUND", help="Only this round.")
    ] = None,
    json: Json = False,
) -> None:
    """List the trials of all rounds with the hyperparameters that vary, best losses and best steps.

    Example: `tuner trial list --round round1`
    """
    from tuner.cli.output import print_trials
    from tuner.cli.printing import next_command, open_here

    command = print_trials(open_here(), round_name=round_name, as_json=json)
    if not json:
        typer.echo(f"next: {next_command(command)}", err=True)


@app.command()
def show(
    trial: TrialName = "best",
    test: Annotated[
        bool,
        typer.Option(
            "--test",
            help="Score the trial on data.test first, once: only for the trial you choose in the end.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show a trial's hyperparameters, curve, best step, adapter path and score on data.test.

    Example: `tuner trial show round1/7`
    """
    from tuner.cli.output import print_trial
    from tuner.cli.printing import next_command, open_here

    command = print_trial(open_here(), trial, test=test, as_json=json)
    if not json:
        typer.echo(f"next: {next_command(command)}", err=True)


@app.command()
def reproduce(
    trial: TrialName,
    to_step: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Run only the first N steps; the schedule is unchanged."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where to run; overrides the round's run.engine.")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|local", help="Ray cluster of --engine ray; overrides run.ray_address."
        ),
    ] = None,
    restore: Annotated[
        bool,
        typer.Option(
            "--restore",
            help="Put a damaged or missing best adapter back: from a checkpoint that has it, else from this "
            "run if its curve agrees.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Run a trial again by itself and compare its curve; exits with 1 if the curves disagree.

    The study is not changed: no trial is added, and the run's files are deleted at the end. Only `--restore`
    writes: the adapter of the best step.

    Example: `tuner trial reproduce best --to-step 20`
    """
    from tuner.cli.output import reproduce_trial, restore_trial
    from tuner.cli.printing import next_command, open_here
    from tuner.cli.rounds import where_typed
    from tuner.errors import InputError

    if restore and to_step is not None:
        raise InputError("--restore needs the whole run; remove --to-step")
    where = where_typed(None, None, engine, ray_address)
    if restore:
        restore_trial(open_here(), trial, where=where, as_json=json)
        if not json:
            typer.echo(f"next: {next_command(f'tuner trial show {trial}')}", err=True)
        return
    agrees = reproduce_trial(open_here(), trial, to_step=to_step, where=where, as_json=json)
    if not json:
        typer.echo(f"next: {next_command(f'tuner trial show {trial}')}", err=True)
    if not agrees:
        raise typer.Exit(1)


@app.command()
def generate(
    trial: TrialName,
    prompt: Annotated[
        str | None, typer.Option(help="Instruction, worded like one in the training rows.")
    ] = None,
    context: Annotated[str, typer.Option(help="Input of the row, if the format has one.")] = "",
    system: Annotated[str, typer.Option(help="System message; with --input, for rows without one.")] = "",
    input: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Answer a file of training rows, {"messages": ...} or {"prompt": ...} rows, or messages.',
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="File for the answers to --input; rerun the command to resume."
        ),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is generated.")] = False,
    base: Annotated[
        bool, typer.Option("--base", help="Answer with the base model, without the adapter.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer with both, the base model and the adapter.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 always picks the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most likely tokens whose probabilities add up to this."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample from this many of the most likely tokens.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Sampling seed: the same seed gives the same answers.")
    ] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of --input per batch. Default: as many as fit a token budget."),
    ] = None,
) -> None:
    """Answer a prompt or a file of prompts with a trial's adapter, in the template it was trained on.

    Answers to a file are JSON lines in the same order, on standard output or in `--output`. With
    `--output`, an interrupted run resumes.

    Example: `tuner trial generate best --prompt "Name three rivers." --compare`
    """
    from tuner.cli.generate import Asked, generate_answers
    from tuner.cli.printing import next_command, open_here
    from tuner.errors import InputError

    if base and compare:
        raise InputError("pass at most one of --base (the base model only) and --compare (both)")
    asked = Asked(
        prompt=prompt,
        context=context,
        system=system,
        input=input,
        output=output,
        models=("adapter", "base") if compare else ("base",) if base else ("adapter",),
        stream=stream,
        batch_size=batch_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    generate_answers(open_here(), trial, asked)
    how = "" if base or compare else " --compare"
    command = f'tuner trial generate {trial} --prompt "..."{how}'
    typer.echo(f"next: {next_command(command)}", err=True)


@app.command()
def export(
    trial: TrialName,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Directory to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a full model, with the adapter merged into the base model.")
    ] = False,
    dtype: Annotated[
        MergedDtype | None, typer.Option(help="Type of the merged weights. Default: bfloat16.")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also convert the merged model into this file; implies --merge."),
    ] = None,
    gguf_converter: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Path of llama.cpp's convert_hf_to_gguf.py, if it is not on the PATH."
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload the directory to OWNER/NAME on the Hub, with HF_TOKEN."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a repository created by --push public instead of private.")
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence of the export, such as apache-2.0."),
    ] = None,
    tool: Annotated[
        OtherTool | None,
        typer.Option(
            "--as", help="Write a configuration and rows for another training tool instead of the adapter."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a trial's adapter as a PEFT directory with tokenizer and model card, or in another form.

    Example: `tuner trial export best --to my-model --merge`
    """
    from tuner.api.export import Export, export_recipe, export_trial, finished_trial
    from tuner.cli.printing import next_command, open_here, prepared, warn_of_code

    folder = open_here()
    if tool is not None:
        weights = {"--merge": merge, "--dtype": dtype, "--gguf": gguf, "--gguf-converter": gguf_converter}
        _refuse_beside_as({**weights, "--push": push, "--public": public, "--license": licence})
        finished = finished_trial(folder, trial)
        warn_of_code(finished.spec.model)
        command = export_recipe(
            finished,
            tool.value,
            to=to,
            force=force,
            study=folder.directory,
            prepare=prepared,
            tell=typer.echo,
        )
        typer.echo(f"next: {command}", err=True)
        return
    wanted = Export(
        to=to,
        force=force,
        merge=merge or gguf is not None,
        dtype=dtype.value if dtype else None,
        licence=licence,
        gguf=gguf,
        gguf_converter=gguf_converter,
        push=push,
        public=public,
    )
    finished = finished_trial(folder, trial)
    warn_of_code(finished.spec.model)
    export_trial(finished, wanted, study=folder.directory, tell=typer.echo, warn=_warn)
    typer.echo(f"next: {next_command(f'tuner trial show {trial}')}", err=True)


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def _refuse_beside_as(options: Mapping[str, object]) -> None:
    """Raise InputError for options on weights: a configuration has none."""
    from tuner.errors import InputError

    if given := [option for option, value in options.items() if value]:
        raise InputError(f"--as writes a configuration, not weights; remove {' and '.join(given)}")
