"""Licences that models and data sets state in their cards, as far as this machine knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def stated_licence(path: str, *, kind: Literal["model", "dataset"]) -> str | None:
    """The `license` in a directory's README.md, or in that of a Hub id in the local cache; else None."""
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from yaml import YAMLError

    found: object = Path(path) / "README.md"
    try:
        if not Path(path).is_absolute():
            found = try_to_load_from_cache(path, "README.md", repo_type=kind)
        if not isinstance(found, (str, Path)) or not Path(found).is_file():
            return None
        stated = ModelCard.load(found, ignore_metadata_errors=True).data.to_dict().get("license")
    except (HFValidationError, OSError, ValueError, YAMLError):
        return None
    return str(stated) if stated else None
