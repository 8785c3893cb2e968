"""What llama.cpp's converter is asked for, by a program that takes its arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.inference import convert_to_gguf

CONVERTER = """\
import sys
from pathlib import Path
model, _, file, _, kind = sys.argv[1:]
Path(file).write_text(f"{model} {kind}")
"""


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "bf16"), ("float16", "f16"), ("float32", "f32")])
def test_the_file_has_the_type_of_the_merged_model(tmp_path: Path, dtype: str, kind: str) -> None:
    converter = tmp_path / "convert.py"
    converter.write_text(CONVERTER)
    convert_to_gguf(tmp_path / "merged", tmp_path / "new" / "m.gguf", converter=converter, dtype=dtype)
    assert (tmp_path / "new" / "m.gguf").read_text() == f"{tmp_path / 'merged'} {kind}"
