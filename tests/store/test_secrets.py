"""A password in the database's URL: in no message, no row, no file of ours; options that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.studies import round_file, tuner, write_round
from tuner.config import without_secrets
from tuner.errors import StorageError
from tuner.records import LOSS, Ready
from tuner.store import exists, open_store
from tuner.store.database import normal_url, parse_url, shown_url
from tuner.study.plan import RoundPlan
from tuner.study.run import _begin

SECRET = "hunter2secret"
ACCOUNT = f"postgresql+psycopg://ada:{SECRET}@127.0.0.1:1/tuner"
OPTION = f"postgresql+psycopg://ada@127.0.0.1:1/tuner?password={SECRET}"
BOTH = f"{ACCOUNT}?sslpassword={SECRET}x"

MALFORMED = (
    f"postgresql//ada:{SECRET}@host/tuner",
    f"postgresql:ada:{SECRET}@host/tuner",
    f"ada:{SECRET}@host/tuner",
    f"postgresql+psycopg://ada:{SECRET}@host:port/tuner",
    f"postgresql+psycopg://ada:{SECRET}/x@host:12x/tuner",
    f"mysql://ada:{SECRET}@host/tuner",
    f"sqlite://ada:{SECRET}@host/x.db",
    f"{ACCOUNT}?pasword={SECRET}",
    f"sqlite:///x.db?password={SECRET}",
)


@pytest.mark.parametrize("url", [ACCOUNT, OPTION, BOTH])
def test_a_server_that_does_not_answer(url: str, tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    for shown in (without_secrets(url), shown_url(url), shown_url(make_url(url))):
        assert SECRET not in shown
        assert "127.0.0.1:1/tuner" in shown
    for use in (exists, lambda found: open_store(found, study="x")):
        with pytest.raises(StorageError) as caught:
            use(url)
        assert SECRET not in str(caught.value)
    assert SECRET in normal_url(url)  # what connects still has it
    write_round(tmp_path, storage=url)
    for command in (("study", "status"), ("study", "run", "round1.yaml"), ("doctor",), ("trial", "list")):
        done = tuner(*command, directory=tmp_path)
        assert SECRET not in done.stdout + done.stderr, command


@pytest.mark.parametrize("url", MALFORMED)
def test_a_url_that_is_none(url: str, tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError) as caught:
        parse_url(url)
    assert SECRET not in str(caught.value)
    write_round(tmp_path, storage=f"'{url}'")
    for command in (("study", "status"), ("study", "check", "round1.yaml")):
        done = tuner(*command, directory=tmp_path)
        assert done.returncode == 2
        assert SECRET not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("url", "option"),
    [
        ("postgresql+psycopg://ada@127.0.0.1:1/tuner?pasword=x", "pasword"),
        ("postgresql+psycopg://ada@127.0.0.1:1/tuner?sslmode=require&colour=red", "colour"),
        ("sqlite:///tuner.db?colour=red", "colour"),
    ],
)
def test_an_option_that_does_not_exist_is_bad_input(url: str, option: str, tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    write_round(tmp_path, storage=url)
    done = tuner("study", "run", "round1.yaml", "--engine", "local", directory=tmp_path)
    assert done.returncode == 2
    assert f"option {option!r} does not exist" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_no_row_has_it(postgres_url: str, tmp_path: Path) -> None:
    """Of a round that has begun; another password later is no change of the round."""
    url = make_url(postgres_url).update_query_dict({"sslpassword": SECRET}).render_as_string(False)
    file = round_file(tmp_path, storage=url)
    store = open_store(url, study="tiny")
    _begin(RoundPlan(file), store, Ready(1, "cpu", workload="same"), lambda: 0.0, LOSS)
    store.close()
    write_round(tmp_path, storage=url.replace(SECRET, "another"))
    done = tuner("study", "check", "round1.yaml", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM tuner_rounds")).all()
        assert len(rows) == 1
        assert SECRET not in repr(rows)
    engine.dispose()
