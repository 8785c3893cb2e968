"""What a study reports in the terminal: tables, a trial's page, and `study report` in short form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tuner.methods.table import seed_of
from tuner.playbook.selection import best_evaluation, settled_step
from tuner.records import LOSS, NodeChange, Trial, TrialState
from tuner.report import advice, format, terminal
from tuner.report.board import STATE_STYLES
from tuner.report.documents import RoundPlan, RoundStatus
from tuner.report.round_report import (
    RoundReport,
    best_first,
    have_answered,
    metric_of,
    trial_headers,
    trial_rows,
)
from tuner.report.terminal import Column, FittedTable, column

_PLOT_HEIGHT = 12
_WIDEST_PLOT = 80
_SHOWN_CHANGES = 6
"""Changes of a cluster's nodes that `status` lists."""
_PLOT_MARGIN = 12
"""Width in characters left of a curve, axis labels included."""


def status_table(study: str, rounds: Sequence[RoundStatus]) -> RenderableType:
    """Render the rounds of a study, and the best trial of the latest round that has one."""
    if not rounds:
        return Text(f"{study}: no round has started")
    best = [status.best for status in rounds]
    table = FittedTable(
        [
            Column("round", tuple(status.round for status in rounds), rank=0, is_number=False),
            column("steps", [str(status.max_train_steps) for status in rounds], rank=3),
            Column("state", tuple(status.state for status in rounds), rank=2, is_number=False),
            column("trials", [format.counts(status.counts) for status in rounds], rank=5, min_width=12),
            *_answers_of([b.answer_score if b else None for b in best]),
            *_metrics_of(rounds),
            column("best loss", [format.loss(b.eval_loss if b else None) for b in best], rank=1),
            column("trial", [str(b.trial) if b else format.NOTHING for b in best], rank=4),
            column("best step", [str(b.step) if b else format.NOTHING for b in best], rank=6),
        ]
    )
    lines: list[RenderableType] = [Text(study, style="bold"), table]
    last = next((status for status in reversed(rounds) if status.best is not None), None)
    if last is not None and last.best is not None:
        kept, place = last.kept, last.best.adapter
        where = f", {kept} in {place}" if place else f", its {kept} is missing"
        lines.append(Text(f"best: {last.round}/{last.best.trial}{where}"))
    running = [(s.round, trial, format.place(at)) for s in rounds for trial, at in s.running.items()]
    lines += [Text(f"{name}/{trial} runs on {place}") for name, trial, place in running if place]
    lines += [Text(f"{s.round}: {change}") for s in rounds for change in _node_changes(s.node_changes)]
    lines += [Text(f"{s.round}: {_overfits(s.overfitting)}", style="yellow") for s in rounds if s.overfitting]
    lines += [Text(f"{s.round}: comparison runs left: {s.branches_left}") for s in rounds if s.branches_left]
    lines += [
        Text(f"{s.round}: about {format.duration(s.seconds_left)} left at the pace so far")
        for s in rounds
        if s.seconds_left is not None
    ]
    speeds = [(s.round, s.throughput) for s in rounds if s.throughput is not None]
    lines += [Text(f"{name}: {format.throughput_line(speed)}") for name, speed in speeds]
    return Group(*lines)


def _node_changes(changes: Sequence[NodeChange]) -> list[str]:
    """Return a line for each of the last changes, and one that counts those before."""
    before, shown = changes[:-_SHOWN_CHANGES], changes[-_SHOWN_CHANGES:]
    earlier = [f"{format.count(len(before), 'earlier change')} of nodes, see --json"] if before else []
    said = [(c, format.node_change(c).partition("\n")[0]) for c in shown]
    return earlier + [f"{format.moment(change.at)}  node {change.node} {text}" for change, text in said]


def _answers_of(scores: Sequence[float | None]) -> list[Column]:
    shown = [format.NOTHING if score is None else format.number(score) for score in scores]
    has_some = any(score is not None for score in scores)
    return [column(format.ANSWERS_HEADER, shown, rank=1)] if has_some else []


