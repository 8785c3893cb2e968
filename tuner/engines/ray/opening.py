"""Opens a worker on a node: what has to agree, what is sent first, and what comes back for the others."""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from tuner.config import RoundSpec
from tuner.config.command_section import value_of
from tuner.engines.program import ProgramWorker
from tuner.engines.protocol import Job, Program
from tuner.engines.ray.alike import NodeFacts, differences, own_modules
from tuner.engines.ray.node_files import hub_commit, hub_snapshot
from tuner.engines.ray.nodes import Cluster, Node, NodeRecords, Seat, seats
from tuner.engines.ray.remote import HostFailed, HostLost, Places, RemoteHost, RemoteProcess
from tuner.engines.ray.transfer import Parcel, Say, Sender, fetch, give_back, is_seen
from tuner.errors import InputError
from tuner.whole import digest, written_whole

SOURCES = "sources"
"""Folder beside the tables: which one has the rows of a data set of the Hub or a URL (`data/sources.py`)."""
_TABLE = re.compile(r"[0-9a-f]{32}")
"""Name of a finished table in the folder of tokenised rows."""
_PASSED = (
    "CUDA_DEVICE_ORDER",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
)
"""Variables of the parent that its workers get; as arguments of a call, so that no log shows them."""
_OF_TRACKERS = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "TRACKIO_SERVER_URL",
    "TRACKIO_SPACE_ID",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "WANDB_ENTITY",
    "WANDB_MODE",
    "WANDB_PROJECT",
)
"""The same of workers that run commands, which may log by themselves. What tuner logs, the parent does."""


class Unlike(Exception):
    """A node differs from the others, and is left out with this message."""


