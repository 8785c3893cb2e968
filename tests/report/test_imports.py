from __future__ import annotations

import subprocess
import sys


def test_the_room_loads_no_heavy_library() -> None:
    code = "import sys, tuner.report; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"plotly", "torch", "transformers", "optuna", "sqlalchemy", "pydantic"} & set(
        loaded.stdout.split()
    )
