import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import tuner.playbook


def public_functions():
    for info in pkgutil.iter_modules(tuner.playbook.__path__):
        module = importlib.import_module(f"tuner.playbook.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                yield f"{info.name}.{name}", function


def test_every_public_function_names_its_rule_or_its_source():
    functions = dict(public_functions())
    assert len(functions) > 50
    unnamed = [n for n, f in functions.items() if not {"Rule:", "Source:"} & set((f.__doc__ or "").split())]
    assert unnamed == []


def test_of_scipy_the_playbook_imports_special_alone():
    files = list(Path(tuner.playbook.__path__[0]).rglob("*.py"))
    assert len(files) > 15
    names = {name for path in files for name in imported(path.read_text())}
    assert {name for name in names if name.partition(".")[0] == "scipy"} == {"scipy.special"}


def test_the_playbook_loads_no_scipy_before_it_needs_it():
    code = "import sys, tuner.playbook, tuner.playbook.noise; print('scipy' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "False"


def imported(source):
    """Dotted names of the modules that a module imports, those within its functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
