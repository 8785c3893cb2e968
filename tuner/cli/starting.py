"""What `study new` is wired to: rows counted, a commented round file written."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tuner.data import count_rows, guess_format
from tuner.errors import InputError
from tuner.spec import new_round


def write_first_round(
    directory: Path, *, model: str, data: str, eval_data: str | None, format: str | None
) -> Path:
    """Write DIR/round1.yaml; returns its path. Raises InputError when it exists, DataError for unusable data."""
    path = directory / "round1.yaml"
    if path.exists():
        raise InputError(f"{path}: exists; choose another folder, or edit it")
    chosen = format or guess_format(data)
    text = new_round(
        study=re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip("-.") or "study",
        model=_from_folder(model, directory),
        data=_from_folder(data, directory),
        eval_data=None if eval_data is None else _from_folder(eval_data, directory),
        format=chosen,
        train_rows=count_rows(data, chosen),
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _from_folder(path: str, directory: Path) -> str:
    """A local path as seen from the study's folder; a Hub id as it is."""
    return os.path.relpath(path, directory) if Path(path).expanduser().exists() else path
