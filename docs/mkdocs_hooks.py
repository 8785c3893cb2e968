"""Hooks of mkdocs: pages that the navigation does not list, and links to files of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)\s#]*)(#[^)\s]*)?\)")


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").strip()


def on_config(config: Any) -> Any:
    """Add guides and decisions that have no entry of their own, so that a new page needs none."""
    docs = Path(config["docs_dir"])
    listed = set(re.findall(r"[\w/-]+\.md", repr(config["nav"])))
    for section, folder in (("Guides", "how-to"), ("Decisions", "adr")):
        entries = next(entry[section] for entry in config["nav"] if section in entry)
        pages = sorted((docs / folder).glob("*.md"))
        entries += [{_title(p): f"{folder}/{p.name}"} for p in pages if f"{folder}/{p.name}" not in listed]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Name files of the repository instead of linking them: the site does not contain them."""
    docs = Path(config["docs_dir"]).resolve()
    folder = docs / Path(page.file.src_path).parent

    def named(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(docs):
            return match[0]
        return f"{match[1]} (`{target.relative_to(docs.parent)}`)"

    return _LINK.sub(named, markdown)
