import importlib
import inspect
import pkgutil

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
