"""Serve optuna-dashboard, write the pages of rounds in it, and ask Optuna which hyperparameters matter."""

from __future__ import annotations

import ipaddress
import platform
import socket
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version as version_of
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna_dashboard import wsgi

from tuner.errors import InputError
from tuner.installation import version
from tuner.playbook import Diagnosis, Reading, RoundResults, read_round
from tuner.playbook.selection import objective_value
from tuner.records import Hyperparameters, RoundRecord, TrialState, searched
from tuner.report import RoundReport, best_steps_figure, curves_figure, round_note
from tuner.store import Store
from tuner.study.folder import StudyFolder
from tuner.study.optuna_rows import noticing
from tuner.study.proposals import distributions, encoded
from tuner.study.results import (
    as_written_now,
    earlier_results,
    num_branches_left,
    reading_of,
    round_results,
    scores_of,
)
from tuner.study.samplers.points import contains
from tuner.study.sampling import StudyStorage

HOST = "127.0.0.1"
"""By default the dashboard is only for this machine: it needs no password and can delete studies."""


def allowed_hosts(host: str, more: Sequence[str] = ()) -> frozenset[str]:
    """Return the names by which a browser may ask for the dashboard, besides addresses as numbers.

    A foreign page can have its own name resolve to this machine (DNS rebinding), but not one of these.
    """
    own = () if _is_loopback(host) else (host, socket.gethostname(), socket.getfqdn())
    return frozenset(name.lower().rstrip(".") for name in ("localhost", *own, *more))


class OwnPagesOnly:
    """A WSGI application that answers only requests for, and from, the dashboard's own addresses."""

    def __init__(self, application: Any, *, host: str, allowed: frozenset[str]) -> None:
        self._application, self._is_local, self._allowed = application, _is_loopback(host), allowed

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer 403 to a request by another name, or by a page of another origin."""
        origin = environ.get("HTTP_ORIGIN")
        asked = [f"//{environ.get('HTTP_HOST', '')}", *([origin] if origin else [])]
        if all(self._is_own(url) for url in asked):
            answer: Iterable[bytes] = self._application(environ, start_response)
            return answer
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"tuner: this host is not allowed; see tuner study dashboard --allow-host\n"]

    def _is_own(self, url: str) -> bool:
        try:
            name = (urlsplit(url).hostname or "").rstrip(".")
        except ValueError:  # such as of half a bracket
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self._allowed
        return address.is_loopback or not self._is_local


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Do not log requests."""


def serve_dashboard(
    storage: str,
    study: str,
    *,
    port: int,
    announce: Callable[[str], None],
    host: str = HOST,
    allow: Sequence[str] = (),
) -> None:
    """Serve the rounds of one study until interrupted; `announce` gets the address once it answers.

    `allow` are further names by which browsers may ask for it. It gets a warning first where others can reach
    the address. Raises InputError if the port is taken, or the host is not this machine's.
    """
    application = OwnPagesOnly(
        wsgi(StudyStorage(storage, study)), host=host, allowed=allowed_hosts(host, allow)
    )
    try:
        server = make_server(host, port, application, server_class=_Server, handler_class=_QuietHandler)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}; choose another") from error
    with server:
        if not _is_loopback(host):
            announce(
                f"warning: anyone who can reach {host}:{server.server_port} can change and delete the Optuna "
                "studies of this study, without a password; safer: `ssh -L` to 127.0.0.1"
            )
        announce(f"http://{host}:{server.server_port}/dashboard")
        server.serve_forever()


_PACKAGES = ("optuna", "torch", "transformers", "peft", "bitsandbytes")


def round_report(folder: StudyFolder, store: Store, record: RoundRecord) -> RoundReport:
    """Return the data of a report on a round."""
    record = _as_it_stands(folder, record)
    return _report(folder, store, record, *reading_of(store, record))


def lineage(folder: StudyFolder, store: Store, record: RoundRecord) -> tuple[RoundReport, ...]:
    """Return the reports on the study's rounds up to this one, oldest first, without sweeps."""
    rounds = [other for other in store.rounds() if other.name == record.name or not other.is_sweep]
    upto = [
        _as_it_stands(folder, other)
        for other in rounds[: 1 + [other.name for other in rounds].index(record.name)]
    ]
    read = [round_results(other, store.trials(other.name)) for other in upto]
    return tuple(
        _report(folder, store, other, results, read_round(results, read[:position]))
        for position, (other, results) in enumerate(zip(upto, read, strict=True))
    )


def _as_it_stands(folder: StudyFolder, record: RoundRecord) -> RoundRecord:
    """Update the round by what its file may still change, such as `run.production_steps`."""
    file = folder.file(record.name)
    return record if file is None else as_written_now(record, file)


def _report(
    folder: StudyFolder, store: Store, record: RoundRecord, results: RoundResults, reading: Reading
) -> RoundReport:
    place = folder.checkpoints(record.name)
    adapters = {trial.number: place.adapter(trial) for trial in results.trials}
    return RoundReport(
        study=folder.name,
        goal=str(record.spec.get("goal", "")),
        record=record,
        results=results,
        reading=reading,
        adapters={number: str(path) for number, path in adapters.items() if path is not None},
        next_command=next_command(folder, results, lambda: reading, store),
        environment=environment(),
        scored=scores_of(store),
        branches_left=num_branches_left(store, record, results),
        importance=importance(results),
        is_dry_run=folder.is_dry_run,
    )


