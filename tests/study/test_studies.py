"""Several studies in one database: each runs, and is shown, as if it were alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from optuna_dashboard import wsgi

from tests.studies import formula, round_file, silent_view
from tuner.cli.output import print_status, print_trials
from tuner.engines import SimulatedWorker
from tuner.errors import InputError, RoundFileError, StorageError
from tuner.records import Ready
from tuner.study.folder import open_folder
from tuner.study.lookup import reports_on
from tuner.study.run import run_round
from tuner.study.sampling import StudyStorage

ONE: dict[str, Any] = {"study": "one", "trials": 3}
HALF_WAY = 3
OTHER: dict[str, Any] = {"study": "other", "trials": 2, "steps": 12, "lora_r": "[8, 16]"}


def run(
    directory: Path,
    *,
    stopping: Callable[[], bool] = lambda: False,
    ready: Ready | None = None,
    **changes: Any,
) -> None:
    run_round(
        round_file(directory, **changes),
        make_worker=lambda plan, base: SimulatedWorker(formula, slots=1, ready=ready),
        view=silent_view(),
        stopping=stopping,
    )


def printed(show: Callable[[], object]) -> Any:
    with redirect_stdout(StringIO()) as output:
        show()
    return json.loads(output.getvalue())


def shown(directory: Path) -> list[Any]:
    """What status, trial list and report say, but for where the adapters are."""
    folder = open_folder(directory)
    status = printed(lambda: print_status(folder, as_json=True))
    for listed in status["rounds"]:
        listed["best"] = listed["best"] and {**listed["best"], "adapter": None}
    trials = printed(lambda: print_trials(folder, round_name=None, as_json=True))
    *_, report = reports_on(open_folder(directory), None)
    return [
        status,
        [{**trial, "adapter": None} for trial in trials],
        (report.study, report.record.max_train_steps, len(report.results.trials), report.next_command),
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What is shown of each study with a database to itself."""
    directory = tmp_path_factory.mktemp("alone")
    for changes in (ONE, OTHER):
        run(directory / changes["study"], **changes)
    return {changes["study"]: shown(directory / changes["study"]) for changes in (ONE, OTHER)}


def test_studies_with_the_same_rounds_do_not_meet(
    url: str, tmp_path: Path, alone: dict[str, list[Any]]
) -> None:
    for changes in (ONE, OTHER):
        run(tmp_path / changes["study"], storage=url, **changes)
    assert [len(trials) for _, trials, _ in alone.values()] == [ONE["trials"], OTHER["trials"]]
    assert {study: shown(tmp_path / study) for study in alone} == alone


def meanwhile(action: Callable[[], None]) -> Callable[[], bool]:
    """Never asks to stop, but does something once while a round is half-way."""
    calls = itertools.count()

    def stopping() -> bool:
        if next(calls) == HALF_WAY:
            action()
        return False

    return stopping


def test_a_study_runs_while_another_is_half_way(
    postgres_url: str, tmp_path: Path, alone: dict[str, list[Any]]
) -> None:
    half_way = []

    def run_the_other() -> None:
        assert open_folder(tmp_path / "one").is_running()
        half_way.extend(shown(tmp_path / "one")[1])
        run(tmp_path / "other", storage=postgres_url, **OTHER)

    run(tmp_path / "one", storage=postgres_url, stopping=meanwhile(run_the_other), **ONE)
    assert "running" in {trial["state"] for trial in half_way}
    assert {study: shown(tmp_path / study) for study in alone} == alone


def test_a_file_is_written_for_one_study_at_a_time(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"
    refused = []

    def run_the_other() -> None:
        with pytest.raises(StorageError, match=r"study other .* the study one in the same file") as raised:
            run(tmp_path / "other", storage=url, **OTHER)
        refused.append(raised.value)
        assert open_folder(tmp_path / "one").is_running()
        assert not open_folder(tmp_path / "other").is_running()

    run(tmp_path / "one", storage=url, stopping=meanwhile(run_the_other), **ONE)
    assert refused
    run(tmp_path / "other", storage=url, **OTHER)
    assert open_folder(tmp_path / "other").has_begun


def test_a_study_that_has_not_begun_is_told_from_one_that_has(url: str, tmp_path: Path) -> None:
    run(tmp_path / "one", storage=url, **ONE)
    round_file(tmp_path / "other", storage=url, **OTHER)
    assert open_folder(tmp_path / "one").has_begun
    assert not open_folder(tmp_path / "other").has_begun
    with pytest.raises(InputError, match="no round of other has started"):
        reports_on(open_folder(tmp_path / "other"), None)


def test_a_second_folder_of_the_same_files_is_the_same_study(url: str, tmp_path: Path) -> None:
    run(tmp_path / "one", storage=url, **ONE)
    run(tmp_path / "copy", storage=url, **ONE)
    assert shown(tmp_path / "copy") == shown(tmp_path / "one")


def test_a_round_begun_in_another_folder_with_another_file_is_refused(url: str, tmp_path: Path) -> None:
    run(tmp_path / "one", storage=url, **ONE)
    with pytest.raises(
        RoundFileError, match=r"study one has started in this database .* not from this folder"
    ) as there:
        run(tmp_path / "copy", storage=url, **ONE | {"steps": 12})
    assert "max_train_steps: the round began with 8 and the file now says 12" in str(there.value)
    with pytest.raises(RoundFileError, match="max_train_steps") as here:
        run(tmp_path / "one", storage=url, **ONE | {"steps": 12})
    assert "folder" not in str(here.value)


def test_a_round_begun_in_another_folder_with_other_data_is_refused(url: str, tmp_path: Path) -> None:
    run(tmp_path / "one", storage=url, **ONE)
    with pytest.raises(
        InputError,
        match=r"reads some rows differently, .* started a study one in this database.* finish the round",
    ):
        run(tmp_path / "copy", storage=url, ready=Ready(1, "simulated", workload="other data"), **ONE)
    assert not (tmp_path / "copy" / "runs").exists()


def test_the_dashboard_shows_one_study(url: str, tmp_path: Path) -> None:
    for changes in (ONE, OTHER):
        run(tmp_path / changes["study"], storage=url, **changes)

    def get(study: str, path: str) -> tuple[str, Any]:
        environ: dict[str, Any] = {"PATH_INFO": path}
        setup_testing_defaults(environ)
        said: list[str] = []
        body = wsgi(StudyStorage(url, study))(environ, lambda status, *_: said.append(status))
        return said[0], json.loads(b"".join(body))

    ids = {}
    for study in ("one", "other"):
        _, listed = get(study, "/api/studies")
        (summary,) = listed["study_summaries"]
        assert summary["study_name"] == f"{study}/round1"
        ids[study] = summary["study_id"]
    assert get("one", f"/api/studies/{ids['one']}")[0] == "200 OK"
    assert get("one", f"/api/studies/{ids['other']}")[0] == "404 Not Found"