def _metrics_of(rounds: Sequence[RoundStatus]) -> list[Column]:
    """Return columns of the best values by metrics other than the loss; answers have a separate column."""
    others = [s.objective.metric if s.objective.per == "evaluation" else LOSS.metric for s in rounds]
    if set(others) <= {LOSS.metric}:
        return []
    cells = [
        f"{metric} {format.loss(s.best.best_value)}" if s.best and metric != LOSS.metric else format.NOTHING
        for s, metric in zip(rounds, others, strict=True)
    ]
    return [column("best value", cells, rank=1)]


def _overfits(trials: Mapping[int, int]) -> str:
    named = ", ".join(f"{trial} (since step {step})" for trial, step in trials.items())
    return f"the evaluation loss rises in {'trials' if len(trials) > 1 else 'trial'} {named}: overfitting"


def trials_table(trials: Sequence[Trial], *, names: Sequence[str] | None = None) -> FittedTable:
    """Render trials by round and best loss; `names` are the hyperparameters to show."""
    shown = format.varying(trials) if names is None else tuple(names)
    rounds = dict.fromkeys(trial.round for trial in trials)
    order = [best_first([trial for trial in trials if trial.round == round]) for round in rounds]
    rows = [trial for own in order for trial in own]
    leaders = [own[0] for own in order if own[0].state is TrialState.COMPLETE]
    answers, metric = have_answered(rows), metric_of(rows)
    cells = trial_rows(rows, shown, answers=answers, metric=metric)
    headers = trial_headers(shown, answers=answers, metric=metric)
    # Name and state have separate cells; take only their headers.
    columns = [
        column(name, [] if name in ("trial", "state") else [row[i] for row in cells], rank=0)
        for i, name in enumerate(headers)
    ]
    first, *chosen, loss, step, settled, _, remarks = columns
    num_values = int(answers) + (metric is not None)
    scored = [replace(chosen.pop(), rank=1) for _ in range(num_values)][::-1]
    styled = {state: Text(state, style=STATE_STYLES[state]) for state in TrialState}
    states = tuple(styled[trial.state] for trial in rows)
    names_of_trials = tuple(trial.name for trial in rows)
    return FittedTable(
        [
            replace(first, cells=names_of_trials, is_number=False),
            *(replace(other, rank=6 if i else 2) for i, other in enumerate(chosen)),
            *scored,
            replace(loss, rank=1),
            replace(step, rank=4),
            replace(settled, rank=7),
            Column("state", states, rank=3, is_number=False),
            replace(remarks, rank=5, is_number=False, min_width=20),
        ],
        row_styles=["bold" if any(trial is leader for leader in leaders) else "" for trial in rows],
    )


def trial_page(
    trial: Trial,
    *,
    max_train_steps: int,
    adapter: str | None,
    kept: str = "adapter",
    scored: Sequence[Trial] = (),
) -> RenderableType:
    """Render one trial: result, hyperparameters, curve and evaluations.

    `kept` is what is kept of it, in a word. `scored` are the study's trials that were scored on `data.test`,
    in order.
    """
    head = Text.assemble((trial.name, "bold"), "  ", (trial.state.value, STATE_STYLES[trial.state]))
    return Group(
        head,
        *([Text(trial.reason)] if trial.reason else []),
        _pairs(_trial_facts(trial, max_train_steps=max_train_steps, kept={kept: adapter})),
        *([Text(format.final_in_words(trial, scored))] if trial.final_score is not None else []),
        Text("\nhyperparameters", style="bold"),
        _pairs({name: format.value(value) for name, value in trial.hyperparameters.items()}),
        Text("\ncurve", style="bold"),
        _Curve(trial, max_train_steps),
        Text("\nevaluations", style="bold"),
        _evaluations_table(trial),
    )


def _trial_facts(trial: Trial, *, max_train_steps: int, kept: Mapping[str, str | None]) -> dict[str, str]:
    best, settled = best_evaluation(trial.evaluations), settled_step(trial.evaluations)
    facts = {"seed": str(seed_of(trial.hyperparameters))}
    if best is not None:
        share = format.percent(best.step / max_train_steps)
        if best.objective is not None:
            facts[f"best {best.objective.metric}"] = f"{format.loss(best.value)} at step {best.step}"
        facts["best loss" if best.objective is None else "loss at best step"] = (
            f"{format.loss(best.eval_loss)} at step {best.step} of {max_train_steps} ({share})"
        )
        if best.token_accuracy is not None:
            facts["token accuracy"] = f"{format.percent(best.token_accuracy)} at that step"
        facts["settled"] = f"at step {settled}"
    if (score := trial.answer_score) is not None:
        facts[format.ANSWERS_HEADER] = f"{format.answers_in_words(score)}, at step {score.step}"
    if trial.final_score is not None:
        facts["test loss"] = format.final_score(trial.final_score)
    facts |= {what: place or format.NOTHING for what, place in kept.items()}
    if trial.continues is not None:
        facts["continues"] = str(trial.continues)
    attempts = format.count(len(trial.attempts), "attempt")
    unknown = "; up to a second of a killed attempt is unknown" if trial.was_killed else ""
    facts["executed"] = f"{format.count(trial.executed_steps, 'step')} in {attempts}{unknown}"
    return facts


