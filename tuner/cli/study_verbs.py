"""`tuner study ...`: write, check, run, promote and inspect rounds."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tuner.cli.hints import Group, one_name, round_path

if TYPE_CHECKING:
    from tuner.report import RoundReport
    from tuner.study.folder import StudyFolder

app = typer.Typer(
    cls=Group,
    help="Rounds: write, check, run, promote, inspect. Start with `tuner study new --help`.",
    no_args_is_help=True,
)

RoundPath = Annotated[
    Path, typer.Argument(metavar="ROUND.yaml", help="Round file.", callback=lambda path: round_path(path))
]
For = Annotated[
    str | None, typer.Option("--for", metavar="TIME", help="Stop after this long, such as 90m or 2h.")
]
Slots = Annotated[
    str | None,
    typer.Option("--slots", metavar="K|auto", help="Trials trained together; overrides run.slots."),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers", metavar="N|auto", help="Number of worker processes, one per GPU; auto uses every GPU."
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="Where workers run: local, ray (a cluster), simulated (a dry run with synthetic losses, in "
        "dry-run/), or your own engine as package.module:Class. Overrides run.engine.",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT|local",
        help="Ray cluster of --engine ray; overrides run.ray_address and RAY_ADDRESS. local starts one here.",
    ),
]
Notify = Annotated[
    str | None,
    typer.Option(
        metavar="COMMAND",
        help="Run this at each new best trial and at the end, with JSON on its input; overrides run.notify.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Write a value into the file: hyperparameters.lora_r=16,32 (a list), "
        "hyperparameters.learning_rate=1e-5:1e-3:log (a range) or data.max_length=1024. Repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


@app.command()
def new(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the new study.")],
    model: Annotated[str | None, typer.Option(help="Directory or Hub id of the base model.")] = None,
    data: Annotated[str | None, typer.Option(help="File or Hub id of the training rows.")] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval",
            help="Evaluation rows. Default: 5% of the training rows, but at least 50 if there are enough.",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Format of the rows, such as alpaca. Default: detected from the columns."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=NAME",
            help="Column name for a field of the format, such as prompt=question. Repeatable.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the training data, if there are several.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Known recipe to start from: alpaca-qlora (4 bits, on a GPU).")
    ] = None,
    command: Annotated[
        str | None,
        typer.Option(
            metavar="TOOL",
            help="Train by a command of your own, with this tool, such as trl or none. Takes --config "
            "in place of --model and --data.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --command: the tool's configuration.")
    ] = None,
    set_: Set = None,
) -> None:
    """Write a commented round1.yaml that passes `study check`; the horizon is derived from the row count.

    Example: `tuner study new alpaca --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl`
    """
    from tuner.api.new import write_first_command, write_first_round
    from tuner.cli.printing import error_output, prepared, progress_shown

    if command is not None:
        if config is None or model is not None or data is not None:
            from tuner.errors import InputError

            raise InputError("--command requires --config FILE, and neither --model nor --data")
        path = write_first_command(directory, tool=command, config=config, settings=set_ or ())
        _say(f"wrote {path}")
        _next(f"tuner study check {shlex.quote(str(path))}")
        return
    if model is None or data is None:
        from tuner.errors import InputError

        raise InputError("pass --model and --data, or --command and --config")
    path = write_first_round(
        directory,
        model=model,
        data=data,
        eval_data=eval_data,
        format=format,
        columns=columns or (),
        split=split,
        template=template,
        settings=set_ or (),
        prepare=prepared,
        telling=lambda: progress_shown(error_output()),
    )
    _say(f"wrote {path}")
    _next(f"tuner study check {shlex.quote(str(path))}")


@app.command("import")
def import_(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS",
            help="Folders of Trainer runs, or folders of such folders; files of JSON lines; CSV files.",
        ),
    ],
    round_name: Annotated[str, typer.Option("--round", metavar="NAME", help="The new round.")] = "imported",
    metric: Annotated[str, typer.Option(help="The metric that ranks the runs.")] = "eval_loss",
    direction: Annotated[
        str | None, typer.Option(help="minimize or maximize; required unless the metric is eval_loss.")
    ] = None,
    max_train_steps: Annotated[
        int | None, typer.Option(min=1, help="The horizon. Default: that of most runs.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Value that the files do not contain, such as hyperparameters.schedule=linear. Repeatable.",
        ),
    ] = None,
    command: Annotated[
        str | None, typer.Option(help="The command that trains a trial, for longer rounds.")
    ] = None,
    tool: Annotated[
        str, typer.Option(help="Its tool: trl, transformers, axolotl, llamafactory or none.")
    ] = "none",
    config: Annotated[str | None, typer.Option(metavar="FILE", help="The tool's configuration.")] = None,
) -> None:
    """Make a round of finished runs that tuner did not start: best steps, a verdict and a suggestion.

    The runs are only read. Values that they do not contain, such as the schedule, stay unknown.

    Example: `tuner study import outputs/ --set hyperparameters.schedule=linear`
    """
    from tuner.api.new import import_finished, values_of

    made = import_finished(
        Path(),
        runs,
        round=round_name,
        metric=metric,
        direction=direction,
        max_train_steps=max_train_steps,
        hyperparameters=values_of(set_ or [], hint=lambda text: _say(f"Hint: {text}")),
        command=command,
        tool=tool,
        config=config,
    )
    for number, name in enumerate(made.runs):
        _say(f"trial {number}: {name}")
    for remark in made.remarks:
        _say(remark)
    if made.unknown:
        _say(f"unknown: {', '.join(made.unknown)}; --set and --command give them")
    _print_summary(_reports(Path(), made.file), directory=Path())


@app.command()
def check(
    round_file: RoundPath,
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="Print N rows as the model sees them.")
    ] = 0,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the model in a worker of the engine and time a few steps.")
    ] = False,
    engine: Engine = None,
    ray_address: RayAddress = None,
    json: Json = False,
) -> None:
    """Validate the file, model, tokenizer and data, and print the plan. Trains and records nothing.

    Example: `tuner study check round1.yaml --show 2`
    """
    from tuner.cli.output import check_round
    from tuner.cli.rounds import where_typed

    where = where_typed(None, None, engine, ray_address)
    command = check_round(round_file, show=show, probe=probe, where=where, as_json=json)
    if command is None:
        raise typer.Exit(2)
    if not json:
        _next(command)


@app.command()
def run(
    round_file: RoundPath,
    for_: For = None,
    slots: Slots = None,
    workers: Workers = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
    notify: Notify = None,
) -> None:
    """Start or resume a round.

    Example: `tuner study run round1.yaml --for 2h`
    """
    from tuner.cli.rounds import run_file, where_typed

    where = where_typed(slots, workers, engine, ray_address, notify)
    again, ran = run_file(round_file, duration=for_, where=where)
    if ran is None:
        _next(again)
        return
    found = _reports(ran.parent, ran)
    goes_on = None if found[-1].is_finished else again
    _print_summary(found, directory=_folder_of(round_file, ran), command=goes_on)


@app.command()
def sweep(
    round_file: RoundPath,
    epochs: Annotated[
        float | None,
        typer.Option(metavar="E", help="Longest affordable run, in epochs; sets run.production_steps."),
    ] = None,
    for_: For = None,
    slots: Slots = None,
    workers: Workers = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
    notify: Notify = None,
) -> None:
    """Find a first max_train_steps from how fast a constant learning rate fits the training rows.

    Rounds `sweep-N` try 8 rates without dropout and weight decay, with N doubling up to
    `run.production_steps`. The result is written into the round file unless its round has started.

    Example: `tuner study sweep round1.yaml --epochs 3 --for 2h`
    """
    from tuner.cli.printing import next_command
    from tuner.cli.rounds import sweep_file, where_typed

    where = where_typed(slots, workers, engine, ray_address, notify)
    command, file = sweep_file(round_file, duration=for_, where=where, epochs=epochs)
    directory = None if file is None else _folder_of(round_file, file)
    _say(f"next: {next_command(command, directory=directory)}")


@app.command()
def auto(
    round_file: RoundPath,
    for_: For = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            min=0,
            help="How often to restart from the shortest horizon, reusing all earlier results. Default: 0.",
        ),
    ] = None,
    passes: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,
    slots: Slots = None,
    workers: Workers = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
    notify: Notify = None,
) -> None:
    """Run a round, promote it and run the next, until longer rounds bring no more gain; or resume.

    Stops when the report says that more steps would not help or cannot tell, at `run.production_steps`, or
    after `--for`. Writes each file as `study promote` does. With `--restarts`, longer rounds carry over a
    third of the trials and add none, then the search restarts from the shortest horizon. Unless stopped by
    `--for`, scores the best trial on `data.test`, once.

    Example: `tuner study auto round1.yaml --for 12h`
    """
    from dataclasses import replace

    from tuner.api.auto import restarts_of
    from tuner.cli.rounds import run_rounds, where_typed

    number, hint = restarts_of(restarts, passes, spelt=("--restarts ", "--passes "))
    if hint is not None:
        _say(hint)
    where = where_typed(slots, workers, engine, ray_address, notify)
    ended = run_rounds(round_file, duration=for_, restarts=number, where=where)
    if ended.last is None:
        _next(ended.command)
        return
    for sentence in (ended.reason, ended.remark):
        if sentence is not None:
            _say(sentence)
    *earlier, last = _reports(ended.last.parent, ended.last)
    if ended.reason is not None and not ended.taught_nothing:
        last = replace(last, ended_because=ended.reason, next_command="tuner trial show best")
    _print_summary(
        (*earlier, last),
        directory=_folder_of(round_file, ended.last),
        command=ended.command if ended.reason is None else None,
    )
    if ended.taught_nothing:
        raise typer.Exit(1)


@app.command()
def status(json: Json = False) -> None:
    """Show the study's rounds, trials by state, and the best trial so far.

    Example: `tuner study status`
    """
    from tuner.cli.output import print_status

    command = print_status(_folder(), as_json=json)
    if not json:
        _next(command)


@app.command()
def promote(
    round_name: Annotated[
        str | None, typer.Argument(metavar="ROUND", help="Name of the next round, the same as --to.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="ROUND", help="Name of the next round; the file is ROUND.yaml.")
    ] = None,
    from_round: Annotated[
        str | None,
        typer.Option("--from", metavar="ROUND", help="Round to promote from. Default: the latest."),
    ] = None,
    max_train_steps: Annotated[
        int | None, typer.Option(min=1, help="Next horizon. Default: the suggested one.")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="Number of best trials to carry over. Default: 3, or half of the round's trials if fewer.",
        ),
    ] = None,
    decay: Annotated[
        str,
        typer.Option(
            metavar="share|steps",
            help="What to keep of a linear decay: its share of the run or its length in steps.",
        ),
    ] = "share",
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="Also search a fixed hyperparameter, over a list (lora_dropout=0,0.05) or a range "
            "(weight_decay=1e-4:1e-1:log). Repeatable.",
        ),
    ] = None,
    set_: Set = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
    json: Json = False,
) -> None:
    """Read a round, write the next round's file and explain it.

    Example: `tuner study promote --to round2`
    """
    from tuner.cli.output import promotion_text
    from tuner.report import dumps
    from tuner.study.promotion import Overrides, promote_held

    if decay not in ("steps", "share"):
        raise typer.BadParameter(
            f"got {decay}; allowed: share (of the run) and steps (the length), whichever to keep",
            param_hint="--decay",
        )
    kept: Literal["steps", "share"] = "steps" if decay == "steps" else "share"
    done = promote_held(
        _folder(),
        to=one_name(round_name, to, name="--to"),
        from_round=from_round,
        overrides=Overrides(max_train_steps, top, kept, tuple(add or ()), tuple(set_ or ())),
        force=force,
    )
    typer.echo(dumps(done.document) if json else promotion_text(done.document))
    if not json:
        _next(f"tuner study run {done.path.name}")


@app.command()
def report(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ROUND | STUDY STUDY]",
            help="Name of the round, by default the latest; or the folders of two studies to compare.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Path of the HTML page. Default: report-ROUND.html.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the report as Markdown.")] = None,
) -> None:
    """Report on a round, in the terminal and as one self-contained HTML page; or compare two studies.

    Example: `tuner study report round1`
    """
    from dataclasses import replace

    from tuner.api.round import write_reports
    from tuner.cli.printing import next_command
    from tuner.errors import InputError

    if names and len(names) > 1:
        if markdown is not None:
            raise InputError("--markdown: a comparison has no Markdown form; leave it out")
        _compare(names, html)
        return
    _folder()
    *earlier, last = _reports(Path(), Path(names[0]) if names else None)
    path = html or Path(f"report-{last.record.name}.html")
    typed = replace(last, next_command=next_command(last.next_command))
    write_reports((*earlier, typed), html=path, markdown=markdown)
    _print_summary((*earlier, last), page=path)


def _compare(names: list[str], html: Path | None) -> None:
    """Compare the studies of two folders. Raises InputError for another number of folders."""
    from tuner.cli.printing import PROSE, output
    from tuner.errors import InputError
    from tuner.report.comparison import Compared, comparison_page, comparison_summary
    from tuner.report.html import write_page

    folders = [Path(name) for name in names]
    missing = [name for name, folder in zip(names, folders, strict=True) if not folder.is_dir()]
    if len(folders) != 2 or missing:
        there = f"; there is no folder {missing[0]}" if len(folders) == 2 else ""
        raise InputError(
            f"{' '.join(names)}: expects one round of this study, or the folders of two studies to compare, "
            f"such as: tuner study report study-a study-b{there}"
        )
    one, other = (_reports(folder, None) for folder in folders)
    shown = [folder.resolve().name for folder in folders]
    called = (shown[0], shown[1]) if shown[0] != shown[1] else (names[0], names[1])
    compared = Compared(called, (one, other))
    path = html or Path(f"comparison-{shown[0]}-{shown[1]}.html")
    write_page(path, comparison_page(compared))
    output(piped_width=PROSE).print(comparison_summary(compared))
    _say(f"full comparison: {path}")
    _next(f"tuner -C {shlex.quote(names[0])} study report")


@app.command()
def dashboard(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8080,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. Anyone who can reach it can change and delete the study."),
    ] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Further host name that browsers may use, such as that of a proxy. Repeatable.",
        ),
    ] = None,
) -> None:
    """Serve optuna-dashboard for this study, on this machine only by default; Ctrl-C to stop.

    Example: `tuner study dashboard --port 8081`
    """
    from tuner.errors import InputError
    from tuner.study.dashboard import serve_dashboard

    folder = _folder()
    if not folder.has_begun:
        raise InputError(f"{folder.name}: no round has started, so there is nothing to show yet")
    try:
        serve_dashboard(
            folder.storage,
            folder.name,
            port=port,
            announce=lambda said: _say(f"{said}  (Ctrl-C to stop)" if said.startswith("http") else said),
            host=host,
            allow=allow_host or (),
        )
    except KeyboardInterrupt:
        _next("tuner study status")


@app.command()
def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Delete them.")] = False,
) -> None:
    """List checkpoints that are no longer needed; with --yes, delete them.

    Example: `tuner study clean --yes`
    """
    from tuner.api.clean import clean_study

    freed = clean_study(_folder(), delete=yes, tell=typer.echo)
    _next("tuner study clean --yes" if freed and not yes else "tuner study status")


def _folder() -> StudyFolder:
    """Open the study of the current folder; name broken round files on standard error."""
    from tuner.cli.printing import open_here

    folder = open_here()
    for error in folder.broken:
        _say(f"skipped, since it has mistakes: {error.brief}")
    for error in folder.unrunnable:
        _say(f"cannot run here: {error.brief}")
    return folder


def _reports(directory: Path, round_path: Path | None) -> tuple[RoundReport, ...]:
    from tuner.study.folder import open_folder
    from tuner.study.lookup import reports_on

    return reports_on(open_folder(directory), round_path)


def _folder_of(round_file: Path, ran: Path) -> Path:
    """Return the folder for the next verbs: the one of the typed file, or its dry run's."""
    folder = round_file.parent
    return folder if ran.parent.resolve() == folder.resolve() else folder / ran.parent.name


def _print_summary(
    found: tuple[RoundReport, ...],
    *,
    page: Path | None = None,
    directory: Path | None = None,
    command: str | None = None,
) -> None:
    """Print the last report; the others are those of the rounds before.

    The next command is `command`, typed where this one was; without it, the report's, within `directory`.
    """
    from dataclasses import replace

    from tuner.cli.printing import PROSE, next_command, output
    from tuner.report import summary

    *earlier, report = found
    command = next_command(command) if command else next_command(report.next_command, directory=directory)
    output(piped_width=PROSE).print(summary(replace(report, next_command=command), earlier=earlier))
    if page is not None:
        _say(f"full report: {page}")
    _say(f"next: {command}")


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _next(command: str) -> None:
    from tuner.cli.printing import next_command

    _say(f"next: {next_command(command)}")