@dataclass
class Opener:
    """Opens the workers of a job, several at a time in threads of their own."""

    job: Job
    cluster: Cluster
    records: NodeRecords
    say: Say
    """Receives progress, with the node's name."""
    known: Callable[[], Sequence[Node]]
    """Returns the nodes of the cluster."""
    shared: threading.Event = field(default_factory=threading.Event)
    """Set once what the first worker made is here for others."""

    def __post_init__(self) -> None:
        self.job_token = job_token(self.job.directory)
        self._sender = Sender(int(self.job.spec.run.send_model_up_to * 1e9))
        self._commit: str | None = None
        """Of the base model on the Hub, as the first worker loaded it."""
        self._hosts: set[RemoteHost] = set()
        """Those of workers that are being opened."""
        self._gives_up = False

    @property
    def _gpus_per_worker(self) -> int:
        return self.job.spec.run.gpus_per_worker

    def worker(self, seat: Seat) -> ProgramWorker:
        """Open a worker. Raises Unlike or InputError if the node cannot be used, HostLost or HostFailed."""
        node, spec = seat.node, self.job.spec
        connection = self.cluster.connect(
            node,
            gpus=self._gpus_per_worker if node.gpus else 0,
            name=f"tuner {spec.study}/{spec.round} {node.name} {seat.token.split('.', 1)[1]}",
        )
        self.job.directory.mkdir(parents=True, exist_ok=True)
        log = self.job.directory / f"worker-{node.name}-{seat.number}.log"
        host = RemoteHost(connection, name=f"node {node.name}", log=log)
        self._hosts.add(host)
        with ExitStack() as always, ExitStack() as undo:
            always.callback(self._hosts.discard, host)
            undo.callback(host.end)
            if self._gives_up:
                raise HostLost(f"{host.name}: its worker is not needed any more")
            facts: NodeFacts = host.call("describe", sorted(own_modules(spec)))
            if (unlike := differences(facts, spec)) is not None:
                raise Unlike(unlike)
            host.call("end_orphans", self.job_token, self.records.session, list(self.records.lost_workers))
            places, revision = self._places(host, seat.token)
            variables = self._variables(facts, node)
            host.call("launch", list(self.job.program.arguments), variables, seat.token)
            undo.pop_all()
        where = {"node": node.name, "worker": seat.token}
        if facts.gpus and self._gpus_per_worker:
            where["gpu"] = ",".join(facts.gpus)
        patience = spec.run.storage_seconds
        launch = partial(
            RemoteProcess,
            host,
            places,
            token=seat.token,
            environment=where,
            patience_seconds=patience,
            follows_logs=spec.command is not None,
        )
        program = _with_model(self.job.program, places.there.get(spec.model.path), revision)
        return ProgramWorker(program, launch)

    def give_up(self) -> None:
        """End the workers that are being opened: they hold no trial, and sending to them can take hours."""
        self._gives_up = True
        for host in tuple(self._hosts):
            host.end()

    # --- what a node does not have ----------------------------------------------------------------

    def _places(self, host: RemoteHost, token: str) -> tuple[Places, str | None]:
        """Send the worker what it does not see; return where it has it, and the model's commit."""
        spec, there = self.job.spec, dict[str, str]()
        say = partial(self._said, host)
        cache = self.job.cache
        tables_key = sha256(str(cache or self.job.directory).encode()).hexdigest()[:16]
        runs, tables = host.call("work_directory", token, tables_key, self._sender.bound_bytes)
        if spec.command is not None and cache is not None:
            folder = _study(cache.parent, self.job)
            place = self._sender.place(host.call, folder, key="command", say=say)
            if place != str(folder.path):
                there[str(folder.path)] = host.call("own_copy", token, place)
            there |= self._named_by_command(host, cache.parent, is_here=place == str(folder.path), say=say)
        gguf = spec.model.gguf_file
        for key, parcel in inputs(spec):
            place = self._sender.place(host.call, parcel, key=key, say=say, weights=gguf)
            there[str(parcel.path)] = place
        if (metric := metric_file(spec)) is not None:
            beside = Parcel.code(metric.parent)
            place = self._sender.place(host.call, beside, key="evaluation.answers.metric", say=say)
            there[str(metric)] = f"{place}/{metric.name}"
        revision = self._commit
        if spec.command is None and not Path(spec.model.path).is_absolute():
            snapshot = self._sent_snapshot(host, revision or spec.model.revision, say)
            if snapshot is not None:
                there[spec.model.path], revision = snapshot
        self.job.directory.mkdir(parents=True, exist_ok=True)
        sees_runs = is_seen(host.call, self.job.directory)
        there[str(self.job.directory)] = str(self.job.directory) if sees_runs else runs
        if cache is not None and spec.command is None:
            cache.mkdir(parents=True, exist_ok=True)
            sees_cache = is_seen(host.call, cache)
            there[str(cache)] = str(cache) if sees_cache else tables
            if not sees_cache:
                self._send_tables(host, cache, tables, say)
        return Places(self.job.directory, there), revision

    def _named_by_command(self, host: RemoteHost, folder: Path, *, is_here: bool, say: Say) -> dict[str, str]:
        """Send the files outside the study's folder that the command names, where the node has others.

        `is_here` says whether the node has the folder at the same place. Of a directory that the node lacks
        only a message says so: the command may make it. Raises InputError for a file named from the folder,
        which the node would look for elsewhere.
        """
        there: dict[str, str] = {}
        for word, path in files_outside(self.job.spec, folder):
            if path.is_dir():
                if not host.call("listing", str(path)):
                    say(f"warning: there is no {path} on this node, which the command names")
                continue
            place = self._sender.place(host.call, Parcel.of(path), key="command.run", say=say)
            if place == str(path) and (is_here or word.startswith("/")):
                continue
            if not word.startswith("/"):
                raise InputError(
                    f"command.run: {word} is outside the study's folder, and a node has a copy of the folder "
                    f"elsewhere; write its absolute path, {path}, so that it is sent, or move it "
                    "into the folder"
                )
            there[str(path)] = place
        return there

    def _said(self, host: RemoteHost, doing: str) -> None:
        self.say(f"{host.name}: {doing}")

    def _sent_snapshot(self, host: RemoteHost, revision: str | None, say: Say) -> tuple[str, str] | None:
        """Send a model of the Hub from this machine's cache to a node that cannot get it.

        Returns its place and its commit; None if it is not needed, or not here either.
        """
        model = self.job.spec.model
        if host.call("hub_commit", model.path, revision) is not None or host.call("reaches_hub"):
            return None
        snapshot = hub_snapshot(model.path, revision)
        if snapshot is None:
            return None  # the worker says that it can neither find nor download it
        parcel = Parcel.of(snapshot, weights=model.gguf_file)
        place = self._sender.place(host.call, parcel, key="model.path", say=say, weights=model.gguf_file)
        return place, snapshot.name

    def _send_tables(self, host: RemoteHost, cache: Path, tables: str, say: Say) -> None:
        """Send tokenised rows to a node, the newest first, up to the bound for models."""
        left = self._sender.up_to_bytes
        found = [path for path in cache.iterdir() if path.is_dir() and _TABLE.fullmatch(path.name)]
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            parcel = Parcel.of(path)
            left -= parcel.size_bytes
            if left < 0:
                break
            target = f"{tables}/{path.name}"
            if not host.call("listing", target):
                fingerprint, bound = self._sender.fingerprint(parcel), self._sender.bound_bytes
                give_back(host.call, path, target, sha256=fingerprint, bound_bytes=bound, say=say)
        for path in (cache / SOURCES).glob("*.json"):
            target, sha256 = f"{tables}/{SOURCES}/{path.name}", digest(path)
            if host.call("digest", target) != sha256:
                host.call("delete", target)
                give_back(host.call, path, target, sha256=sha256)

    def share(self, worker: ProgramWorker) -> None:
        """Fetch what the first worker made that others need: its tokenised rows, and its model's commit."""
        process = worker.process
        if isinstance(process, RemoteProcess):
            try:
                self._fetch_shared(process.host, process.places)
            except (HostLost, HostFailed, OSError, ValueError) as error:
                self._said(
                    process.host, f"its tokenised rows were not fetched, others make them anew: {error}"
                )
        self.shared.set()

    def _fetch_shared(self, host: RemoteHost, places: Places) -> None:
        model, cache = self.job.spec.model, self.job.cache
        if self.job.spec.command is None and not Path(model.path).is_absolute():
            self._commit = host.call("hub_commit", model.path, model.revision) or hub_commit(
                model.path, model.revision
            )
        tables = places.there.get(str(cache))
        if cache is None or tables is None or tables == str(cache):
            return
        names = {name.partition("/")[0] for name, _ in host.call("listing", tables)}
        for name in sorted(filter(_TABLE.fullmatch, names)):
            if not (cache / name).is_dir():
                path = f"{tables}/{name}"
                fetch(host.call, path, cache / name, sha256=host.call("digest", path))
        for name, _, content in host.call("contents", f"{tables}/{SOURCES}"):
            if content is not None:
                (cache / SOURCES).mkdir(exist_ok=True)
                with written_whole(cache / SOURCES / name) as unnamed:
                    unnamed.write_bytes(content)

    # --- its environment --------------------------------------------------------------------------

    def _variables(self, facts: NodeFacts, node: Node) -> dict[str, str]:
        """Return the variables that a worker gets besides its node's; an empty one is removed."""
        names = _PASSED if self.job.spec.command is None else (*_PASSED, *_OF_TRACKERS)
        passed = {name: os.environ[name] for name in names if name in os.environ}
        if node.gpus and not self._gpus_per_worker:
            passed["CUDA_VISIBLE_DEVICES"] = "-1"  # Ray hides them from its actor, or not, by its version
        if is_on_the_hub(self.job.spec) and (token := _hub_token()):
            passed["HF_TOKEN"] = token
        if "OMP_NUM_THREADS" in passed:
            return passed
        known = list(self.known()) or [node]
        room = seats(known, gpus_per_worker=self._gpus_per_worker, workers=self.job.workers)
        others = max(1, room.get(node.id, 1))
        # Ray sets it to 1. Alone on its node, a worker uses what torch would take by itself.
        return {**passed, "OMP_NUM_THREADS": "" if others == 1 else str(max(1, facts.cores // others))}


def is_on_the_hub(spec: RoundSpec) -> bool:
    """Return whether a round's model or data may be there; of a command's, nothing is known."""
    sources = [*spec.data.train, *spec.data.eval, *spec.data.test]
    return any(not Path(path).is_absolute() for path in (spec.model.path, *(each.path for each in sources)))


def _hub_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def inputs(spec: RoundSpec) -> Iterator[tuple[str, Parcel]]:
    """Yield the files and directories that a round file with absolute paths names, by key."""
    if Path(spec.model.path).is_absolute():
        yield "model.path", Parcel.of(Path(spec.model.path), weights=spec.model.gguf_file)
    patterns: dict[str, str] = {}
    for name in ("train", "eval", "test"):
        for source in getattr(spec.data, name):
            if not Path(source.path).is_absolute():
                continue
            if Path(source.path).exists():
                yield f"data.{name}", Parcel.of(Path(source.path))
            else:
                patterns[source.path] = f"data.{name}"
    for parcel in Parcel.matching(list(patterns)):
        yield "data", parcel


def metric_file(spec: RoundSpec) -> Path | None:
    """Return the file that scores answers, which may import what lies beside it; None without one."""
    answers = spec.evaluation.answers
    path = None if answers is None else Path(answers.metric.rpartition(":")[0])
    return path if path is not None and path.is_absolute() else None


def files_outside(spec: RoundSpec, directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield what a command names outside of the round file's folder that is here: as written, and its path.

    Its program is not among them: every machine has its own.
    """
    command = spec.command
    assert command is not None
    words = [*command.run[1:], *command.resume, *([command.config] if command.config else [])]
    seen: set[str] = set()
    for whole in words:
        word = value_of(whole)
        path = Path(os.path.normpath(directory / word))
        if word in seen or not word or "$" in word or not ("/" in word and os.path.exists(path)):  # noqa: PTH110  a word may be too long for Path
            continue
        if path.is_relative_to(directory) or directory.is_relative_to(path):
            continue
        if path.is_file() or path.is_dir():
            seen.add(word)
            yield word, path


def _study(folder: Path, job: Job) -> Parcel:
    """Return a study's folder, in which commands run, without what tuner keeps in it."""
    own = {job.directory, Path(job.spec.checkpoints.directory), job.cache, folder / "dry-run"}

    def files(directory: Path) -> Iterator[Path]:
        for each in sorted(directory.iterdir()):
            if each in own or each.name.startswith(".") or each.name == "__pycache__":
                continue
            if each.is_dir() and not each.is_symlink():
                yield from files(each)
            elif each.is_file() and not re.fullmatch(r".*\.db(-\w+)?", each.name):
                yield each

    return Parcel(folder, {each.relative_to(folder).as_posix(): each for each in files(folder)})


def _with_model(program: Program, path: str | None, revision: str | None) -> Program:
    """Return the program with the base model's place on the node and its commit, if they are known."""
    if revision is None:
        return program

    def document() -> Mapping[str, Any]:
        said: dict[str, Any] = json.loads(json.dumps(program.document()))
        model = said.get("spec", {}).get("model")
        if model is not None:
            model.update({"path": path or model["path"], "revision": revision})
        return said

    return replace(program, document=document)


def job_token(directory: Path) -> str:
    """Return the round's random name on all nodes, by which its workers are recognised; made once."""
    path = directory / ".cluster"
    if not path.exists() or not path.read_text().strip():  # a full disk leaves it empty
        directory.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as unnamed:
            unnamed.write_text(secrets.token_hex(8))
    return path.read_text().strip()
