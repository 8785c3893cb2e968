"""Runs that tuner did not start, read from what they left: a Trainer's folder, JSON lines, or a table.

Nothing is written, moved or unpickled. What a run does not say stays unknown.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.commands.fallback import log_entries
from tuner.commands.reported import Curve
from tuner.commands.size import shapes
from tuner.errors import InputError, shown
from tuner.records import Evaluation, Objective, Value

_STATE_FILE = "trainer_state.json"
_ADAPTER_FILE = "adapter_config.json"
_ADAPTER_NAMES = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""PEFT's names and tuner's."""
_STEP_NAMES = ("step", "Step", "global_step", "train/global_step", "_step")
_RUN_NAMES = ("run", "name", "Name", "trial", "run_id")


@dataclass(frozen=True)
class FinishedRun:
    """One run as far as its files tell."""

    name: str
    evaluations: tuple[Evaluation, ...]
    max_train_steps: int | None = None
    """The steps that it was to train for; None if unknown."""
    hyperparameters: Mapping[str, Value] = field(default_factory=dict)
    checkpoints: Mapping[int, Path] = field(default_factory=dict)
    """By step."""
    rates: Mapping[int, float] = field(default_factory=dict)
    """Learning rates that were logged, by step."""

    @property
    def last_step(self) -> int:
        """Return the step of its last evaluation."""
        return self.evaluations[-1].step


def read_runs(paths: Sequence[Path], objective: Objective) -> list[FinishedRun]:
    """Read every run in the paths: folders, their subfolders, or files. Raises InputError for none."""
    found = [run for path in paths for run in _readable(path, objective)]
    names = [run.name for run in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"{', '.join(sorted(twice))}: named twice; name each run once")
    empty = [run.name for run in found if not run.evaluations]
    if empty:
        raise InputError(
            f"{', '.join(empty)}: no evaluation of {objective.metric}; was the evaluation off, or has the "
            "metric another name (--metric)?"
        )
    return found


def _readable(path: Path, objective: Objective) -> list[FinishedRun]:
    try:
        return list(_runs_in(path, objective))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text") from error
    except csv.Error as error:
        raise InputError(f"{path}: is not a CSV file: {error}") from error


def _runs_in(path: Path, objective: Objective) -> Iterator[FinishedRun]:
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    if path.is_dir():
        folders = (
            [path] if _state_of(path) else sorted(p for p in path.iterdir() if p.is_dir() and _state_of(p))
        )
        if not folders:
            raise InputError(
                f"{path}: neither it nor its subfolders have a {_STATE_FILE}, which a Trainer writes at each "
                "checkpoint; name a file of JSON lines or a CSV file for other tools"
            )
        yield from (_of_trainer(folder, objective) for folder in folders)
    elif path.suffix == ".csv":
        yield from _of_table(path, objective)
    else:
        yield _of_lines(path, objective)


def _checkpoints(folder: Path) -> dict[int, Path]:
    found = {p: p.name.partition("-")[2] for p in folder.glob("checkpoint-*") if (p / _STATE_FILE).is_file()}
    return {int(step): path for path, step in sorted(found.items()) if step.isdigit()}


def _state_of(folder: Path) -> Path | None:
    """Return the newest state of a Trainer in a folder: its own, or the last checkpoint's."""
    if (folder / _STATE_FILE).is_file():
        return folder / _STATE_FILE
    checkpoints = _checkpoints(folder)
    return checkpoints[max(checkpoints)] / _STATE_FILE if checkpoints else None


def _of_trainer(folder: Path, objective: Objective) -> FinishedRun:
    place = _state_of(folder)
    assert place is not None
    state = _json(place)
    lines: list[dict[str, Any]] = []
    rates: dict[int, float] = {}
    for entry in log_entries(state, place):
        if "train_runtime" in entry:
            break  # an evaluation after the end of training
        said = {name: value for name, value in entry.items() if _is_number(value)}
        if "loss" in said:
            said["train_loss"] = said.pop("loss")
            if "learning_rate" in said and isinstance(said.get("step"), int):
                rates[said["step"]] = float(said["learning_rate"])
        lines.append({name: value for name, value in said.items() if name != "grad_norm"})
    values = _adapter(folder, place.parent)
    if rates:
        values = {"learning_rate": max(rates.values()), **values}
    return FinishedRun(
        folder.name,
        _evaluations(str(place), lines, objective),
        _horizon(place, state.get("max_steps")),
        values,
        _checkpoints(folder),
        rates,
    )


def _horizon(place: Path, max_steps: Any) -> int | None:
    if max_steps is None or (type(max_steps) is int and max_steps <= 0):  # unknown
        return None
    if type(max_steps) is not int:
        raise InputError(f"{place}: max_steps: expects a whole number, got {shown(max_steps)}")
    return max_steps


def _adapter(*folders: Path) -> dict[str, Value]:
    path = next((folder / _ADAPTER_FILE for folder in folders if (folder / _ADAPTER_FILE).is_file()), None)
    if path is None:
        return {}
    said = _json(path)
    found: dict[str, Value] = {}
    for theirs, ours in _ADAPTER_NAMES.items():
        value = said.get(theirs)
        if isinstance(value, list):
            found[ours] = tuple(sorted(map(str, value)))
        elif value is not None and (value is not False or theirs not in ("use_rslora", "use_dora")):
            found[ours] = value
    targets = found.get("target_modules")
    if isinstance(targets, tuple):
        layers = _layers_of(str(said.get("base_model_name_or_path")), path)
        found["target_modules"] = _as_written(tuple(map(str, targets)), layers)
    return found