def _evaluations_table(trial: Trial) -> FittedTable:
    best, made = best_evaluation(trial.evaluations), trial.evaluations
    accuracies = ["" if e.token_accuracy is None else format.percent(e.token_accuracy) for e in made]
    metric = metric_of([trial])
    rates = [format.NOTHING if e.learning_rate is None else format.number(e.learning_rate) for e in made]
    return FittedTable(
        [
            column("step", [str(e.step) for e in made], rank=0),
            column("train loss", [format.loss(e.train_loss) for e in made], rank=2),
            column("eval loss", [format.loss(e.eval_loss) for e in made], rank=1),
            *([column(metric, [format.loss(e.value) for e in made], rank=1)] if metric else []),
            column("learning rate", rates, rank=3),
            *([column("token accuracy", accuracies, rank=4)] if any(accuracies) else []),
        ],
        row_styles=["bold green" if e is best else "" for e in made],
    )


class _Curve:
    """A trial's curve, as wide as the console and in characters it can display."""

    def __init__(self, trial: Trial, max_train_steps: int) -> None:
        self._trial, self._max_train_steps = trial, max_train_steps

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        marks = terminal.marks_for(options.ascii_only)
        lines = terminal.curve(
            self._trial.evaluations,
            max_train_steps=self._max_train_steps,
            width=max(10, min(_WIDEST_PLOT, options.max_width - _PLOT_MARGIN)),
            height=_PLOT_HEIGHT,
            marks=marks,
        )
        if not lines:
            yield Text("no evaluation yet")
            return
        for line in lines:
            yield Text(line, no_wrap=True, overflow="crop")
        legend = f"{marks.eval_loss} eval loss  {marks.train_loss} train loss  {marks.best} best"
        above = f"  {marks.above} off the scale" if any(marks.above in line for line in lines) else ""
        yield Text(legend + above, style="dim")


def plan_table(plan: RoundPlan, *, title: str, remarks: Sequence[str] = ()) -> RenderableType:
    """Render the plan of `study check`, then remarks on the data."""
    work = f"{format.count(plan.trials, 'trial')} x {format.count(plan.max_train_steps, 'step')}"
    facts = {
        "work": f"{work} = {plan.trials * plan.max_train_steps:,}",
        **_branches(plan),
        **_rows_seen(plan),
        **({} if plan.metric == LOSS.metric else {"objective": _objective(plan)}),
    }
    if plan.checkpoint_bytes is not None:
        facts["checkpoints"] = f"up to {format.size(plan.checkpoint_bytes)} on disk"
    if plan.peak_memory_bytes is not None:
        facts["peak memory"] = format.size(plan.peak_memory_bytes)
    if plan.hours is not None:
        facts["time"] = f"about {format.duration(3600 * plan.hours)}"
    return Group(Text(title, style="bold"), _pairs(facts), *(Text(remark) for remark in remarks))


def _objective(plan: RoundPlan) -> str:
    return plan.metric if plan.direction is None else f"{plan.direction} {plan.metric}"


def _rows_seen(plan: RoundPlan) -> dict[str, str]:
    """Return what a trial trains and is evaluated on; nothing for a command, which alone knows."""
    if plan.epochs is None or plan.evaluation_share is None:
        return {}
    share, rows = format.percent(plan.evaluation_share), format.count(plan.train_rows or 0, "row")
    return {
        "each trial sees": f"{format.number(plan.epochs)} epochs of {rows}",
        **_token_lengths(plan),
        "evaluation": f"{format.count(plan.eval_rows or 0, 'row')}, {share} of the work",
        "training tokens": f"{plan.tokens or 0:,}",
    }


