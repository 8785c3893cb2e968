"""Pretrained models and tokenizers, from a directory or from a commit of the Hub."""

from __future__ import annotations

import functools
import hashlib
import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tuner.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.config import ModelSpec, RoundSpec


CONFIG_OF_THE_FILES = ("_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype")
"""Keys of a model's configuration that say where it is stored, not what it is."""
_SAMPLE_BYTES = 16 * 1024
_NUM_SAMPLES = 33
_PAUSES_SECONDS = (0.0, 1.0, 2.0)
"""Before each question for the address of the Hub: one that goes unanswered may be a hiccup."""


def where_to_look(path: str) -> dict[str, Any]:
    """Return arguments of `from_pretrained`: only the local cache, if the Hub cannot be reached."""
    return {"local_files_only": True} if is_out_of_reach(path) else {}


def is_out_of_reach(path: str) -> bool:
    """Whether this names something of the Hub, which does not answer."""
    from huggingface_hub import constants

    is_here = Path(path).is_dir() or constants.HF_HUB_OFFLINE
    return not (is_here or can_be_resolved(constants.ENDPOINT))


@functools.cache
def can_be_resolved(endpoint: str) -> bool:
    """Whether the server's name has an address, as far as this machine can know.

    Behind a proxy that is the proxy's business. Connections that are slow, or fail later, are left to the
    client, which tries again for longer.
    """
    if {"http", "https", "all"} & urllib.request.getproxies().keys():
        return True
    for pause in _PAUSES_SECONDS:
        time.sleep(pause)
        try:
            socket.getaddrinfo(urlsplit(endpoint).hostname, None)
        except socket.gaierror:
            continue
        return True
    return False


def load_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local directory, a Hub id or a GGUF file.

    It is a fast one and has an EOS token; it may lack a pad token, since nothing here pads with it.
    Raises ModelError with what to do.
    """
    from transformers import AutoTokenizer

    _require_directory(model)
    options = where_to_look(model.path)
    if model.gguf_file:
        options["gguf_file"] = model.gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code, **options
        )
    except Exception as error:  # whatever the libraries raise for damaged files
        raise ModelError(f"{model.path}: the tokenizer cannot be loaded: {_advice(model, error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{model.path}: has only a slow tokenizer; tuner requires a fast one (tokenizer.json): "
            "save one with transformers next to the model"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{model.path}: the tokenizer has no EOS token to mark the end of an example; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def _require_directory(model: ModelSpec) -> None:
    path = Path(model.path)
    if path.is_file():
        raise ModelError(
            f"{path}: is a file; set path to the model's directory, and gguf_file to the name of a GGUF file"
        )
    if path.is_absolute() and not path.is_dir():
        raise ModelError(f"{path}: there is no such directory")
    if path.is_dir() and model.gguf_file and not (path / model.gguf_file).is_file():
        files = ", ".join(sorted(file.name for file in path.glob("*.gguf"))) or "none"
        raise ModelError(f"{path}: has no file {model.gguf_file}; GGUF files there: {files}")


def loaded_commit(model: ModelSpec) -> str | None:
    """Return the Hub commit of a model that was loaded; None for a directory."""
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils.hub import extract_commit_hash

    if Path(model.path).is_dir():
        return None
    found = try_to_load_from_cache(model.path, model.gguf_file or "config.json", revision=model.revision)
    return extract_commit_hash(found, None) if isinstance(found, str) else None


def model_fingerprint(model: ModelSpec) -> str:
    """Return two hashes, of a model's configuration and of its weights' files; empty if it is not here.

    Of the weights, sizes and samples of the files, since reading gigabytes takes minutes: equal hashes do not
    prove that nothing changed, and the same weights may be saved in other files.
    """
    directory = Path(model.path)
    if not directory.is_dir():
        commit = loaded_commit(model)
        return f"{commit} {commit}" if commit else ""
    names = [model.gguf_file] if model.gguf_file else sorted(p.name for p in directory.glob("*.safetensors"))
    files = [directory / name for name in names]
    try:
        config = json.loads((directory / "config.json").read_text()) if not model.gguf_file else {}
        samples = hashlib.sha256()
        for path in files:
            samples.update(f"{path.stat().st_size}\0".encode())
            for sample in _samples(path):
                samples.update(sample)
    except (OSError, ValueError):
        return ""
    kept = {key: value for key, value in config.items() if key not in CONFIG_OF_THE_FILES}
    of_config = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    return f"{of_config.hexdigest()} {samples.hexdigest()}"


def _samples(path: Path) -> Iterator[bytes]:
    """Yield the beginning, the end and evenly spread parts of a file."""
    with path.open("rb") as file:
        last = max(0, path.stat().st_size - _SAMPLE_BYTES)
        for number in range(_NUM_SAMPLES):
            file.seek(last * number // (_NUM_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)


def as_trained(spec: RoundSpec, adapter: Path) -> RoundSpec:
    """Return the round file with the base model at the Hub commit that an adapter was trained on.

    A branch moves on: what it has today may be another base. A round that runs a command has none.
    """
    if spec.command is not None:
        return spec
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return spec  # whoever loads the adapter says what is wrong with it
    known = config.get("revision") if isinstance(config, dict) else None
    if not isinstance(known, str):
        return spec
    return spec.model_copy(update={"model": spec.model.model_copy(update={"revision": known})})


def hub_advice(model: ModelSpec, error: BaseException) -> str | None:
    """Return advice for a model that the Hub does not provide; None for any other error."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    kinds = tuple(type(cause) for cause in _causes(error))
    if GatedRepoError in kinds:
        return "the model is gated: request access on its page on the Hub, then log in with `hf auth login`"
    if RepositoryNotFoundError in kinds:
        return "it is neither a directory here nor a repository on the Hub that you can see; check the name"
    if RevisionNotFoundError in kinds:
        return f"the repository has no revision {model.revision}"
    if LocalEntryNotFoundError in kinds:
        return (
            "it is no directory here, is not in the local Hub cache, and the Hub cannot be reached; "
            "check the name, go online once, or give a directory"
        )
    return None


def _advice(model: ModelSpec, error: BaseException) -> str:
    if (advice := hub_advice(model, error)) is not None:
        return advice
    if (
        Path(model.path).is_dir()
        and not model.gguf_file
        and not (Path(model.path) / "tokenizer.json").exists()
    ):
        return "the directory has no tokenizer.json; save the model's tokenizer there"
    return str(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
