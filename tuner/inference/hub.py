"""The Hugging Face Hub as a place for what was exported."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from tuner.errors import TunerError

_HttpError: type[Exception] = HfHubHTTPError.__mro__[1]
"""What the Hub's library raises when nobody answers: of httpx, or of the one it has in its place."""


def push(directory: Path, repo: str, *, token: str, public: bool, endpoint: str | None = None) -> str:
    """Upload a complete directory as one commit; returns the repository's address.

    A repository that does not exist yet is made, private unless `public`. `endpoint` is another Hub.
    Raises TunerError, which says how to go on without exporting again.
    """
    api = HfApi(endpoint=endpoint, token=token)
    try:
        made = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=directory, commit_message=f"Upload {directory.name}"
        )
    except (_HttpError, OSError) as error:
        raise TunerError(
            f"--push {repo}: the Hub did not take it: {error}\n"
            f"{directory} is complete; push it again with: hf upload {repo} {directory} ."
        ) from error
    return str(made)
