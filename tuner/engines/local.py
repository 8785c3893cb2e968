"""The engine `local`: subprocesses on this machine, one per GPU, with log files."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from tuner.data.answer_metrics import EXACT_MATCH
from tuner.engines.devices import gpu_meter, open_nvml, visible_devices, worker_environments
from tuner.engines.processes import (
    TOKEN,
    end_left_over,
    end_with_token,
    forget_ended,
    forget_worker,
    new_token,
    record_worker,
    recorded_workers,
)
from tuner.engines.program import ProgramWorker, WorkerPool
from tuner.engines.protocol import Job, Worker
from tuner.errors import WorkerError
from tuner.methods.plug_ins import named
from tuner.methods.registry import is_built_in
from tuner.process_log import halved, last_lines
from tuner.report.format import GpuReading

_LOOK_SECONDS = 10.0
"""How often the size of a worker's log is looked at."""
_FORMER_SECONDS = 3.0
"""Time for a worker of an earlier run to notice that its parent is gone."""


class LocalEngine:
    """This machine: a worker for each GPU, or as many as the job allows.

    One that keeps workers lets them rest when a round has ended, and gives the next round those that have its
    base model, until `end_workers`.
    """

    def __init__(self, *, keeps_workers: bool = False) -> None:
        self._meter: Callable[[], Sequence[GpuReading]] | None = None
        self._keeps_workers = keeps_workers
        self._kinds: dict[Worker, str | None] = {}
        """What each worker that was started here may be used for again."""
        self._resting: list[ProgramWorker] = []

    def start(self, job: Job) -> Worker:
        """Start the first worker; the others start with the first trial, once the data is prepared.

        Waits for workers of an earlier run. Raises InputError for more workers than GPUs, WorkerError if an
        earlier worker does not end.
        """
        per_worker = job.spec.run.gpus_per_worker
        devices = visible_devices() if per_worker else ()
        environments = worker_environments(
            job.workers, devices, cores=os.cpu_count() or 1, gpus_per_worker=max(1, per_worker)
        )
        if not per_worker:
            environments = [{**each, "CUDA_VISIBLE_DEVICES": ""} for each in environments]
        used = devices[: len(environments) * per_worker]
        if per_worker and (idle := len(devices) % per_worker) and job.workers == "auto":
            job.say(f"{idle} of {len(devices)} GPUs idle: run.gpus_per_worker is {per_worker}")
        if devices and self._meter is None:
            self._meter = gpu_meter(open_nvml(), used)
        wait_for_former_workers(job.directory / "worker.lock")
        for rounds in job.directory.parent.glob("*/"):  # `auto` keeps a worker from round to round
            forget_ended(rounds)
        names = ["worker", *(f"worker-{number}" for number in range(1, len(environments)))]
        makers = [
            partial(self._worker, job, log=job.directory / f"{name}.log", environment=environment)
            for name, environment in zip(names, environments, strict=True)
        ]
        self._end({_use(job, environment) for environment in environments})
        return _RestingPool(makers, self._rest) if self._keeps_workers else WorkerPool(makers)

    def _worker(self, job: Job, *, log: Path, environment: Mapping[str, str]) -> Worker:
        """Return a resting worker of the job's base model, or a new one."""
        use = _use(job, environment)
        usable = [each for each in self._resting if use is not None and self._kinds[each] == use]
        worker = next((each for each in usable if each.is_alive), None)
        if worker is None:
            worker = local_worker(job, log=log, environment=environment)
        else:
            self._resting.remove(worker)
            _begin_round(worker, job, log=log, environment=environment)
        self._kinds[worker] = use
        return worker

    def _rest(self, worker: Worker) -> bool:
        """Let a worker rest, if another round may use it."""
        if not isinstance(worker, ProgramWorker) or self._kinds[worker] is None or not worker.rest():
            return False
        if worker not in self._resting:
            self._resting.append(worker)
        return True

    def _end(self, kept: Collection[str | None]) -> None:
        """End the resting workers of other uses, so that new ones have the devices for themselves."""
        for worker in [each for each in self._resting if self._kinds[each] not in kept]:
            self._resting.remove(worker)
            worker.close()

    def end_workers(self) -> None:
        """End the workers that rest."""
        self._end(())

    def gpu_readings(self) -> Sequence[GpuReading]:
        """Return the driver's readings of the GPUs in use."""
        return () if self._meter is None else self._meter()

    def now(self) -> float:
        """Return the time of this machine's clock."""
        return time.time()

    def close(self) -> None:
        """Do nothing: the workers are already closed, or rest until `end_workers`."""


class _RestingPool(WorkerPool):
    """Workers that rest, where they can, when their round is over."""

    def __init__(self, makers: Sequence[Callable[[], Worker]], rest: Callable[[Worker], bool]) -> None:
        super().__init__(makers)
        self._rest = rest

    def close(self) -> None:
        """Save every trial; let the workers rest, or end them."""
        self._waiting.clear()
        for worker in self._workers:
            if not self._rest(worker):
                worker.close()


