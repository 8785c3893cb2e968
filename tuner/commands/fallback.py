"""What a command left for others to read, where neither it nor tuner's hook reports: logs of its tool.

In this order, the first that has the objective's metric: LLaMA-Factory's `trainer_log.jsonl`, the
`trainer_state.json` of checkpoints, TensorBoard's event files. All of them in the folder that the command
writes to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tuner.errors import InputError, shown
from tuner.records import Objective

Said: TypeAlias = dict[str, Any]
"""A line as a command would have reported it."""

_LOSS = "eval_loss"
_STATE_FILE = "trainer_state.json"
_EVENT_FILES = "events.out.tfevents.*"


@dataclass
class Fallback:
    """The logs of one attempt's output folder, read as they grow."""

    output: Path
    objective: Objective
    from_step: int = 0
    """Where the attempt resumed; a `trainer_state.json` has the evaluations before it, too."""
    gpus: int = 0
    source: str | None = None
    """Where the last lines came from; None if nothing was found."""
    _said: set[tuple[int, str]] = field(default_factory=set)

    def new_lines(self) -> Iterator[Said]:
        """Yield what was logged since the last call, evaluations before the checkpoints of their step."""
        states = _states(self.output)
        for source, lines in self._sources(states):
            if any(self.objective.metric in line or _LOSS in line for line in lines):
                self.source = source
                yield from self._unsaid(lines, "metrics")
                break
        yield from self._unsaid(
            [self._saved(step, states[step].parent) for step in sorted(states)], "checkpoint"
        )

    def _saved(self, step: int, place: Path) -> Said:
        has_several = (place / "rng_state_0.pth").exists()
        return {"step": step, "checkpoint": str(place), "processes": max(1, self.gpus) if has_several else 1}

    def _sources(self, states: Mapping[int, Path]) -> Iterator[tuple[str, Sequence[Said]]]:
        for path in files_below(self.output, "trainer_log.jsonl"):
            lines = [_of_factory(said, path) for said in _parsed_lines(path) if "current_steps" in said]
            if self.objective.metric == _LOSS or any(self.objective.metric in line for line in lines):
                yield path.name, lines
        if states:
            history = [_of_trainer(entry) for entry in _before_the_end(states[max(states)])]
            yield _STATE_FILE, [line for line in history if line["step"] > self.from_step]
        if files_below(self.output, _EVENT_FILES) and has_tensorboard():
            yield "TensorBoard's event files", list(_of_events(self.output))

    def _unsaid(self, lines: Sequence[Said], kind: str) -> Iterator[Said]:
        for line in lines:
            key = line["step"], f"{kind} {_is_evaluation(line)}"
            if key not in self._said:
                self._said.add(key)
                yield line

    @property
    def unread(self) -> str | None:
        """Return what to do about logs that cannot be read here; None if there are none."""
        if has_tensorboard() or not files_below(self.output, _EVENT_FILES):
            return None
        return (
            "it wrote TensorBoard's event files, which tuner reads once the package tensorboard is installed"
        )


def files_below(folder: Path, pattern: str) -> list[Path]:
    """Return the files whose path ends as the pattern says, in order; folders may be deleted meanwhile."""
    found = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.match(pattern))


def has_tensorboard() -> bool:
    """Return whether TensorBoard's reader is installed."""
    from importlib.util import find_spec

    return find_spec("tensorboard") is not None


def _is_evaluation(line: Said) -> bool:
    return any(name.startswith("eval_") for name in line)


def _states(output: Path) -> dict[int, Path]:
    """Return the readable `trainer_state.json` of whole checkpoints, by step: it is written last."""
    found = {}
    for path in files_below(output, f"checkpoint-*/{_STATE_FILE}"):
        step = path.parent.name.partition("-")[2]
        if step.isdigit() and (_json(path) or {}).get("global_step") == int(step):
            found[int(step)] = path
    return found


def _json(path: Path) -> Said | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # it is being written, or gone
        return None
    return found if isinstance(found, dict) else None


def _parsed_lines(path: Path) -> Iterator[Said]:
    for line in path.read_bytes().decode(errors="replace").split("\n")[:-1]:  # the last one may not be whole
        if line.strip():
            try:
                said = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: a line is not JSON: {error}") from error
            if isinstance(said, dict):
                yield said


def _before_the_end(path: Path) -> Iterator[Said]:
    """Yield the entries of a Trainer's history up to the end of training."""
    for entry in log_entries(_json(path) or {}, path):
        if "train_runtime" in entry:
            return
        if type(entry.get("step")) is int:
            yield entry


def log_entries(state: Said, path: Path) -> list[Said]:
    """Return what a Trainer has logged, by the state in a file. Raises InputError if that is no list."""
    found = state.get("log_history", [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise InputError(f"{path}: log_history: expects a list of JSON objects")
    return found


def _of_trainer(entry: Said) -> Said:
    """Return an entry of a Trainer's history by the names of a report."""
    numbers = {name: raw for name, raw in entry.items() if type(raw) in (int, float) and name != "grad_norm"}
    if "loss" in numbers:
        numbers["train_loss"] = numbers.pop("loss")
    return numbers


def _of_factory(said: Said, path: Path) -> Said:
    """Return a line of LLaMA-Factory's log by the names of a report; its `accuracy` is of training."""
    if type(said["current_steps"]) is not int:
        raise InputError(f"{path}: current_steps: expects a whole number, got {shown(said['current_steps'])}")
    names = {"loss": "train_loss", "lr": "learning_rate", "eval_loss": _LOSS}
    return {"step": said["current_steps"]} | {
        ours: said[theirs] for theirs, ours in names.items() if theirs in said
    }


def _of_events(output: Path) -> Iterator[Said]:
    """Yield what TensorBoard's event files say, in 32 bits, by step: `eval/loss` is `eval_loss`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    folders = sorted({path.parent for path in files_below(output, _EVENT_FILES)})
    training: dict[int, Said] = {}
    evaluated: dict[int, Said] = {}
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        tags = events.Tags()
        for tag in tags["scalars"]:
            for each in events.Scalars(tag):
                _put(tag, each.step, float(each.value), training=training, evaluated=evaluated)
        for tag in tags["tensors"]:
            for each in events.Tensors(tag):
                value = make_ndarray(each.tensor_proto)
                if value.size == 1 and value.dtype.kind == "f":
                    _put(tag, each.step, float(value.item()), training=training, evaluated=evaluated)
    for step in sorted(training.keys() | evaluated.keys()):
        yield from (found[step] for found in (training, evaluated) if step in found)


def _put(tag: str, step: int, value: float, *, training: dict[int, Said], evaluated: dict[int, Said]) -> None:
    group, _, name = tag.partition("/")
    known = {"loss": "train_loss", "learning_rate": "learning_rate"}
    if group == "eval" and name:
        evaluated.setdefault(step, {"step": step}).setdefault(f"eval_{name}", value)
    elif group == "train" and name in known:
        training.setdefault(step, {"step": step}).setdefault(known[name], value)
