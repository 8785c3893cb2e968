"""Every module can be imported first, and no room loads a library that belongs to another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tuner"

HEAVY = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "optuna", "optuna_dashboard",
    "ray", "sqlalchemy", "alembic", "pandas", "plotly", "scipy", "numpy", "pydantic", "ruamel.yaml", "rich",
    "typer",
)  # fmt: skip

NUMPY = {"numpy", "scipy"}
FILES = NUMPY | {"pydantic", "ruamel.yaml"}
STORE = {"sqlalchemy", "alembic"}
TORCH = FILES | {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
OPTUNA = FILES | STORE | {"optuna", "optuna_dashboard", "rich"}

MAY_LOAD: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "installation": set(),
    "whole": set(),
    "process_log": set(),
    "process_start": set(),
    "records": set(),
    "methods": set(),
    "pipes": set(),
    "playbook": NUMPY,
    "config": FILES,
    "data": FILES,
    "report": FILES | {"rich"},
    "store": FILES | STORE,
    "commands": FILES,
    "engines": FILES | {"rich"},
    "study": OPTUNA,
    "api": OPTUNA,
    "cli": OPTUNA | {"typer"},
    "adapters": TORCH,
    "training": TORCH,
    "inference": TORCH,
}
"""What a room may have loaded when all of its modules are imported, by floors from below; torch comes last,
so that no room above it owes it to another."""
NOT_IMPORTED = ("env.py", "sitecustomize.py")
"""Alembic runs the one, Python at its start in a command the other."""
WITH_TORCH = ("adapters", "training", "inference")

IMPORT_ALL = """
import importlib, json, os, sys

def report(*said):
    print(json.dumps(said), flush=True)

def apart(work):
    # In a process of its own, which has imported what this one has.
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            report("error", f"{type(error).__name__}: {error}")
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child

def imported(module):
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "tuner").partition(".")[0] == "tuner":  # else an extra that is not installed
            report("broken", module, str(error))
    except BaseException as error:
        report("broken", module, f"{type(error).__name__}: {error}")

def loaded(kind, room):
    report(kind, room, [name for name in HEAVY if name in sys.modules])

def alone(room):
    importlib.import_module(f"tuner.{room}".rstrip("."))
    loaded("room", room)

for room in ROOMS:
    if room not in WITH_TORCH:
        os.waitpid(apart(lambda: alone(room)), 0)
for room, modules in ROOMS.items():
    for library in MAY_LOAD[room]:  # once, not in each fork
        importlib.import_module(library)
    # A room never imports one above it: what is imported already hides no cycle of this one.
    for module in modules:
        os.waitpid(apart(lambda: imported(module)), 0)
    for module in modules:
        imported(module)
    loaded("modules", room)
"""


def modules(room: str) -> list[str]:
    """The modules of a room, those with a `main` guard included."""
    if not room:
        return ["tuner"]
    if not (PACKAGE / room).is_dir():
        return [f"tuner.{room}"]
    found = [path for path in (PACKAGE / room).rglob("*.py") if path.name not in NOT_IMPORTED]
    parts = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in sorted(found)]
    return [".".join(part for part in each if part != "__init__") for each in parts]


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, object]]:
    """What one process, and its forks, found: `room`, `modules` and `broken`, each by name."""
    rooms = {room: modules(room) for room in MAY_LOAD}
    known = {"HEAVY": HEAVY, "MAY_LOAD": MAY_LOAD, "WITH_TORCH": WITH_TORCH, "ROOMS": rooms}
    script = "".join(f"{name} = {value!r}\n" for name, value in known.items()) + IMPORT_ALL
    done = subprocess.run(
        [sys.executable, "-c", script],
        text=True, capture_output=True, check=False, timeout=240,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, object]] = {"room": {}, "modules": {}, "broken": {}}
    for line in done.stdout.splitlines():
        kind, name, value = json.loads(line)
        found[kind][name] = value
    return found


def test_every_room_is_looked_at() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    rooms = {room for room in rooms if not room.startswith("__")}
    assert rooms == set(MAY_LOAD) - {""}
    assert sum(len(modules(room)) for room in MAY_LOAD) > 150


def test_every_module_can_be_the_first_that_is_imported(said) -> None:
    assert said["broken"] == {}
    assert set(said["modules"]) == set(MAY_LOAD)


@pytest.mark.parametrize("room", [room for room in MAY_LOAD if room not in WITH_TORCH])
def test_a_room_loads_no_library_of_another(said, room: str) -> None:
    assert set(said["room"][room]) <= MAY_LOAD[room], f"tuner.{room}, alone in a new interpreter"
    below = set().union(*list(MAY_LOAD.values())[: list(MAY_LOAD).index(room) + 1])
    assert set(said["modules"][room]) <= below, f"a module of tuner.{room}"


def test_importing_the_package_costs_nothing() -> None:
    script = "import time; t = time.process_time(); import tuner; print(time.process_time() - t)"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
    assert float(done.stdout) < 0.1