def command_after(folder: StudyFolder, store: Store, record: RoundRecord) -> str:
    """Return `next_command` of a round, which is read only where that decides."""
    record = _as_it_stands(folder, record)
    results = round_results(record, store.trials(record.name))
    return next_command(folder, results, lambda: read_round(results, earlier_results(store, record)), store)


def next_command(
    folder: StudyFolder, results: RoundResults, read: Callable[[], Reading], store: Store
) -> str:
    """Return the command to run after a round: resume it, promote it, or use its best adapter."""
    file = folder.file(results.name)
    run = f"tuner study run {file.path.name if file else results.name + '.yaml'}"
    record = store.round(results.name)
    assert record is not None
    missing = file is not None and len(results.results) < file.spec.num_trials
    if missing or num_branches_left(store, _as_it_stands(folder, record), results):
        return run
    following = next((p.to_round for p in store.promotions() if p.from_round == results.name), None)
    if following is not None and folder.file(following) is not None:
        has_begun = store.round(following) is not None
        return "tuner study status" if has_begun else f"tuner study run {following}.yaml"
    reading = read()
    if reading.diagnosis == Diagnosis.NO_LEARNING or reading.suggested_max_train_steps is None:
        if record.spec.get("command"):  # whose rows tuner does not know
            return "tuner trial list"
        return "tuner study check " + (file.path.name if file else "ROUND.yaml") + " --show 3"
    return f"tuner study promote --to {next_name(results.name)}"


def next_name(round_name: str) -> str:
    """Return `round2` after `round1`; `NAME-2` after a name without a number."""
    stem = round_name.rstrip("0123456789")
    number = round_name[len(stem) :]
    return f"{stem}{int(number) + 1}" if number else f"{round_name}-2"


def environment() -> dict[str, str]:
    """Return the versions and the machine, by name."""
    versions = {name: version_of(name) for name in _PACKAGES}
    return {
        "tuner": version(),
        **versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def write_pages(study: optuna.Study, report: RoundReport) -> None:
    """Write a round's reading, its main plots and its key numbers to its page in optuna-dashboard.

    Raises RowsChanged where somebody has deleted the study.
    """
    # It loads scikit-learn, which would dominate the time of `trial list`.
    from optuna_dashboard import save_note, save_plotly_graph_object

    note, attributes = round_note(report), study_attributes(report)
    trials, steps = report.results.trials, report.max_train_steps
    figures = {
        "tuner-best-steps": ("Best step of each trial", best_steps_figure(trials, max_train_steps=steps)),
        "tuner-curves": ("Evaluations during training", curves_figure(trials, max_train_steps=steps)),
    }
    for title, figure in figures.values():
        figure.update_layout(title={"text": f"{title}, {report.name}", "x": 0}, margin_t=60)
    with noticing():
        for name, value in attributes.items():
            if study.user_attrs.get(name) != value:
                study.set_user_attr(name, value)
        save_note(study, note)
        for name, (_, figure) in figures.items():
            save_plotly_graph_object(study, figure, graph_object_id=name)


def study_attributes(report: RoundReport) -> dict[str, int | str]:
    """Return what the dashboard shows of the whole round."""
    lost = [trial.number for trial in report.results.trials if trial.state is TrialState.INFEASIBLE]
    attributes: dict[str, int | str] = {
        "max_train_steps": report.max_train_steps,
        "diagnosis": report.reading.diagnosis.value,
        "infeasible trials": ", ".join(map(str, lost)) or "none",
    }
    if report.reading.suggested_max_train_steps is not None:
        attributes["suggested max_train_steps"] = report.reading.suggested_max_train_steps
    return attributes


MIN_TRIALS = 10
"""With fewer complete trials the numbers say nothing."""


def importance(results: RoundResults) -> dict[str, float]:
    """Return the share of each searched hyperparameter, the largest first, by Optuna's default evaluator.

    Made from the facts alone, so that nothing that happened to Optuna's tables changes it. Hyperparameters
    that only some trials have are left out. Empty if fewer than two are left, or too few trials.
    """
    space = searched(results.space)
    done = [
        (trial, value)
        for trial in results.trials
        if trial.state is TrialState.COMPLETE and (value := objective_value(trial)) is not None
    ]
    names = [name for name in space if len({_text(t.hyperparameters, name) for t, _ in done} - {None}) > 1]
    names = [name for name in names if all(name in trial.hyperparameters for trial, _ in done)]
    if len(done) < MIN_TRIALS or len(names) < 2:
        return {}
    by_name = distributions({name: space[name] for name in names})
    with warnings.catch_warnings():
        # Enqueued values may lie outside of the ranges, and Optuna warns of each.
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction=results.objective.direction.value)
        for trial, value in done:
            chosen = {name: encoded(trial.hyperparameters[name]) for name in names}
            if all(contains(by_name[name], x) for name, x in chosen.items()):
                made = optuna.trial.create_trial(params=chosen, distributions=by_name, value=value)
                study.add_trial(made)
        if len(study.get_trials(deepcopy=False)) < MIN_TRIALS:
            return {}
        return {name: float(share) for name, share in optuna.importance.get_param_importances(study).items()}


def _text(hyperparameters: Hyperparameters, name: str) -> str | None:
    return str(hyperparameters[name]) if name in hyperparameters else None