def _as_written(targets: tuple[str, ...], layers: Sequence[str]) -> tuple[str, ...]:
    """Return the ends of layer names that name the same layers of the model, as users write them.

    PEFT writes the full names for `all-linear` of a small model. They stay where the layers are unknown.
    """
    ends = tuple(sorted({target.rpartition(".")[2] for target in targets}))
    named = {layer for layer in layers if layer.rpartition(".")[2] in ends}
    return ends if named == set(targets) else targets


def _layers_of(model: str, beside: Path) -> list[str]:
    """Return the names of a base model's layers; none where its folder is not found from the run's."""
    places = (folder / model for folder in beside.absolute().parents)
    folder = next((place for place in places if any(place.glob("*.safetensors"))), None)
    if folder is None:
        return []
    try:
        weights = [name for name, _ in shapes(folder)]
    except (OSError, ValueError):  # such as a pointer of Git LFS in place of the weights
        return []
    return [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]


def _of_lines(path: Path, objective: Objective) -> FinishedRun:
    lines, values = [], {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            said = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: is not JSON: {error}") from error
        if isinstance(said, dict) and "hyperparameters" in said:
            if not isinstance(said["hyperparameters"], dict):
                raise InputError(f"{path}, line {number}: hyperparameters: expects values by name")
            values.update(said["hyperparameters"])
        else:
            lines.append(said)
    return FinishedRun(path.stem, _evaluations(str(path), lines, objective), None, values)


def _of_table(path: Path, objective: Objective) -> Iterator[FinishedRun]:
    """Yield the runs of a CSV file: one, one per value of a column `run`, or W&B's columns `RUN - METRIC`."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), list(reader.fieldnames or ())
    step = next((name for name in _STEP_NAMES if name in columns), None)
    if step is None:
        raise InputError(
            f"{path}: has no column {', '.join(_STEP_NAMES[:3])}; its columns: {', '.join(columns)}"
        )
    runs = dict.fromkeys(name.rpartition(" - ")[0] for name in columns if " - " in name)
    if runs:
        for run in runs:
            named = {
                f"{run} - {metric}": _underscored(metric)
                for metric in (name.rpartition(" - ")[2] for name in columns if name.startswith(f"{run} - "))
                if not metric.endswith(("__MIN", "__MAX"))
            }
            yield _of_rows(path, run, rows, {step: "step", **named}, objective)
        return
    by = next((name for name in _RUN_NAMES if name in columns), None)
    named = {name: "step" if name == step else _underscored(name) for name in columns if name != by}
    for run in dict.fromkeys(row[by] if by else path.stem for row in rows):
        own = [row for row in rows if by is None or row[by] == run]
        yield _of_rows(path, run, own, named, objective)


def _of_rows(
    path: Path, run: str, rows: Sequence[Mapping[str, str]], named: Mapping[str, str], objective: Objective
) -> FinishedRun:
    """Return one run of a table; a column of text or of one value for all rows is a hyperparameter."""
    columns = {name: [_value(row[column]) for row in rows] for column, name in named.items()}
    measured = {objective.metric, "eval_loss", "train_loss", "learning_rate", "step"}
    fixed = {
        name: values[0]
        for name, values in columns.items()
        if name not in measured
        and not name.startswith("eval_")
        and None not in values
        and len(set(values)) == 1
    }
    lines = []
    for at in range(len(rows)):
        said = {name: values[at] for name, values in columns.items() if name not in fixed}
        lines.append({name: value for name, value in said.items() if _is_number(value)})
    for number, line in enumerate(lines, start=2):
        step = line.get("step")
        if step is None or not float(str(step)).is_integer():
            raise InputError(f"{path}, row {number}: the step is not a whole number: {step}")
        line["step"] = int(float(str(step)))
    rates = [float(str(value)) for value in columns.get("learning_rate", ()) if _is_number(value)]
    if rates:
        fixed["learning_rate"] = max(rates)
    values = {name: value for name, value in fixed.items() if value is not None}
    return FinishedRun(run, _evaluations(f"{path}, {run}", lines, objective), None, values)


def _evaluations(source: str, lines: Sequence[Any], objective: Objective) -> tuple[Evaluation, ...]:
    curve = Curve(source, objective)
    found = [made for said in lines if (made := curve.line(said).evaluation) is not None]
    found = [made for made in found if objective.metric in made.metrics or objective.metric == "eval_loss"]
    return tuple(sorted(found, key=lambda made: made.step))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expects a JSON object")
    return found


def _underscored(name: str) -> str:
    """Return a metric's name as a Trainer reports it: W&B shows `eval_loss` as `eval/loss`."""
    head, slash, tail = name.partition("/")
    if not slash or head not in ("eval", "train"):
        return name
    return (
        f"train_{tail}" if head == "train" and tail == "loss" else tail if head == "train" else f"eval_{tail}"
    )


def _value(text: str | None) -> Value | None:
    if text is None or not text.strip():
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "." not in text and "e" not in text.lower() else number


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
