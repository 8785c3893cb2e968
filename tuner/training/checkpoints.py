"""Checkpoint directories: what a resumable one contains, and how one is written atomically.

A directory is written under a temporary name, synced and renamed. It contains only safetensors and JSON.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner.adapters import Adapter, read_adapter, write_adapter
from tuner.adapters.peft_files import CONFIG_FILE, named_tensors, weights_from
from tuner.errors import CheckpointError
from tuner.records import Checkpoint, CheckpointKind, Evaluation, evaluation_from_json, to_json
from tuner.whole import digest, published

_OPTIMIZER_FILE = "optimizer.safetensors"
_BEST_FILE = "best.safetensors"
_STATE_FILE = "state.json"
_FORMAT = 2

Weights = Mapping[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Snapshot:
    """All that a trial needs to resume as if it had never stopped."""

    step: int
    adapter: Adapter
    optimizer: Mapping[str, Tensor]
    evaluations: tuple[Evaluation, ...]
    best: Weights | None
    """The adapter of the best evaluation so far; None if it is this snapshot's own."""
    counters: Mapping[str, Any]
    """Running sums since the last evaluation, by name: floats and ints."""
    sums: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """The same sums at each evaluation, by step: a longer round may lack one of these steps."""


def publish_best(trial: Path, adapter: Adapter, weights: Weights, *, step: int, attempt: int) -> Checkpoint:
    """Write the best step's PEFT adapter; whoever records it switches the link `best` to it."""
    target = trial / "best-steps" / f"step-{step:06d}.a{attempt}"
    published(target, lambda directory: write_adapter(directory, adapter, weights))
    return _recorded(CheckpointKind.BEST, step, target)


def publish_snapshot(trial: Path, snapshot: Snapshot, *, kind: CheckpointKind, attempt: int) -> Checkpoint:
    """Write a resumable checkpoint: `last/step-000015.a1` or `trunk/step-000036.a1`.

    Another attempt's is never replaced: a node that was cut off may still run one.
    """
    folder = "trunk" if kind == CheckpointKind.TRUNK else "last"
    target = trial / folder / f"step-{snapshot.step:06d}.a{attempt}"
    published(target, lambda directory: _write_snapshot(directory, snapshot))
    return _recorded(kind, snapshot.step, target)


def read_snapshot(directory: Path, *, sha256: str | None) -> Snapshot:
    """Read a resumable checkpoint. Raises CheckpointError if it is missing or not the recorded one."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: the recorded checkpoint is missing")
    if sha256 is not None and (found := digest(directory)) != sha256:
        raise CheckpointError(
            f"{directory}: the checkpoint was changed or damaged: its hash is {found}, recorded was {sha256}"
        )
    try:
        state = json.loads((directory / _STATE_FILE).read_text())
        optimizer = load_file(directory / _OPTIMIZER_FILE)
        best = load_file(directory / _BEST_FILE) if (directory / _BEST_FILE).exists() else None
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: not a resumable checkpoint: {error}") from error
    if state.get("format") != _FORMAT:
        raise CheckpointError(
            f"{directory}: checkpoint format {state.get('format')} is not supported; this tuner reads "
            f"{_FORMAT}"
        )
    return Snapshot(
        step=state["step"],
        adapter=read_adapter(directory),
        optimizer=optimizer,
        evaluations=tuple(evaluation_from_json(item) for item in state["evaluations"]),
        best=weights_from(best) if best is not None else None,
        counters=state["counters"],
        sums={int(step): tuple(sums) for step, sums in state.get("sums", {}).items()},
    )


def write_best_of(directory: Path, target: Path, *, sha256: str) -> None:
    """Write the best adapter that a resumable checkpoint contains as a PEFT directory, into an empty one.

    Raises CheckpointError as `read_snapshot` does.
    """
    snapshot = read_snapshot(directory, sha256=sha256)
    write_adapter(target, snapshot.adapter, snapshot.best)
    # As it was written then: the order of a set of modules is another in each process.
    shutil.copyfile(directory / CONFIG_FILE, target / CONFIG_FILE)


def _write_snapshot(directory: Path, snapshot: Snapshot) -> None:
    write_adapter(directory, snapshot.adapter)
    save_file(dict(snapshot.optimizer), directory / _OPTIMIZER_FILE)
    if snapshot.best is not None:
        save_file(named_tensors(snapshot.best), directory / _BEST_FILE)
    state = {
        "format": _FORMAT,
        "step": snapshot.step,
        "counters": dict(snapshot.counters),
        "sums": dict(snapshot.sums),
        "evaluations": [to_json(evaluation) for evaluation in snapshot.evaluations],
    }
    (directory / _STATE_FILE).write_text(json.dumps(state))


def _recorded(kind: CheckpointKind, step: int, target: Path) -> Checkpoint:
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    trial = target.parent.parent
    return Checkpoint(
        kind, step, f"{trial.name}/{target.relative_to(trial).as_posix()}", size, digest(target)
    )
