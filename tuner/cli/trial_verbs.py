"""`tuner trial ...`: trials are listed, shown, used and shared."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Trials: list, show, use, share. Begin with `tuner trial list`.", no_args_is_help=True)

TrialName = Annotated[
    str, typer.Argument(metavar="T", help="round1/7, a bare 7 in the latest round, or best.")
]


class MergedDtype(StrEnum):
    """Types that merged weights may have."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class OtherTool(StrEnum):
    """Tools whose files `trial export --as` writes."""

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
    """The trials of all rounds: what varies between them, best losses and best steps.

    Example: `tuner trial list --round round1`
    """
    from tuner.cli.printing import next_command, open_here
    from tuner.cli.trial_output import print_trials

    command = print_trials(open_here(), round_name=round_name, as_json=json)
    if not json:
        typer.echo(f"next: {next_command(command)}", err=True)


@app.command()
def show(
    trial: TrialName = "best",
    test: Annotated[
        bool,
        typer.Option("--test", help="Score it on data.test first, once: for the trial you settle on."),
    ] = False,
    json: Json = False,
) -> None:
    """One trial: hyperparameters, curve, best step, where its adapter is, its score on data.test.

    Example: `tuner trial show round1/7`
    """
    from tuner.cli.printing import next_command, open_here
    from tuner.cli.trial_output import print_trial

    command = print_trial(open_here(), trial, test=test, as_json=json)
    if not json:
        typer.echo(f"next: {next_command(command)}", err=True)


@app.command()
def reproduce(
    trial: TrialName,
    to_step: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Run the first N steps only; the schedule stays as it was."),
    ] = None,
    json: Json = False,
) -> None:
    """Run a trial again, alone, and say whether its curve agrees; exit code 1 where it does not.

    The study stays as it is: no trial is added, and the run's files are deleted at its end.

    Example: `tuner trial reproduce best --to-step 20`
    """
    from tuner.cli.printing import next_command, open_here
    from tuner.cli.trial_output import reproduce_trial

    agrees = reproduce_trial(open_here(), trial, to_step=to_step, as_json=json)
    if not json:
        typer.echo(f"next: {next_command(f'tuner trial show {trial}')}", err=True)
    if not agrees:
        raise typer.Exit(1)


@app.command()
def generate(
    trial: TrialName,
    prompt: Annotated[
        str | None, typer.Option(help="The instruction, in the words of a training row.")
    ] = None,
    context: Annotated[str, typer.Option(help="The row's input, where the format has one.")] = "",
    system: Annotated[
        str, typer.Option(help="The system message, of rows of --input too that have none.")
    ] = "",
    input: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Answer its rows: training rows, {"messages": ...} or {"prompt": ...} each; or messages.',
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Where answers to --input go; the same command goes on."),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it grows.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Answer with the base, without the adapter.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with both, side by side.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to answer with, at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest tokens of this probability together.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among this many tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws: the same gives the same answers.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of --input at once; else as many as fit a token budget.")
    ] = None,
) -> None:
    """Answer a prompt, or a file of them, with a trial's adapter, in the template it was trained on.

    Answers to a file are JSON lines in its order, on standard output or in `--output`, which an interrupted
    run goes on with.

    Example: `tuner trial generate best --prompt "Name three rivers." --compare`
    """
    from tuner.cli.generate import Asked, generate_answers
    from tuner.cli.printing import next_command, open_here
    from tuner.errors import InputError

    if base and compare:
        raise InputError("--base answers with the base alone, --compare with both; give one of them")
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
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The directory to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="A whole model, the adapter added into the base's weights.")
    ] = False,
    dtype: Annotated[
        MergedDtype | None, typer.Option(help="Type of merged weights; bfloat16 when left out.")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Convert the merged model into this file too; implies --merge."),
    ] = None,
    gguf_converter: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py, where it is not on the PATH."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload the directory to OWNER/NAME on the Hub, with HF_TOKEN."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="A repository that --push makes is public, not private.")
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence of what is exported, such as apache-2.0."),
    ] = None,
    tool: Annotated[
        OtherTool | None,
        typer.Option(
            "--as", help="Not the adapter, but its configuration and rows for another tool to train."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a trial's adapter as a PEFT directory with tokenizer and model card, or more.

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
    """Raises InputError for options of weights: a configuration has none."""
    from tuner.errors import InputError

    if given := [option for option, value in options.items() if value]:
        raise InputError(f"--as: writes a configuration; leave out {' and '.join(given)}")
