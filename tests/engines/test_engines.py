"""Every engine keeps the contract, runs whatever program it is given, and is found by its name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import tuner
from tests.contracts.engine import EngineContract, started
from tests.contracts.worker import assignment, collect, ended
from tests.studies import installed, round_file, write_round
from tests.studies import tuner as command
from tuner.config import load_round
from tuner.engines import (
    Engine,
    Job,
    LocalEngine,
    LoraFormula,
    Program,
    SimulatedEngine,
    end_all_processes,
    make_engine,
    worker_environments,
)
from tuner.errors import InputError, RoundFileError, WorkerError
from tuner.methods import registry
from tuner.records import Died, Evaluated, Ready

WITHOUT_TORCH = ("-m", "tests.engines.torch_free_program")

PLUG_INS = '''
"""Engines of a user's: one wraps the local one, the other replays a formula."""
import time

from tuner.engines import LocalEngine, LoraFormula, SimulatedWorker
from tuner.records import Ready


class Announced(LocalEngine):
    """This machine, and a line of each start in a file beside the checkpoints."""

    def start(self, job):
        job.directory.mkdir(parents=True, exist_ok=True)
        with (job.directory / "starts.log").open("a") as log:
            log.write(f"{job.spec.round}\\n")
        return super().start(job)


class Replayed:
    """Losses of a formula, in the study itself."""

    def start(self, job):
        ready = Ready(2, "replayed", workload="replay")
        return SimulatedWorker(LoraFormula("mine"), slots=2, ready=ready)

    def gpu_readings(self):
        return ()

    def now(self):
        return time.time()

    def close(self):
        pass


class NotAnEngine:
    pass