def _token_lengths(plan: RoundPlan) -> dict[str, str]:
    if not plan.token_lengths:
        return {}
    half, most, nearly_all, longest = (plan.token_lengths[name] for name in ("p50", "p90", "p99", "max"))
    below = f"half up to {half} tokens, 90% up to {most}, 99% up to {nearly_all}"
    return {"row lengths": f"{below}, longest {longest}"}


def _branches(plan: RoundPlan) -> dict[str, str]:
    if not plan.branches:
        return {}
    share = format.percent(plan.branch_steps / (plan.trials * plan.max_train_steps))
    steps = format.count(plan.branch_steps, "step")
    return {"comparison runs": f"up to {plan.branches} after the last trial, {steps}: {share} more"}


def _pairs(facts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(Text(name), Text(fact))
    return table


_LEADING_SHOWN = 5
_SEVERITY_STYLES = {"problem": "bold red", "warning": "yellow", "info": "dim"}


def summary(report: RoundReport, *, earlier: Sequence[RoundReport] = ()) -> RenderableType:
    """Render the conclusion, its evidence, the leading trials, findings, caveats and the next step.

    The next command is the caller's to print, after everything else. `earlier` are the study's earlier
    rounds, in order.
    """
    caution = advice.progress(report)
    adapter = report.adapters.get(report.ranked[0][0].number) if report.ranked else None
    return Group(
        Text(report.name, style="dim"),
        Text(advice.headline(report), style="bold"),
        *([Text(caution, style="yellow")] if caution else []),
        Text(),
        *([Text(f"{format.goal_label(report.goal)}: {report.goal}", style="dim")] if report.goal else []),
        Text(" ".join((*advice.found(report), *advice.still_better(report, earlier)))),
        *([Text(f"Its {report.kept}: {adapter}")] if adapter else []),
        *(Text(sentence) for sentence in advice.tested(report)),
        *([_headed("How the study went", _lineage([*earlier, report]))] if earlier else []),
        _headed("Why", _numbered(report.reading.evidence)),
        *([_headed("Leading trials", _leading(report))] if report.ranked else []),
        *([_headed("What else stands out", _findings(report))] if report.findings else []),
        *([_headed("Throughput", _throughput(report))] if report.record.throughput else []),
        _headed("Holds for", Text(", ".join(f"{name} {value}" for name, value in report.fixed.items()))),
        _headed("Next", Text(advice.next_step(report))),
    )


def _headed(heading: str, body: RenderableType) -> RenderableType:
    return Group(Text(f"\n{heading}", style="bold"), Padding(body, (0, 0, 0, 2), expand=False))


def _lineage(reports: Sequence[RoundReport]) -> RenderableType:
    rows = advice.lineage_rows(reports)
    ranks, words = (0, 2, 7, 3, 4, 5, 6, 1), {2: 12, 6: 14, 7: 20}
    table = FittedTable(
        [
            column(name, [row[i] for row in rows], rank=ranks[i], min_width=words.get(i))
            for i, name in enumerate(advice.LINEAGE_HEADERS)
        ]
    )
    return Group(table, *(Text(sentence) for sentence in advice.held(reports)))


def _throughput(report: RoundReport) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    for name, value, meaning in report.throughput_rows:
        table.add_row(Text(name), Text(value), Text(meaning, style="dim"))
    return table


def _numbered(sentences: tuple[str, ...]) -> RenderableType:
    table = Table.grid(padding=(0, 1, 0, 0))
    for number, sentence in enumerate(sentences, start=1):
        table.add_row(Text(f"{number}."), Text(sentence))
    return table


def _leading(report: RoundReport) -> RenderableType:
    shown = [trial for trial, _ in report.ranked[:_LEADING_SHOWN]]
    others = len(report.trials) - len(shown)
    rest = Text(
        f"and {format.count(others, 'trial')} more: {format.counts(report.counts)} in all", style="dim"
    )
    table = trials_table(shown, names=report.shown_names)
    return Group(table, *([rest] if others else []))


def _findings(report: RoundReport) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in report.findings:
        rule = Text(advice.rule_in_words(finding.rule), style=_SEVERITY_STYLES[finding.severity])
        table.add_row(rule, Text(finding.message))
    return table
