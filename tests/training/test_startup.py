from __future__ import annotations

from pathlib import Path

import pytest

from tests.studies import hub_cache, round_file
from tuner.data import load_tokenizer, prepare
from tuner.training.memory_budget import largest_hyperparameters
from tuner.training.startup import arrange

COMMIT = "a" * 40


def test_an_adapter_keeps_the_commit_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Hub that cannot be reached: what is in the local cache is enough."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_cache(tmp_path / "hub", commit=COMMIT)
    spec = round_file(tmp_path, base="quickstart/base").spec.absolute(tmp_path)
    state = arrange(spec, prepare(spec, load_tokenizer(spec.model), None), slots=1)
    adapter = state.new_adapter(largest_hyperparameters(spec.space()), seed=0)
    assert adapter.config.revision == COMMIT
    assert adapter.config.base_model_name_or_path == "quickstart/base"
