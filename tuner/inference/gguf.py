"""A merged model as one GGUF file, by llama.cpp's own converter in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tuner.errors import TunerError

_OUTTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_LINES_SHOWN = 15
"""The end of what a converter printed, where its error is."""


def convert_to_gguf(model: Path, file: Path, *, converter: Path, dtype: str) -> None:
    """Convert a directory of a merged model; the file appears whole or not at all.

    `dtype` is one of MERGED_DTYPES. Raises TunerError with what the converter printed.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    command = [*_runs(converter), str(model), "--outfile", str(temporary), "--outtype", _OUTTYPES[dtype]]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not temporary.is_file():
            printed = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_LINES_SHOWN:])
            raise TunerError(
                f"{converter} ended with {done.returncode} and wrote no {file.name}; the merged model is in "
                f"{model}. It printed:\n{printed}"
            )
        temporary.replace(file)
    except OSError as error:
        raise TunerError(f"{file}: cannot be written by {converter}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _runs(converter: Path) -> Sequence[str]:
    """A Python file runs in this Python, which has the torch and transformers that it needs."""
    if converter.suffix == ".py":
        return [sys.executable, str(converter)]
    return [shutil.which(str(converter)) or str(converter)]