def _use(job: Job, environment: Mapping[str, str]) -> str | None:
    """Return what jobs have in common that one worker can do; None if another needs a new process.

    A module of the user's may have changed meanwhile, and Python imports it once.
    """
    spec = job.spec
    answers = spec.evaluation.answers
    is_ours = (
        spec.command is None
        and not named(spec.hyperparameters)
        and is_built_in("metric", spec.objective.metric)
        and (answers is None or answers.metric == EXACT_MATCH)
        and not spec.model.trust_remote_code
    )
    same = [spec.model.model_dump(mode="json"), spec.data.max_length, sorted(environment.items())]
    return json.dumps([job.program.arguments, same]) if is_ours else None


def _begin_round(worker: ProgramWorker, job: Job, *, log: Path, environment: Mapping[str, str]) -> None:
    """Give a resting worker the job's round, with the log and the record of a worker of that round."""
    assert isinstance(worker.process, LocalProcess)
    worker.process.move(log)
    worker.begin_round(
        job.program,
        partial(LocalProcess, job.program.arguments, log=log, environment=environment),
        log=str(log),
        silence_seconds=job.spec.run.loading_seconds,
    )


def local_worker(job: Job, *, log: Path, environment: Mapping[str, str]) -> ProgramWorker:
    """Start the job's program on this machine; `environment` extends the parent's."""
    launch = partial(LocalProcess, job.program.arguments, log=log, environment=environment)
    return ProgramWorker(job.program, launch, silence_seconds=job.spec.run.loading_seconds)


class LocalProcess:
    """A subprocess of this machine; standard error goes into its log."""

    def __init__(
        self, arguments: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        self._token = new_token()
        log.parent.mkdir(parents=True, exist_ok=True)
        halved(log)
        with log.open("a") as file:
            file.write(f"--- worker starts {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
            # Its own session: Ctrl-C in the terminal reaches only the parent, which then closes it.
            self.popen = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                bufsize=1,
                start_new_session=True,
                env={**os.environ, **(environment or {}), TOKEN: self._token},
            )

        self._closing = threading.Lock()
        self._record = log.with_suffix(".pid")
        record_worker(self._record, self.popen.pid, self._token)

    def move(self, log: Path) -> None:
        """Keep the log and the record of this process at another place; itself writes there when told to."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"--- worker goes on {time.strftime('%Y-%m-%d %H:%M:%S')}, from {self._log}\n")
        record_worker(log.with_suffix(".pid"), self.popen.pid, self._token)
        self._record.unlink(missing_ok=True)
        self._log, self._record = log, log.with_suffix(".pid")

    def write(self, line: str) -> None:
        """Write to its pipe."""
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(line)
            self.popen.stdin.flush()
        except (BrokenPipeError, ValueError):  # ended, or its pipe is closed: the reader reports it
            return

    def lines(self) -> Iterator[str]:
        """Yield its output lines; closes its pipes at the end."""
        assert self.popen.stdout is not None
        looked_at = time.monotonic()
        with self.popen.stdout as said:
            for line in said:
                yield line
                if time.monotonic() - looked_at > _LOOK_SECONDS:
                    looked_at = time.monotonic()
                    halved(self._log)

    def wait(self, timeout_seconds: float | None = None) -> int:
        """Wait for its end. Raises TimeoutError."""
        try:
            code = self.popen.wait(timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(str(error)) from error
        forget_worker(self._record, self.popen.pid)
        if self.popen.stdin is not None:
            # The reader waits for the end, too: two that close at once free a command's bytes twice.
            with self._closing, suppress(BrokenPipeError):  # a command was left unread
                self.popen.stdin.close()
        return code

    def kill(self) -> None:
        """Send SIGKILL to it and to what it started, such as a command."""
        self.popen.kill()
        end_with_token(self._token)

    def last_words(self) -> str:
        """Return the last lines of its log."""
        return last_lines(self._log)


def wait_for_former_workers(lock: Path, *, timeout_seconds: float = 60.0) -> None:
    """Wait until no worker of an earlier run holds the lock, so that two never write to one folder.

    A worker whose parent was killed ends by itself at once. One that hangs is killed after a few seconds, if
    it is the recorded one. Raises WorkerError for any other.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                waited = time.monotonic() - begun
                if waited > _FORMER_SECONDS:
                    end_left_over(lock.parent)
                if waited > timeout_seconds:
                    known = [str(each.worker.pid) for each in recorded_workers(lock.parent).values()]
                    raise WorkerError(
                        f"{lock}: a worker of an earlier run still holds this file after "
                        f"{timeout_seconds:.0f} seconds, and is not known to be ours; see `fuser {lock}`"
                        + (f" (recorded: process {', '.join(known)})" if known else "")
                    ) from error
                time.sleep(0.1)
