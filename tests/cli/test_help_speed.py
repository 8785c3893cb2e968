"""`tuner --help` answers at once: it costs little more than Typer itself, and loads nothing heavy."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tuner.cli import app

PAIRS = 7
LIMIT = 1.4
"""Times the cost of a bare Typer program with as many verbs, in user and system seconds."""

HEAVY = (
    "torch", "transformers", "optuna", "optuna_dashboard", "sqlalchemy", "alembic", "peft", "bitsandbytes",
    "datasets", "accelerate", "numpy", "scipy", "pydantic", "plotly", "ruamel",
)  # fmt: skip


def bare_program(directory: Path) -> Path:
    """A Typer program with the groups and verbs of tuner, and nothing in them."""
    lines = ["import typer", "app = typer.Typer()"]
    for group in app.registered_groups:
        assert isinstance(group.typer_instance, typer.Typer)
        lines += [f"{group.name} = typer.Typer()", f"app.add_typer({group.name}, name={group.name!r})"]
        for verb in group.typer_instance.registered_commands:
            assert verb.callback is not None
            name = verb.name or verb.callback.__name__
            lines += [f"@{group.name}.command({name!r})", f"def {group.name}_{name}() -> None: ..."]
    path = directory / "bare.py"
    path.write_text("\n".join([*lines, "app()", ""]))
    return path


def cpu_seconds(*arguments: str) -> float:
    """What a process of Python takes of a CPU: unlike its duration, the same on a busy machine."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        assert "--help" in output.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_help_costs_little_more_than_a_bare_program(tmp_path: Path) -> None:
    bare = (str(bare_program(tmp_path)), "--help")
    tuner = ("-m", "tuner.cli", "--help")
    pairs = [(cpu_seconds(*bare), cpu_seconds(*tuner)) for _ in range(PAIRS + 1)][1:]
    of_bare, of_tuner = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert of_tuner <= LIMIT * of_bare, f"{of_tuner:.3f} s against {of_bare:.3f} s of a bare program"


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("--help") == set()
    assert loaded_by("--version") == set()
    # Typer itself reads options with pydantic.
    assert loaded_by("study", "--help") <= {"pydantic"}
    assert loaded_by("study", "run", "--help") <= {"pydantic"}


def loaded_by(*arguments: str) -> set[str]:
    """Which of the heavy modules a command has imported when it ends."""
    script = (
        "import json, sys\n"
        "from tuner.cli import run\n"
        f"code = run({list(arguments)!r})\n"
        f"json.dump(sorted(set({HEAVY!r}) & set(sys.modules)), sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tuner" in done.stdout
    return set(json.loads(done.stderr))