'''
FAULTY = """

class NoRoute(Replayed):
    def start(self, job):
        raise RuntimeError("no route to host")


class Failing(SimulatedWorker):
    def events(self, timeout_seconds):
        found = super().events(timeout_seconds)
        if any(type(event).__name__ == "Evaluated" for event in found):
            raise KeyError("heartbeat")
        return found


class Fails(Replayed):
    def start(self, job):
        return Failing(LoraFormula("mine"), slots=2, ready=Ready(2, "replayed", workload="replay"))


class Leaky(Replayed):
    def start(self, job):
        self.rented = job.directory
        return super().start(job)

    def gpu_readings(self):
        raise OSError("no driver")

    def close(self):
        raise RuntimeError(f"{self.rented.name} is still rented")


class Timeless(Replayed):
    def now(self):
        raise RuntimeError("no clock")


class Halved(Replayed):
    def start(self, job):
        return []
"""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    file = round_file(tmp_path, run="run: {slots: 1}")
    spec = file.spec.absolute(tmp_path)
    program = Program(WITHOUT_TORCH, lambda: {"slots": spec.run.slots})
    return Job(spec, program, tmp_path / "runs", workers=1, first_horizon=8)


class TestLocalEngine(EngineContract):
    @pytest.fixture
    def engine(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalEngine]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("PYTHONPATH", os.fspath(Path(__file__).parents[2]))  # where its program is found
        engine = LocalEngine()
        yield engine
        engine.close()

    def test_as_many_workers_as_the_job_says(self, engine: Engine, job: Job) -> None:
        with started(engine, replace(job, workers=3)) as worker:
            collect(worker, until=lambda seen: any(isinstance(e, Ready) for e in seen))
            worker.start(assignment(job.directory, 0))
            more = collect(worker, until=lambda seen: sum(isinstance(e, Ready) for e in seen) == 2)
            assert ended(more) <= {0}
        logs = sorted(path.name for path in job.directory.glob("*.log"))
        assert logs == ["worker-1.log", "worker-2.log", "worker.log"]

    def test_more_workers_than_gpus_cannot_run(self, engine: Engine, job: Job, monkeypatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with pytest.raises(InputError, match="--workers 3: this machine has 2 GPU"):
            engine.start(replace(job, workers=3))

    def test_gpus_per_worker_makes_groups_and_says_what_is_idle(self) -> None:
        three = worker_environments("auto", ("0", "1", "2"), cores=8, gpus_per_worker=2)
        assert three == [{"CUDA_VISIBLE_DEVICES": "0,1"}]
        with pytest.raises(InputError, match=r"run.gpus_per_worker: 2: this machine has 1 GPU"):
            worker_environments("auto", ("0",), cores=8, gpus_per_worker=2)
        with pytest.raises(InputError, match=r"--workers 2: .* each worker needs 2"):
            worker_environments(2, ("0", "1", "2"), cores=8, gpus_per_worker=2)

    def test_the_document_is_asked_for_at_each_start(self, engine: Engine, job: Job) -> None:
        asked = []

        def document() -> dict[str, object]:
            asked.append(None)
            return {"slots": 1, "pause": 0.2}

        with started(engine, replace(job, program=Program(WITHOUT_TORCH, document))) as worker:
            collect(worker, until=lambda seen: any(isinstance(e, Ready) for e in seen))
            worker.start(assignment(job.directory, 0, steps=100))
            collect(worker, until=lambda seen: any(isinstance(e, Evaluated) for e in seen))
            end_all_processes()
            (died,) = (
                e
                for e in collect(worker, until=lambda seen: any(isinstance(e, Died) for e in seen))
                if isinstance(e, Died)
            )
            assert died.trials == (0,)
            worker.start(replace(assignment(job.directory, 0, steps=2), attempt=2))
            collect(worker, until=lambda seen: ended(seen) == {0})
        assert len(asked) == 2


class TestSimulatedEngine(EngineContract):
    @pytest.fixture
    def engine(self) -> SimulatedEngine:
        return SimulatedEngine()

    def test_its_clock_counts_the_steps(self, engine: Engine, job: Job) -> None:
        before = engine.now()
        with started(engine, job) as worker:
            worker.start(assignment(job.directory, 0, steps=500))
            collect(worker, until=lambda seen: ended(seen) == {0})
        assert engine.now() - before == pytest.approx(500)

    def test_its_losses_go_at_the_pace_of_the_first_round(self, engine: Engine, job: Job) -> None:
        with started(engine, job) as worker:
            worker.start(assignment(job.directory, 0))
            said = collect(worker, until=lambda seen: ended(seen) == {0})
        hyperparameters = assignment(job.directory, 0).hyperparameters
        last = next(e.evaluation for e in reversed(said) if isinstance(e, Evaluated))
        assert last == LoraFormula("tiny", pace_steps=8)(hyperparameters, 6, 6)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that registers one engine; others are found by their path."""
    site = installed(tmp_path / "site", "engine_plug_ins", engines="replayed = engine_plug_ins:Replayed")
    (site / "engine_plug_ins.py").write_text(PLUG_INS + FAULTY)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", f"{site}:{Path.cwd()}")
    yield site
    sys.modules.pop("engine_plug_ins", None)


def test_an_engine_of_an_installed_package_runs_a_whole_round(package: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    write_round(study, trials=3, learning_rate="{low: 1e-4, high: 1e-3, log: true}")
    done = command("study", "run", "round1.yaml", "--engine", "replayed", directory=study)
    assert done.returncode == 0, done.stderr
    assert "worker ready: replayed, 2 slots" in done.stderr
    assert not (study / "dry-run").exists()
    trials = tuner.Study(study).round("round1").trials
    assert [trial.state for trial in trials] == ["complete"] * 3
    for trial in trials:
        expected = LoraFormula("mine")(trial.hyperparameters, 8, 8)
        assert trial.evaluations[-1].eval_loss == expected.eval_loss


def test_a_check_imports_no_engine_and_says_so(package: Path, tmp_path: Path) -> None:
    write_round(tmp_path / "study", run='run: {engine: "engine_plug_ins:NotAnEngine"}')
    found = tuner.Study(tmp_path / "study").check("round1.yaml")
    assert found["ok"]
    assert any("not checked: engine_plug_ins:NotAnEngine" in said for said in found["remarks"])
    assert "engine_plug_ins" not in sys.modules


def test_a_check_names_the_lines_of_a_cluster_that_the_engine_does_not_use(tmp_path: Path) -> None:
    keys = "run:\n  ray_address: 10.0.0.1:6379\n  slots: 1\n  resources_patience: 5"
    path = write_round(tmp_path / "study", run=keys)
    lines = path.read_text().splitlines()
    found = tuner.Study(tmp_path / "study").check("round1.yaml")
    assert found["ok"]
    noted = [said for said in found["remarks"] if "has no effect" in said]
    assert [said.partition(": the engine is local")[0] for said in noted] == [
        f"round1.yaml:{lines.index('  ray_address: 10.0.0.1:6379') + 1}: run.ray_address has no effect",
        f"round1.yaml:{lines.index('  resources_patience: 5') + 1}: run.resources_patience has no effect",
    ]
    path.write_text(path.read_text().replace("run:\n", "run:\n  engine: ray\n"))
    found = tuner.Study(tmp_path / "study").check("round1.yaml")
    assert not [said for said in found["remarks"] if "has no effect" in said]


@pytest.mark.slow
def test_an_engine_that_wraps_the_local_one_is_chosen_by_the_file(package: Path, tmp_path: Path) -> None:
    """In a study of its own and in one with `local`: the same losses."""
    losses = []
    for name in ("engine_plug_ins:Announced", "local"):
        study = tmp_path / name.replace(":", "-")
        write_round(study, trials=1, learning_rate="1e-2", run=f'run: {{engine: "{name}", slots: 1}}')
        found = tuner.Study(study).run("round1.yaml", progress=False)
        losses.append([made.eval_loss for made in found.trials[0].evaluations])
    assert (tmp_path / "engine_plug_ins-Announced" / "runs" / "round1" / "starts.log").exists()
    assert losses[0] == losses[1]


@pytest.mark.parametrize("verb", ["run", "auto", "sweep"])
def test_a_wrong_name_on_the_command_line_is_bad_input(package: Path, tmp_path: Path, verb: str) -> None:
    study = tmp_path / "study"
    write_round(study)
    done = command("study", verb, "round1.yaml", "--engine", "replaid", directory=study)
    assert done.returncode == 2
    assert (
        "--engine replaid: expects one of local, ray, simulated, replayed, or package.module:Name"
        in done.stderr
    )
    assert "engine_plug_ins" not in sys.modules
    assert [path.name for path in study.iterdir()] == ["round1.yaml"]


def test_a_wrong_name_in_a_file_is_refused_where_it_stands(package: Path, tmp_path: Path) -> None:
    path = write_round(tmp_path / "study", run="run: {engine: locl}")
    with pytest.raises(RoundFileError, match=r"run.engine: expects one of local, .*, got 'locl'.*local"):
        load_round(path)
    assert "engine_plug_ins" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Engine", "cannot be imported"),
        ("engine_plug_ins:NotAnEngine", "NotAnEngine has no method start"),
        ("tuner.engines:SimulatedWorker", "cannot be created without arguments"),
    ],
)
def test_what_is_no_engine_is_bad_input_and_leaves_nothing(
    package: Path, tmp_path: Path, name: str, message: str
) -> None:
    study = tmp_path / "study"
    write_round(study)
    done = command("study", "run", "round1.yaml", "--engine", name, directory=study)
    assert done.returncode == 2
    assert message in done.stderr
    assert [path.name for path in study.iterdir()] == ["round1.yaml"]


def test_an_error_of_an_engine_is_told_with_its_line(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_round(tmp_path / "study")
    said = r"NoRoute could not start the workers: RuntimeError: no route to host \(.*engine_plug_ins.py:\d+\)"
    with pytest.raises(WorkerError, match=said):
        tuner.Study(tmp_path / "study").run("round1.yaml", engine="engine_plug_ins:NoRoute", progress=False)
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["round1.yaml"]


def test_a_worker_of_an_engine_that_raises_in_the_middle_leaves_a_round_that_resumes(
    package: Path, tmp_path: Path
) -> None:
    write_round(tmp_path / "study", trials=2)
    study = tuner.Study(tmp_path / "study")
    said = r"a worker of Fails raised in events: KeyError: 'heartbeat' \(.*engine_plug_ins.py:\d+\)"
    with pytest.raises(WorkerError, match=said):
        study.run("round1.yaml", engine="engine_plug_ins:Fails", progress=False)
    study.run("round1.yaml", engine="engine_plug_ins:Replayed", progress=False)
    assert [trial.state for trial in study.round("round1").trials] == ["complete"] * 2


def test_an_engine_that_cannot_close_is_told_and_its_round_is_complete(package: Path, tmp_path: Path) -> None:
    write_round(tmp_path / "study", trials=1)
    shown = command(
        "study", "run", "round1.yaml", "--engine", "engine_plug_ins:Leaky", directory=tmp_path / "study"
    )
    assert shown.returncode == 0, shown.stderr
    said = "warning: Leaky raised in close: RuntimeError: round1 is still rented"
    assert said in " ".join(shown.stderr.split())


def test_an_engine_that_never_started_is_not_closed(package: Path, tmp_path: Path) -> None:
    """What is wrong with the round is told, not what its engine makes of it."""
    write_round(tmp_path / "study", sampler='"no_such_module:Sampler"')
    with pytest.raises(InputError, match="no module no_such_module"):
        tuner.Study(tmp_path / "study").run("round1.yaml", engine="engine_plug_ins:Leaky", progress=False)


def test_other_methods_of_an_engine_that_raise(package: Path) -> None:
    engine = make_engine("engine_plug_ins:Leaky")
    assert [*engine.gpu_readings(), *engine.gpu_readings()] == []
    with pytest.raises(WorkerError, match="Timeless raised in now: RuntimeError: no clock"):
        make_engine("engine_plug_ins:Timeless").now()


def test_what_is_no_worker_is_said_before_anything_is_recorded(package: Path, tmp_path: Path) -> None:
    write_round(tmp_path / "study")
    said = "Halved.start returned a list without capacity, start, stop, events or close"
    with pytest.raises(WorkerError, match=said):
        tuner.Study(tmp_path / "study").run("round1.yaml", engine="engine_plug_ins:Halved", progress=False)
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["round1.yaml"]


def test_the_names_are_those_built_in_and_those_registered(package: Path) -> None:
    assert registry.names("engine") == ("local", "ray", "simulated", "replayed")
    for name in registry.BUILT_IN["engine"]:
        assert type(make_engine(name)).__module__.startswith(f"tuner.engines.{name}")


def test_a_plug_in_is_short() -> None:
    assert len(PLUG_INS.splitlines()) <= 40


@pytest.mark.parametrize(
    ("visible", "model", "said"),
    [
        ("", "loader: transformers", "run.gpus_per_worker: 2: this machine has 0 GPU(s); lower it"),
        ("0", "loader: transformers", "run.gpus_per_worker: 2: this machine has 1 GPU(s); lower it"),
        ("0,1", "loader: unsloth", "2: model.loader: unsloth uses one GPU; set model.loader: transformers"),
        ("0,1", "kernels: liger", "2: model.kernels: liger uses one GPU; set model.kernels: torch"),
    ],
)
def test_too_few_gpus_or_a_model_that_uses_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, model: str, said: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    study = tmp_path / "study"
    write_round(study, run="run: {gpus_per_worker: 2}")
    file = study / "round1.yaml"
    file.write_text(file.read_text().replace("model: {path", f"model: {{{model}, path"))
    done = command("study", "run", "round1.yaml", directory=study)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert [path.name for path in study.iterdir()] == ["round1.yaml"]


def test_a_cluster_without_an_address_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    study = tmp_path / "study"
    write_round(study)
    for arguments, message in [
        ((), "Pass --ray-address HOST:6379"),
        (("--ray-address", "ray://head:10001"), "run tuner on a machine of the cluster"),
    ]:
        done = command("study", "run", "round1.yaml", "--engine", "ray", *arguments, directory=study)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert [path.name for path in study.iterdir()] == ["round1.yaml"]
