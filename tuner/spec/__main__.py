"""Writes the generated pages of the reference, or with --check says whether they are fresh."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tuner.spec.reference import COMMAND, reference_pages


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 when a page is missing or stale."""
    parser = argparse.ArgumentParser(prog="python -m tuner.spec", description=__doc__)
    parser.add_argument("directory", type=Path, help="where the pages are, such as docs/reference")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is stale")
    options = parser.parse_args(arguments)
    stale = [name for name, page in reference_pages().items() if _read(options.directory / name) != page]
    if options.check:
        for name in stale:
            print(f"{options.directory / name} is stale; refresh it by `{COMMAND}`", file=sys.stderr)
        return 1 if stale else 0
    options.directory.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (options.directory / name).write_text(reference_pages()[name], encoding="utf-8")
        print(f"wrote {options.directory / name}")
    return 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
