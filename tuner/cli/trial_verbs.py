"""`tuner trial ...`: trials are listed, shown and used."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Trials: list, show, use. Begin with `tuner trial list`.", no_args_is_help=True)

TrialName = Annotated[
    str, typer.Argument(metavar="T", help="round1/7, a bare 7 in the latest round, or best.")
]
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
    from tuner.cli.looking import print_trials
    from tuner.cli.printing import next_command, open_here

    command = print_trials(open_here(), round_name=round_name, as_json=json)
    if not json:
        typer.echo(f"next: {next_command(command)}", err=True)


@app.command()
def show(trial: TrialName = "best", json: Json = False) -> None:
    """One trial: hyperparameters, curve, best step, where its adapter is.

    Example: `tuner trial show round1/7`
    """
    from tuner.cli.looking import print_trial
    from tuner.cli.printing import next_command, open_here

    command = print_trial(open_here(), trial, as_json=json)
    if not json:
        typer.echo(f"next: {next_command(command)}", err=True)


@app.command()
def generate(
    trial: TrialName,
    prompt: Annotated[str, typer.Option(help="The instruction, in the words of a training row.")],
    input: Annotated[str, typer.Option("--context", help="The row's input, where the format has one.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to answer with, at most.")] = 256,
    base: Annotated[bool, typer.Option("--base", help="Answer with the untouched base, to compare.")] = False,
) -> None:
    """Answer a prompt with a trial's adapter, in the template it was trained on.

    Example: `tuner trial generate best --prompt "Name three rivers."`
    """
    from tuner.cli.generating import generate_answer
    from tuner.cli.printing import open_here

    generate_answer(
        open_here(),
        trial,
        prompt=prompt,
        context=input,
        max_new_tokens=max_new_tokens,
        with_adapter=not base,
    )
    compare = "" if base else " --base"
    typer.echo(f'next: tuner trial generate {trial} --prompt "..."{compare}', err=True)
