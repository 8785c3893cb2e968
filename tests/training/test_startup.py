from __future__ import annotations

from pathlib import Path

import pytest

from tests.studies import hub_cache, round_file
from tests.varlen import on_a_cpu
from tuner.data import load_tokenizer, prepare
from tuner.training.memory_budget import largest_hyperparameters
from tuner.training.startup import arrange, workload

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


def test_attention_is_that_of_the_file_and_part_of_the_workload(tmp_path: Path) -> None:
    spec = round_file(tmp_path).spec.absolute(tmp_path)
    data = prepare(spec, load_tokenizer(spec.model), None)
    found = {}
    for attention in ("torch", "varlen"):
        model = spec.model.model_copy(update={"attention": attention, "dtype": "bfloat16"})
        chosen = spec.model_copy(update={"model": model})
        with on_a_cpu():
            base = arrange(chosen, data, slots=2).base
        assert base.attention == attention
        found[attention] = workload(base, data, chosen)
    assert found["torch"] != found["varlen"]
