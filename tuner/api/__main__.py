"""Write python.md from docstrings: `python -m tuner.api docs/reference`; `--check` only compares."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tuner.api import log
from tuner.api.advice import Advice, advise
from tuner.api.round import Round
from tuner.api.study import Promotion, Study
from tuner.api.trial import Reproduction, Trial

_FUNCTIONS = (advise, log)
_CLASSES = (Study, Round, Trial, Advice, Promotion, Reproduction)
_HEAD = """\
# From Python

`import tuner` gives `Study`, `Round`, `Trial`, `Advice`, `advise` and `log`, and loads what they need when
they are used. What cannot be done raises an error of `tuner.errors`, whose message is the one of the command
line. [Use it from Python](../how-to/use-from-python.md) shows how they go together.
"""


def page() -> str:
    """Return the reference page as Markdown."""
    parts = [_HEAD]
    for found in _CLASSES:
        parts += _of_class(found)
    for function in _FUNCTIONS:
        parts += _section(f"tuner.{function.__name__}{_signature(function)}", function, level=2)
    return "\n".join(parts).rstrip() + "\n"


def _of_class(found: type) -> Iterator[str]:
    is_made = found is Study
    signature = _signature(found) if is_made else ""
    yield from _section(f"tuner.{found.__name__}{signature}", found, level=2)
    if is_made:
        yield f"{inspect.getdoc(Study.__init__)}\n"
    described = {f.name: f for f in fields(found)} if is_dataclass(found) else {}
    for name, member in vars(found).items():
        if name.startswith("_") or name in described:
            continue
        if isinstance(member, classmethod):
            made = getattr(found, name)
            yield from _section(f"{found.__name__}.{name}{_signature(made)}", made, level=3)
        elif isinstance(member, property):
            yield from _section(f"{found.__name__}.{name}", member, level=3)
        elif inspect.isfunction(member):
            yield from _section(f"{found.__name__}.{name}{_signature(member)}", member, level=3)


def _section(title: str, of: Any, *, level: int) -> Iterator[str]:
    yield f"{'#' * level} `{title}`"
    yield f"{_listed(inspect.getdoc(of) or '')}\n"


def _listed(docstring: str) -> str:
    """Return the docstring as Markdown, with the entries under `Args:` and `Raises:` as lists."""
    text = re.sub(r"^    (\w+):", r"- `\1`:", docstring, flags=re.MULTILINE)
    text = re.sub(r"^        ", "  ", text, flags=re.MULTILINE)
    return re.sub(r"^(Args|Raises):\n", r"\1:\n\n", text, flags=re.MULTILINE)


def _signature(of: Any) -> str:
    """Return the call signature without types, which the docstring describes."""
    shown = []
    is_named_only = False
    for parameter in inspect.signature(of).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not is_named_only:
            is_named_only = True
            shown.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        shown.append(f"{stars}{parameter.name}{default}")
    return f"({', '.join(shown)})"


def main(directory: Path, *, check: bool) -> int:
    """Write the page, or report that it is stale; return the exit code."""
    path, text = directory / "python.md", page()
    if not check:
        path.write_text(text, encoding="utf-8")
        return 0
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return 0
    print(f"{path} is stale: make fix", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), check="--check" in sys.argv))
