"""What `study new` is wired to: rows counted, a commented round file written."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, get_args

from pydantic_core import PydanticCustomError

from tuner.data.survey import survey
from tuner.errors import InputError
from tuner.spec import SourceSpec, new_round
from tuner.spec.sections import possible_path


def write_first_round(
    directory: Path,
    *,
    model: str,
    data: str,
    eval_data: str | None,
    format: str | None,
    template: str | None = None,
) -> Path:
    """Write DIR/round1.yaml; returns its path.

    Raises InputError when it exists or cannot be written, DataError for data that cannot be read.
    """
    path = directory / "round1.yaml"
    if path.exists():
        raise InputError(f"{path}: exists; choose another folder, or edit it")
    model, data = _local("--model", model), _local("--data", data)
    eval_data = None if eval_data is None else _local("--eval", eval_data)
    source = SourceSpec(path=data, format=_known(format) if format else "alpaca")
    found, train_rows = survey(source, recognised=format is None)
    text = new_round(
        study=re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip("-.") or "study",
        model=_from_folder(model, directory),
        data=_from_folder(data, directory),
        eval=None if eval_data is None else _from_folder(eval_data, directory),
        format=found,
        train_rows=train_rows,
        recipe=template,
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _local(option: str, path: str) -> str:
    """A path with its `~` expanded; an id or a URL as it is. Raises InputError for what can be none."""
    if not path:
        raise InputError(f"{option}: has no value; give a file, a directory or an id on the Hub")
    try:
        possible_path(path)
    except PydanticCustomError as error:
        raise InputError(f"{option}: {error.message()}") from None
    return os.path.expanduser(path)  # noqa: PTH111  a Path would make one slash of the two in a URL


def _known(format: str) -> Any:
    allowed = get_args(SourceSpec.model_fields["format"].annotation)
    if format not in allowed:
        raise InputError(f"--format {format}: expects one of {', '.join(allowed)}")
    return format


def _from_folder(path: str, directory: Path) -> str:
    """A local path or pattern as seen from the study's folder; a Hub id or a URL as it is."""
    is_path = "://" not in path and (Path(path).exists() or set("*?[") & set(path))
    return os.path.relpath(path, directory) if is_path else path
