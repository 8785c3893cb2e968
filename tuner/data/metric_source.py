"""Whether a metric of answers can be there and score two texts, by its source: nothing of it is imported."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path

from tuner.data.answer_metrics import (
    ADVICE,
    EXACT_MATCH,
    METRIC_KEY,
    no_function,
    refuse_no_file,
    shown_metric,
)
from tuner.errors import MetricError

_NUM_ARGUMENTS = 2
Function = ast.FunctionDef | ast.AsyncFunctionDef
Value = ast.Constant | ast.JoinedStr | ast.List | ast.Tuple | ast.Dict | ast.Set
"""Expressions whose values cannot be called."""
Scope = dict[str, ast.AST | None]
"""What names of a module or a class are; None where only running it would tell."""


def refuse_unlike_metric(name: str) -> None:
    """Raise MetricError if the source of a metric, named with absolute paths, shows that it cannot be one.

    What only running the code would tell is left to `load_metric`.
    """
    if name == EXACT_MATCH:
        return
    place = name.rpartition(":")[0]
    source = Path(place) if place.endswith(".py") else _source_of_module(place, shown=shown_metric(name))
    if source is not None:
        _refuse(name, _parsed(source, shown=shown_metric(name)))


def _source_of_module(name: str, *, shown: str) -> Path | None:
    """Return the file of a module; None if it has none in Python. Raises MetricError if there is none."""
    spec: ModuleSpec | None = None
    places: Sequence[str] | None = None
    parts = name.split(".")
    for at in range(len(parts)):
        whole = ".".join(parts[: at + 1])
        try:
            spec = PathFinder.find_spec(whole, places) or _within_python(whole)
        except (ImportError, KeyError, ValueError):
            return None  # a package whose folders follow from its parents, once those are imported
        if spec is None:
            said = f"there is no module {whole}"
            raise MetricError(f"{METRIC_KEY}: {shown}: {said}; {ADVICE}")
        if at + 1 < len(parts) and (places := spec.submodule_search_locations) is None:
            return None  # a module may put others where imports find them, as `os` does with `os.path`
        if spec.submodule_search_locations is not None and spec.origin:
            # Its `__init__` may add folders, or put modules elsewhere.
            text = Path(spec.origin).read_text(errors="replace") if spec.origin.endswith(".py") else ""
            if at + 1 < len(parts) and ("__path__" in text or "sys.modules" in text):
                return None
    if spec is not None and spec.origin is None and spec.submodule_search_locations is not None:
        said = f"{name} is a folder without an __init__.py; name one of its modules, as in {name}.MODULE"
        raise MetricError(f"{METRIC_KEY}: {shown}: {said}; {ADVICE}")
    found = Path((spec and spec.origin) or "")
    return found if found.suffix == ".py" and found.is_file() else None


def _within_python(name: str) -> ModuleSpec | None:
    return BuiltinImporter.find_spec(name) or FrozenImporter.find_spec(name)


def _parsed(source: Path, *, shown: str) -> ast.Module:
    refuse_no_file(source, shown=shown)
    try:
        return ast.parse(source.read_bytes())
    except SyntaxError as error:
        where = f" in line {error.lineno}" if error.lineno else ""
        said = f"{source} is not Python{where}: {error.msg}"
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        said = f"{source} cannot be read: {error or type(error).__name__}"
    raise MetricError(f"{METRIC_KEY}: {shown}: {said}; {ADVICE}")


def _refuse(name: str, module: ast.Module) -> None:
    """Raise MetricError if a module has no such attribute, or one that gives no number for two texts."""
    place, _, attribute = name.rpartition(":")
    scope, found = _scope(module.body), None
    for part in attribute.split("."):
        if scope is None:
            return
        if part not in scope:
            raise no_function(name, [key for key, value in scope.items() if isinstance(value, Function)])
        found = scope[part]
        is_plain = isinstance(found, ast.ClassDef) and not (
            found.bases or found.keywords or found.decorator_list
        )
        scope = _scope(found.body) if isinstance(found, ast.ClassDef) and is_plain else None
    said = None
    if isinstance(found, ast.ClassDef) and scope is not None:
        said = _not_a_number(attribute, scope)
    elif isinstance(found, Function | ast.Lambda):
        said = _other_arguments(attribute, found) or _other_result(attribute, found)
    elif isinstance(found, Value):
        said = f"{attribute} is a value"
    if said is not None:
        assert isinstance(found, ast.stmt | ast.expr)
        raise MetricError(
            f"{METRIC_KEY}: {shown_metric(name)}: {place}, line {found.lineno}: {said}; it must be a "
            "function that takes two texts, the answer and the reference, and returns a number"
        )


def _not_a_number(name: str, scope: Scope) -> str | None:
    """Return why an object made of a class without bases from two texts is no number."""
    if not {"__init__", "__new__"} & set(scope):
        return f"{name} is a class that takes no arguments"
    if "__new__" not in scope and "__float__" not in scope:
        return f"{name} is a class, whose objects are no numbers"
    return None


def _other_arguments(name: str, function: Function | ast.Lambda) -> str | None:
    """Return what is wrong with a function's arguments, if it cannot be called with two."""
    if _is_replaced(function):
        return None
    asked = function.args
    most = len(asked.posonlyargs) + len(asked.args)
    least = most - len(asked.defaults)
    named = [each.arg for each, value in zip(asked.kwonlyargs, asked.kw_defaults, strict=True) if not value]
    if named:
        return f"{name} needs the argument {named[0]} by name"
    if least > _NUM_ARGUMENTS:
        return f"{name} needs {least} arguments"
    if most < _NUM_ARGUMENTS and asked.vararg is None:
        return f"{name} takes {('no arguments', 'one argument')[most]}"
    return None


