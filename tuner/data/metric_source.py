"""Whether a metric of answers can be there and take two texts, by its source: nothing of it is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path

from tuner.data.answer_metrics import ADVICE, EXACT_MATCH, METRIC_KEY, shown_metric
from tuner.errors import MetricError

_NUM_ARGUMENTS = 2
Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = dict[str, ast.AST | None]
"""What names of a module or a class are; None where only running it would tell."""


def refuse_unlike_metric(name: str) -> None:
    """Raise MetricError if the source of a metric, named with absolute paths, shows that it cannot be one.

    What only running the code would tell is left to `load_metric`.
    """
    if name == EXACT_MATCH:
        return
    place, _, attribute = name.rpartition(":")
    source = Path(place) if place.endswith(".py") else _source_of_module(place, shown=shown_metric(name))
    if source is not None:
        _refuse(shown_metric(name), place, attribute, _parsed(source, shown=shown_metric(name)))


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
    found = Path((spec and spec.origin) or "")
    return found if found.suffix == ".py" and found.is_file() else None


def _within_python(name: str) -> ModuleSpec | None:
    return BuiltinImporter.find_spec(name) or FrozenImporter.find_spec(name)


def _parsed(source: Path, *, shown: str) -> ast.Module:
    if not source.is_file():
        raise MetricError(f"{METRIC_KEY}: {shown}: there is no file {source}; {ADVICE}")
    try:
        return ast.parse(source.read_bytes())
    except SyntaxError as error:
        where = f" in line {error.lineno}" if error.lineno else ""
        said = f"{source} is not Python{where}: {error.msg}"
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        said = f"{source} cannot be read: {error or type(error).__name__}"
    raise MetricError(f"{METRIC_KEY}: {shown}: {said}; {ADVICE}")


def _refuse(shown: str, place: str, attribute: str, module: ast.Module) -> None:
    """Raise MetricError if a module has no such attribute, or one that is no function of two arguments."""
    scope, found = _scope(module.body), None
    for part in attribute.split("."):
        if scope is None:
            return
        if part not in scope:
            known = [n for n, value in scope.items() if isinstance(value, Function) and n[0] != "_"]
            there = f"; it has {', '.join(known[:8])}" if known else ""
            raise MetricError(f"{METRIC_KEY}: {shown}: {place} has no function {attribute}{there}")
        found = scope[part]
        is_plain = isinstance(found, ast.ClassDef) and not (
            found.bases or found.keywords or found.decorator_list
        )
        scope = _scope(found.body) if isinstance(found, ast.ClassDef) and is_plain else None
    if isinstance(found, ast.Constant):
        raise MetricError(f"{METRIC_KEY}: {shown}: {place} has no function {attribute}: it is a value")
    if isinstance(found, Function) and not found.decorator_list and (said := _other_arguments(found)):
        raise MetricError(
            f"{METRIC_KEY}: {shown}: {place}, line {found.lineno}: {said}; it is called with two texts, the "
            "answer and the reference"
        )


def _other_arguments(function: Function) -> str | None:
    """Return what is wrong with a function's arguments, if it cannot be called with two."""
    if isinstance(function, ast.AsyncFunctionDef):
        return f"{function.name} is asynchronous"
    asked = function.args
    most = len(asked.posonlyargs) + len(asked.args)
    least = most - len(asked.defaults)
    named = [each.arg for each, value in zip(asked.kwonlyargs, asked.kw_defaults, strict=True) if not value]
    if named:
        return f"{function.name} needs the argument {named[0]} by name"
    if least > _NUM_ARGUMENTS:
        return f"{function.name} needs {least} arguments"
    if most < _NUM_ARGUMENTS and asked.vararg is None:
        return f"{function.name} takes {most} arguments"
    return None


def _scope(body: Sequence[ast.stmt]) -> Scope | None:
    """Return what the names of a body are; None where it may have others, too."""
    inside = (node for statement in body for node in ast.walk(statement))
    found: Scope = {name: None for node in inside if isinstance(node, ast.Global) for name in node.names}
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
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant() as value):
                found[name] = None if name in found else value
            case ast.Name(id=name, ctx=ast.Store()):
                found.setdefault(name, None)
                if not isinstance(found[name], ast.Constant):
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
