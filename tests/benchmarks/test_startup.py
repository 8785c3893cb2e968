"""`study check` costs little more CPU than importing what it needs, and torch's compiler is not among it."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LIMIT = 1.3
"""Times the CPU of importing AutoTokenizer and datasets and loading the tokenizer."""


@pytest.mark.acceptance
def test_check_costs_little_more_than_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from startup import measured

    of_libraries, of_check = (statistics.median(column) for column in zip(*measured(3), strict=True))
    assert of_check <= LIMIT * of_libraries, f"{of_check:.2f} s against {of_libraries:.2f} s"


def test_libraries_compile_what_they_decorate_when_it_is_called() -> None:
    script = (
        "import sys, torch\n"
        "at_once = torch.compile\n"
        "import tuner.adapters\n"
        "assert torch.compile is at_once\n"
        "assert 'bitsandbytes' in sys.modules\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
        "import bitsandbytes.functional as F\n"
        "given = torch.randn(64, 64)\n"
        "back = F.dequantize_4bit(*F.quantize_4bit(given, quant_type='nf4'))\n"
        "assert (back - given).abs().mean() < 0.2\n"
    )
    root = str(BENCHMARKS.parent)
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, cwd=root)
    assert done.returncode == 0, done.stderr