def _is_replaced(function: Function | ast.Lambda) -> bool:
    """Return whether a decorator may put something else in a function's place."""
    decorators = [] if isinstance(function, ast.Lambda) else function.decorator_list
    return any(not (isinstance(each, ast.Name) and each.id == "staticmethod") for each in decorators)


def _other_result(name: str, function: Function | ast.Lambda) -> str | None:
    """Return what a function returns, if that is no number whatever it computes."""
    if isinstance(function, ast.Lambda) or _is_replaced(function):
        return None
    if isinstance(function, ast.AsyncFunctionDef):
        return f"{name} is asynchronous"
    inside = list(_statements(function.body))
    if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in inside):
        return f"{name} is a generator"
    results = [node.value for node in inside if isinstance(node, ast.Return)]
    if all(value is None or (isinstance(value, ast.Constant) and value.value is None) for value in results):
        return f"{name} returns nothing"
    return None


def _scope(body: Sequence[ast.stmt]) -> Scope | None:
    """Return what the names of a body are; None where it may have others, too."""
    inside = (node for statement in body for node in ast.walk(statement))
    found: Scope = {name: None for node in inside if isinstance(node, ast.Global) for name in node.names}
    num_stores = Counter(
        node.id
        for node in _statements(body)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    for node in _statements(body):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                if name == "__getattr__":
                    return None
                found[name] = None if name in found else node
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                if any(each.name == "*" for each in names):
                    return None
                found |= {(each.asname or each.name).split(".")[0]: None for each in names}
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=value)
            ) if isinstance(value, Value | ast.Lambda):
                found[name] = None if name in found else value
            case ast.Name(id=name, ctx=ast.Store()):
                if num_stores[name] > 1 or not isinstance(found.get(name), Value | ast.Lambda):
                    found[name] = None
            case ast.Name(id="globals" | "exec" | "vars" | "setattr" | "locals"):
                return None
            case ast.Delete():
                return None
    return found


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.AST]:
    """Yield statements and what is in them, without what functions and classes have inside."""
    waiting: list[ast.AST] = list(reversed(body))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))
